"""Scale files as tables: those of the repository, one that sets every key there is, and both as TOML again."""

import copy
import json
import math
import tomllib

from beyond_outliers import paths


def toml(table: dict, path: tuple[str, ...] = ()) -> str:
    """A table of tables as TOML text."""
    lines = [f"[{'.'.join(json.dumps(key) for key in path)}]"] if path else []
    lines += [f"{json.dumps(k)} = {literal(v)}" for k, v in table.items() if not isinstance(v, dict)]
    return "\n".join([*lines, *(toml(v, (*path, k)) for k, v in table.items() if isinstance(v, dict)), ""])


def literal(value) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {literal(inner)}' for key, inner in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return {math.inf: "inf"}.get(value, "nan" if value != value else json.dumps(value))


def read(scale: str) -> dict:
    return tomllib.loads((paths.SCALES / f"{scale}.toml").read_text())


def swept() -> dict:
    """A scale with grids that sets every key there is."""
    table = read("smoke")
    table["corpus"] |= {"validation_share": 0.04}
    table["training"] |= {"weight_decay": 0.1, "warmup": 0.1, "decay": 0.2, "clip": 1.0}
    table["sizes"]["tiny"] |= {"n_kv_heads": 2, "mlp_ratio": 4, "rope_base": 1024.0, "norm_eps": 1e-6, "init_std": 0.02}
    table["sizes"]["tiny"]["architecture"] = "olmo2"
    table["plan"]["qat"]["head"] = True
    table["plan"]["branches"] = {"sizes": ["tiny"], "seeds": [0], "at": [0.5]}
    table["measure"] |= {
        "primary": "W4A4",
        "calibration_tokens": 512,
        "trajectory": True,
        "common_by_seed": True,
        "readings": ["W4A4"],
    }
    return table


WHOLE = {"swept": swept(), "tuned": read("confirm")}


def with_value(table: dict, path: tuple[str, ...], value) -> dict:
    table = copy.deepcopy(table)
    inner = table
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return table
