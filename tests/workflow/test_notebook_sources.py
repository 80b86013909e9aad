"""The notebooks as they are committed: no outputs, typed parameters, no long definitions."""

import json
import re

import pytest

from beyond_outliers import paths
from beyond_outliers.config import Protocol
from beyond_outliers.notebook import check_parameters, notebooks, parameters_of


def test_parameters_are_checked_by_name_and_type():
    namespace = {"__annotations__": {"scale": str, "n": int, "x": float}, "scale": "smoke", "n": 3, "x": 1}
    assert check_parameters(namespace) == {"scale": "smoke", "n": 3, "x": 1}
    with pytest.raises(ValueError, match="unknown notebook parameters: m; valid"):
        check_parameters({**namespace, "m": 4})
    with pytest.raises(ValueError, match="n must be int, not True"):
        check_parameters({**namespace, "n": True})


def test_notebooks_that_a_scale_has_no_runs_for_are_left_out(tmp_path, monkeypatch):
    assert notebooks(Protocol.load("smoke")) == notebooks()
    text = (paths.SCALES / "smoke.toml").read_text()
    (tmp_path / "own.toml").write_text(re.sub(r"^qat = .*\n", "", text, flags=re.M))
    monkeypatch.setattr(paths, "SCALES", tmp_path)
    assert set(notebooks()) - set(notebooks(Protocol.load("own"))) == {"05_qat", "06_scaling_laws"}


@pytest.mark.parametrize("file", sorted(paths.NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_are_committed_without_outputs(file):
    """`make hooks` strips them before a commit."""
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert [n for n, cell in enumerate(cells) if cell["outputs"] or cell["execution_count"] is not None] == []


@pytest.mark.parametrize("name", notebooks())
def test_parameters_are_typed_and_commented(name):
    comments = parameters_of(name)
    assert "scale" in comments and all(comments.values())
    source = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text())
    for cell in source["cells"]:
        body = re.search(r"^def .*\n((?:    .*\n?|\n)+)", "".join(cell["source"]), re.M)
        assert not body or len(body[1].strip().splitlines()) <= 3, "a definition of its own belongs into lib"
