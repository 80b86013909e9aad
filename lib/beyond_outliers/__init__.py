"""Optimizers under quantization: the definitions behind the notebooks of this compendium."""

import importlib
from collections.abc import Callable
from typing import Any


def lazily(package: str, **modules: str) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package whose names come from its `modules`, each imported when first asked for.

    modules: module -> its names, separated by spaces; ".other.module" is one of the package's neighbour `other`.
    """
    places = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{places[name]}", package), name)

    return get, sorted(places)
