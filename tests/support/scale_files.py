"""Scale files from tables."""

import json
import math


def toml(table: dict, path: tuple[str, ...] = ()) -> str:
    """A table of tables as TOML text."""
    lines = [f"[{'.'.join(json.dumps(key) for key in path)}]"] if path else []
    lines += [f"{json.dumps(k)} = {literal(v)}" for k, v in table.items() if not isinstance(v, dict)]
    return "\n".join([*lines, *(toml(v, (*path, k)) for k, v in table.items() if isinstance(v, dict)), ""])


def literal(value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return {math.inf: "inf"}.get(value, "nan" if value != value else json.dumps(value))
