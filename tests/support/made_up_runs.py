"""Made-up studies: rows of runs whose means, differences and orders are known, and tables as they are given."""

from types import SimpleNamespace

import pandas as pd

from beyond_outliers.study import MissingResults

LEVELS = {"adamw": 0.5, "muon": 0.3, "psgd": 0.6, "scion": 0.35, "shampoo": 0.1, "soap": 0.4}
NOISE = [-0.01, 0.0, 0.01, 0.005]


def runs(levels=LEVELS, seeds=3, sizes=("small", "large"), apart=1, noise=lambda name, seed: NOISE[seed]):
    """One row a run: the level of its optimizer, `apart` more at every further size, and a little noise by seed."""
    rows = [
        (f"{size}-{name}-{seed}", size, name, 0.1, seed, "finished", level + apart * place + noise(name, seed))
        for place, size in enumerate(sizes)
        for name, level in levels.items()
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["run", "size", "optimizer", "lr", "seed", "status", "value"])


def table(columns, *rows):
    """A table of these rows; `columns` separated by spaces."""
    return pd.DataFrame(rows, columns=columns.split())


class Made:
    """A study with these rows of runs by purpose (others are empty), and these tables by name; others are missing."""

    scale = "made up"

    def __init__(self, by_purpose=None, primary="W4A4+head", optimizers=tuple(LEVELS), protocol=None, **tables):
        self.by_purpose, self.tables = by_purpose or {}, tables
        self.protocol = SimpleNamespace(
            measure=SimpleNamespace(primary=primary), optimizers=optimizers, **(protocol or {})
        )

    def runs(self, purpose):
        rows = self.by_purpose.get(purpose)
        return runs().rename(columns={"value": "val_loss"}).iloc[:0] if rows is None else rows

    def has(self, name):
        return name in self.tables

    def table(self, name):
        if name not in self.tables:
            raise MissingResults(name)
        return self.tables[name]

    def measured(self, name, purpose="full_precision"):
        return self.table(name)
