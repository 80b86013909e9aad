"""Tables of a TOML file into dataclasses, by their annotations: the one place where types, ranges and keys are checked.

    class Training:
        context: Annotated[int, Range(1, 2**20)] = 128

`parse(table, Training, "training")` refuses unknown and missing keys; `check_fields(self)`, called by `__post_init__`,
does the same for objects that are made in Python. Every complaint is a ValueError that names the key, the value and
what is valid. Whole numbers stay whole where a float is asked for: they are part of what run ids are hashed from.
"""

import dataclasses
import difflib
import functools
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

MOST_NAMES = 30  # in a message
WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    tuple: "a list",
    dict: "a table",
}


@dataclass(frozen=True)
class Range:
    """Numbers between two ends; `ends` says which of them belong to it, as in "[low, high)"."""

    low: float
    high: float
    ends: str = "[]"

    def allows(self, value: float) -> bool:
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    def __str__(self) -> str:
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


@dataclass(frozen=True)
class Matches:
    """Texts that a regular expression matches as a whole, and how to say it."""

    pattern: str
    words: str

    def allows(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Different:
    """Lists of at least `least` entries, none of them twice."""

    least: int = 1

    def allows(self, value: tuple[Any, ...]) -> bool:
        return len(value) >= self.least and len(set(value)) == len(value)

    def __str__(self) -> str:
        return f"({self.least} or more, all different)"


# what names files and folders: no separators, nothing hidden, no option of a command, short enough for every disk
Name = Annotated[str, Matches(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "of letters, digits, '.', '_' and '-' (64 at most)")]


def choose(kind: str, value: object, valid: Collection) -> None:
    """ValueError naming `value`, the nearest valid one and the valid ones unless it is one of them."""
    if value not in valid:
        text, names = str(value), [str(name) for name in valid]
        near = [name for name in names if text and name.startswith(text)] or difflib.get_close_matches(text, names, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        more = f", ... ({len(names)})" if len(names) > MOST_NAMES else ""
        raise ValueError(f"unknown {kind} {value!r}; valid: {', '.join(names[:MOST_NAMES])}{more}{hint}")


def check_keys(where: str, given: Iterable[str], valid: Collection[str], required: Collection[str] = ()) -> None:
    """ValueError for keys of the table `where` that are not valid, and for required ones that it lacks."""
    title = where if "." in where else f"[{where}]" if where else "the file"
    given = set(given)
    if unknown := given - set(valid):
        raise ValueError(f"{title} has unknown keys {sorted(unknown)}; valid: {', '.join(sorted(valid))}")
    if missing := set(required) - given:
        raise ValueError(f"{title} lacks {sorted(missing)}")


def parse(value: Any, kind: Any, where: str) -> Any:
    """`value`, as TOML or JSON gives it, as the annotation `kind`: tables become dataclasses, lists become tuples.

    `where` is the dotted key that a complaint names. ValueError when the value does not fit.
    """
    if kind is Any:
        return value
    base, limits = (kind.__origin__, kind.__metadata__) if get_origin(kind) is Annotated else (kind, ())
    container = get_origin(base) or base
    if container in (Union, UnionType):
        return _one_of(value, base, where)
    if dataclasses.is_dataclass(base) and isinstance(value, dict):
        return _parse_table(value, base, where)
    if not _is(value, container):
        raise ValueError(f"{where} must be {describe(kind)}, not {value!r}")
    given = value
    if container is tuple and get_args(base):
        value = tuple(parse(entry, get_args(base)[0], f"{where}[{place}]") for place, entry in enumerate(value))
    elif container is dict and get_args(base):
        of_keys, of_values = get_args(base)
        value = {parse(k, of_keys, f"a key of {where}"): parse(v, of_values, f"{where}.{k}") for k, v in value.items()}
    if not all(limit.allows(value) for limit in limits):
        raise ValueError(f"{where} must be {describe(kind)}, not {given!r}")
    return value


def check_values(value: Any, where: str) -> None:
    """ValueError unless TOML and JSON can both hold a value and everything in it, and NaN is nowhere."""
    if isinstance(value, dict):
        for key, entry in value.items():
            check_values(entry, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for place, entry in enumerate(value):
            check_values(entry, f"{where}[{place}]")
    elif not isinstance(value, bool | int | float | str) or value != value:
        raise ValueError(f"{where} must be true or false, a number, a text, a list or a table of such, not {value!r}")


def check_fields(instance: Any) -> None:
    """ValueError unless every field of a dataclass object fits its annotation."""
    its_class: Any = type(instance)
    for name, kind in _hints(its_class).items():
        parse(getattr(instance, name), kind, name)


def describe(kind: Any) -> str:
    """What an annotation asks for, in words."""
    if get_origin(kind) is Annotated:
        return " ".join([describe(kind.__origin__), *map(str, kind.__metadata__)])
    container, arguments = get_origin(kind) or kind, get_args(kind)
    if container in (Union, UnionType):
        return " or ".join(describe(option) for option in arguments if option is not NoneType)
    if container is tuple and arguments:
        return f"a list, each entry {describe(arguments[0])}"
    if container is dict and arguments:
        return f"a table, each value {describe(arguments[1])}"
    return WORDS.get(container, "a table")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Annotations of a dataclass's fields, with their metadata."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        return known and abs(value) <= sys.float_info.max  # nor NaN, nor a whole number that no float holds
    if kind is tuple:
        return isinstance(value, (tuple, list))
    return isinstance(value, kind)


def _one_of(value: Any, kind: Any, where: str) -> Any:
    """The first of the annotations of a union that the value fits."""
    options = [option for option in get_args(kind) if option is not NoneType]
    if value is None and NoneType in get_args(kind):
        return None
    for option in options:
        try:
            return parse(value, option, where)
        except ValueError:
            if len(options) == 1 or (dataclasses.is_dataclass(option) and isinstance(value, dict)):
                raise
    raise ValueError(f"{where} must be {describe(kind)}, not {value!r}")


def _parse_table(table: dict[str, Any], kind: Any, where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unset = dataclasses.MISSING
    required = [name for name, f in fields.items() if f.default is unset and f.default_factory is unset]
    check_keys(where, table, fields, required)
    inside = f"{where}." if where else ""
    values = {name: parse(value, _hints(kind)[name], f"{inside}{name}") for name, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:  # what the dataclass itself asks of several fields at once
        raise ValueError(f"{where}: {error}" if where else str(error)) from None
