"""A study of one scale: its runs, its steps, its tables. Names are imported when asked for: most need torch."""

import importlib
from typing import Any

_PLACES = {
    **dict.fromkeys(["Study"], "study"),
    **dict.fromkeys(["MEASURED", "TABLES", "MissingResults"], "tables"),
    **dict.fromkeys(["measure_folder", "measure_run", "specs", "validation_batches"], "measure"),
    **dict.fromkeys(["plan_table", "print_plan"], "plan"),
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name!r}")
