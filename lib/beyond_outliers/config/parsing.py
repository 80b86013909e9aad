"""Tables of a TOML file into dataclasses, by their annotations: the one place where types, ranges and keys are checked.

    class Training:
        context: Annotated[int, between(1, 2**20)] = 128

`parse(table, Training, "training")` refuses unknown and missing keys; `check_fields(self)`, called by `__post_init__`,
does the same for objects that are made in Python. Every complaint is a ValueError that names the key, the value and
what is valid. Whole numbers stay whole where a float is asked for: they are part of what run ids are hashed from.
"""

import dataclasses
import difflib
import functools
import re
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

MOST_NAMES = 30  # in a message
KINDS: dict[Any, tuple[str, Any]] = {  # of an annotation: in words, and the types that fit it
    int: ("a whole number", int),
    float: ("a finite number", (int, float)),
    bool: ("true or false", bool),
    str: ("a text", str),
    tuple: ("a list", (tuple, list)),
    dict: ("a table", dict),
    object: ("one of", object),
}


@dataclass(frozen=True)
class Limit:
    """What is asked of a value beyond its type, in words and as a question."""

    words: str
    allows: Callable[[Any], object]


def between(low: float, high: float) -> Limit:
    """Numbers from `low` to `high`, both included."""
    return Limit(f"in [{low}, {high}]", lambda value: low <= value <= high)


def matching(pattern: str, words: str) -> Limit:
    """Texts that a regular expression matches as a whole."""
    return Limit(words, re.compile(pattern).fullmatch)


def different(least: int = 1) -> Limit:
    """Lists of at least `least` entries, none of them twice."""
    return Limit(f"({least} or more, all different)", lambda value: least <= len(value) == len(set(value)))


# what names files and folders: no separators, nothing hidden, no option of a command, short enough for every disk
Name = Annotated[str, matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "of letters, digits, '.', '_' and '-' (64 at most)")]


def choose(kind: str, value: object, valid: Collection) -> None:
    """ValueError naming `value`, the nearest valid one and the valid ones unless it is one of them."""
    if value not in list(valid):  # a list is in no dictionary
        text, names = str(value), [str(name) for name in valid]
        near = [name for name in names if text and name.startswith(text)] or difflib.get_close_matches(text, names, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        more = f", ... ({len(names)})" if len(names) > MOST_NAMES else ""
        raise ValueError(f"unknown {kind} {value!r}; valid: {', '.join(names[:MOST_NAMES])}{more}{hint}")


def check_keys(where: str, given: Iterable[str], valid: Collection[str], required: Iterable[str] = ()) -> None:
    """ValueError for keys of the table `where` that are not valid, and for required ones that it lacks."""
    if unknown := sorted(set(given) - set(valid)):
        raise ValueError(f"{where or 'the file'} has unknown keys {unknown}; valid: {', '.join(sorted(valid))}")
    if missing := sorted(set(required) - set(given)):
        raise ValueError(f"{where or 'the file'} lacks {missing}")


def check_values(value: Any, where: str) -> None:
    """ValueError unless TOML and JSON can both hold a value and everything in it, and NaN is nowhere."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            check_values(part, f"{where}.{key}")
    elif not isinstance(value, bool | int | float | str) or value != value:
        raise ValueError(f"{where} must be true or false, a number, a text, a list or a table of such, not {value!r}")


def check_fields(instance: Any) -> None:
    """ValueError unless every field of a dataclass object fits its annotation."""
    its_class: Any = type(instance)
    for name, kind in _annotations(its_class).items():
        parse(getattr(instance, name), kind, name)


def parse(value: Any, kind: Any, where: str) -> Any:
    """`value`, as TOML or JSON gives it, as the annotation `kind`: tables become dataclasses, lists become tuples.

    `where` is the dotted key that a complaint names. ValueError when the value does not fit. Of a union, a table is
    parsed as the dict in it, and anything else as the first of the others.
    """
    base, *limits = get_args(kind) if get_origin(kind) is Annotated else [kind]
    container, arguments = get_origin(base) or base, get_args(base)
    if container is Any or (value is None and NoneType in arguments):
        return value
    if container in (Union, UnionType):
        fitting = [
            option for option in arguments if ((get_origin(option) or option) is dict) == isinstance(value, dict)
        ]
        return parse(value, [*fitting, *arguments][0], where)
    if dataclasses.is_dataclass(base) and isinstance(value, dict):
        return _parse_table(value, base, where)
    words, types = KINDS.get(container, ("a table", container))
    fits = isinstance(value, types) and (container is bool or not isinstance(value, bool))
    if container is float:  # nor NaN, nor a whole number that no float holds
        fits = fits and abs(value) <= sys.float_info.max
    parsed = value
    if fits and arguments and container is tuple:
        parsed = tuple(parse(part, arguments[0], f"{where}[{place}]") for place, part in enumerate(value))
    elif fits and arguments and container is dict:
        keys = [parse(key, arguments[0], f"a key of {where}") for key in value]
        parsed = {key: parse(value[key], arguments[1], f"{where}.{key}") for key in keys}
    if not fits or not all(limit.allows(parsed) for limit in limits):
        raise ValueError(f"{where} must be {' '.join([words, *(limit.words for limit in limits)])}, not {value!r}")
    return parsed


@functools.cache
def _annotations(kind: Any) -> dict[str, Any]:
    """Annotations of a dataclass's fields, with their limits."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _parse_table(table: dict[str, Any], kind: Any, where: str) -> Any:
    unset, fields = dataclasses.MISSING, dataclasses.fields(kind)
    required = [field.name for field in fields if field.default is unset and field.default_factory is unset]
    kinds = _annotations(kind)
    check_keys(where, table, kinds, required)
    values = {name: parse(value, kinds[name], f"{where}.{name}".lstrip(".")) for name, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:  # what the dataclass itself asks of several fields at once
        raise ValueError(f"{where}: {error}".removeprefix(": ")) from None
