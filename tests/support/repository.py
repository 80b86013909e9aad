"""The committed tables of a scale in a folder of their own."""

import shutil

from beyond_outliers import paths

COMMITTED = paths.RESULTS  # before a test puts another in its place


def repository_of_pocket(root, monkeypatch):
    """Makes `root` a repository whose committed tables are those of pocket, and which nobody has run anything in."""
    for name in ("RESULTS", "FIGURES", "RUNS"):
        monkeypatch.setattr(paths, name, root / name.lower())
    shutil.copytree(COMMITTED / "pocket", root / "results" / "pocket")
    return root
