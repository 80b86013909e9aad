"""Rows of made-up runs whose means, differences and orders are known."""

import pandas as pd

LEVELS = {"adamw": 0.5, "muon": 0.3, "psgd": 0.6, "scion": 0.35, "shampoo": 0.1, "soap": 0.4}
NOISE = [-0.01, 0.0, 0.01, 0.005]


def runs(levels=LEVELS, seeds=3, sizes=("small", "large")):
    """One row a run: the level of its optimizer, 1 more at every further size, and a little noise by seed."""
    rows = [
        (f"{size}-{name}-{seed}", size, name, 0.1, seed, "finished", level + place + NOISE[seed])
        for place, size in enumerate(sizes)
        for name, level in levels.items()
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["run", "size", "optimizer", "lr", "seed", "status", "value"])
