"""Things of your own, named `module:name` in scale files and on command lines: optimizers, number formats."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from beyond_outliers.config.parsing import choose

ROOT = Path(__file__).resolve().parents[3]  # the repository


def is_own(name: object) -> bool:
    """Whether `name` has the form module:name."""
    return isinstance(name, str) and name.count(":") == 1 and all(name.split(":"))


def load_own(name: str, kind: str) -> Any:
    """What `module:name` stands for; the module is installed, or a file in the working directory or the repository.

    ValueError that says whether there is no such module, it cannot be imported, or it has no such name.
    """
    if not is_own(name):
        raise ValueError(f"{name!r} names no {kind} of your own; valid: module:name, for instance my_{kind}s:mine")
    module, _, attribute = name.partition(":")
    places = [place for place in (str(Path.cwd()), str(ROOT)) if place not in sys.path]
    sys.path += places  # behind all else: a file here hides no installed package
    try:
        found = importlib.import_module(module)
        if hasattr(found, attribute):
            return getattr(found, attribute)
    except (Exception, SystemExit) as error:  # whatever a file of the user's does when it is read
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{kind} {name!r}: cannot import {module!r} ({reason}); valid: an installed module, or {module}.py in "
            f"{Path.cwd()} or {ROOT}"
        ) from error
    finally:
        for place in places:
            sys.path.remove(place)
    choose(f"{kind} of the module {module!r}:", attribute, sorted(part for part in vars(found) if part[0] != "_"))
