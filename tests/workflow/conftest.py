"""One study at scale smoke, made once and shared by the tests that read it."""

import warnings

import pytest

from beyond_outliers import paths
from beyond_outliers.config import EdgeWarning
from beyond_outliers.study import Study
from checkouts import made


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the study of this session lies."""
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def output(folder):
    """Results, runs and figures go to a temporary folder, in this process and in the notebooks' kernels.

    A module at a time, so that the tests of the committed tables between them see the repository's own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEYOND_OUTLIERS_OUTPUT", str(folder))
        patch.setattr(paths, "OUTPUT", folder)
        patch.setattr(paths, "FIGURES", folder / "figures")
        patch.setattr(paths, "RUNS", folder / "data" / "runs")
        yield folder


@pytest.fixture(scope="module")
def study(output):
    """The first module that asks for it trains and measures; the others find everything there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EdgeWarning)  # two-point grids have nothing but edges
        return made(Study("smoke"))
