"""The notebooks as they are committed: no outputs, typed parameters, no long definitions."""

import json
import re
import sys
import tomllib

import nbformat
import papermill
import pytest
from traitlets.config import Config

from beyond_outliers import paths
from beyond_outliers.claims import read_rules
from beyond_outliers.config import Protocol
from beyond_outliers.notebook import check_parameters, finding, notebooks, opened, run_notebook, setting
from beyond_outliers.study import MissingResults, Study
from beyond_outliers.terms import IN_FULL, TERMS, explained, used


def test_parameters_are_checked_by_name_and_type():
    cell = 'scale: str = "pocket"\nn: int = 3\nx: float = 1  # a rate\nbuild: bool = False'
    namespace = {"__annotations__": {"scale": str, "n": int, "x": float, "build": bool, "of_mine": list}}
    namespace |= {"scale": "smoke", "n": 3, "x": 1, "build": False, "of_mine": None, "mine": 4}
    namespace["In"] = ["", cell, '# Parameters\nscale = "smoke"\n', "mine = 4\nof_mine: list = None", "begin()"]
    found = {"scale": "smoke", "n": 3, "x": 1, "build": False}
    assert check_parameters(namespace) == found
    assert check_parameters({**namespace, "In": [*namespace["In"], cell, "m = 3"]}) == found  # run again, by hand
    with pytest.raises(ValueError, match=r"unknown notebook parameters: m; valid: scale \(str\), n \(int\)"):
        check_parameters({**namespace, "In": ["", cell, "# Parameters\nm = 4\n", "begin()"]})
    with pytest.raises(ValueError, match="n must be int, not True"):
        check_parameters({**namespace, "n": True})


def test_notebooks_that_a_scale_has_no_runs_for_are_left_out(tmp_path, monkeypatch):
    assert notebooks(Protocol.load("smoke")) == notebooks()
    text = (paths.SCALES / "smoke.toml").read_text()
    (tmp_path / "own.toml").write_text(re.sub(r"^qat = .*\n", "", text, flags=re.M))
    monkeypatch.setattr(paths, "SCALES", tmp_path)
    assert set(notebooks()) - set(notebooks(Protocol.load("own"))) == {"05_qat", "06_scaling_laws"}


@pytest.mark.parametrize("file", sorted(paths.NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_are_committed_without_outputs_and_long_definitions(file):
    """`make hooks` strips outputs before a commit; a long definition belongs into lib."""
    cells = [cell for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]
    assert cells
    assert [n for n, cell in enumerate(cells) if cell.outputs or cell.execution_count is not None] == []
    bodies = [re.search(r"^def .*\n((?:    .*\n?|\n)+)", cell.source, re.M) for cell in cells]
    assert [body[0] for body in bodies if body and len(body[1].strip().splitlines()) > 3] == []


def cells_of(name):
    cells = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", 4).cells
    return [(cell.cell_type, cell.source) for cell in cells if cell.id != "estimate"]


@pytest.mark.parametrize("name", notebooks())
def test_a_notebook_begins_with_its_title_and_its_finding(name):
    """Title as a question, typed parameters, begin, finding; its formula by hand; the question with the claim."""
    parameters = papermill.inspect_notebook(paths.NOTEBOOKS / f"{name}.ipynb")
    assert {"scale", "build"} <= set(parameters)
    assert all(parameter["help"] and parameter["inferred_type_name"] != "None" for parameter in parameters.values())
    kinds, sources = zip(*cells_of(name), strict=True)
    assert kinds[:4] == ("markdown", "code", "code", "code")
    assert re.fullmatch(r"# .*\?", sources[0]) and "notebook.begin(globals()" in sources[2]
    assert sources[3].splitlines()[-1].startswith(f'notebook.finding("{name}", ')
    by_hand = sources[4].startswith("## By hand")
    assert by_hand or name.startswith("08")
    assert sources[6 if by_hand else 4].startswith("**Question.** ")
    if by_hand:  # every intermediate printed, then held against the library
        assert all(text in sources[5] for text in ("beyond_outliers", "print(", "assert "))


# sizes, scales, formats, judged checkpoints and forms
OF_ONE_SCALE = r"""(?x)\b0\.\d+M\b|`(?:confirm|laptop|llama|pocket)`(?!\ )|\((?:on\ which|both\ beside)
    |is\ not\ quantized|is\ left\ out\ \(|\(yet\)|\bjudged\ (?:at|on|by\ the)\b|Verdicts\ use
    |(?<!to\ the\ damage\ of\ )W\dA\d"""


@pytest.mark.parametrize("name", notebooks())
def test_prose_that_scales_share_holds_no_fact_of_one(name):
    """They are filled in from the scale; see `notebook.setting`."""
    prose = [source for kind, source in cells_of(name) if kind == "markdown"]
    assert not re.findall(OF_ONE_SCALE, "\n".join(prose))


@pytest.mark.parametrize(
    ("scale", "head", "rates"),
    [("confirm", "is rounded", "a search"), ("laptop", "is not", "a grid"), ("confirm2", "is rounded", "a search")],
)
def test_a_scale_says_what_its_pages_take_for_granted(scale, head, rates):
    text = setting(Study(scale)).data
    primary = tomllib.loads((paths.SCALES / f"{scale}.toml").read_text())["measure"].get("primary", "W4A4")
    assert f"`{primary}`" in text and text.count(head) == 2 and rates in text
    assert ("Unlike in the paper's runs" in text) == (scale != "confirm2")


def test_the_verdicts_of_its_claims_follow_where_a_notebook_has_claims():
    judged = {rule["notebook"] for rule in read_rules().values()}
    for name in notebooks():
        called = [source for _, source in cells_of(name) if "verdicts_here" in source]
        assert called == ([f'notebook.verdicts_here("{name}", study)'] if name in judged else []), name


def test_terms_are_defined_once_each_in_the_order_of_their_use_and_in_full_where_pages_link_to():
    assert used("QAT after W4A4+head, MMRs and R_L") == ["QAT", "W4A4", "R_L"]
    terms = re.findall(r"\[(\w+)\]\(\.\./docs/terms\.md#\w+\): ", explained("MMR and PTQ, and MMR again"))
    assert terms == ["MMR", "PTQ"] and explained("nothing of the kind") == ""
    assert re.findall(r"^## (.+)$", (paths.ROOT / IN_FULL).read_text(), re.M) == list(TERMS)


def test_a_finding_comes_with_the_terms_of_its_notebook(monkeypatch):
    from beyond_outliers.claims import findings

    monkeypatch.setitem(findings.FINDINGS, "03_ptq", lambda study: "Muon pays 0.1 [0.0, 0.2] nats under W4A4.")
    text = finding("03_ptq", Study("laptop")).data
    assert text.startswith("**Finding.** Muon pays 0.1 [0.0, 0.2] nats under W4A4.\n\n*Intervals are 95 %")
    assert "[W4A4](" in text and "[Common Loss](" in text  # the second is in the notebook's own text
    with pytest.raises(ValueError, match=r"unknown notebook '03_qtp'; valid: 01_full_precision"):
        finding("03_qtp", Study("laptop"))


def test_without_tables_a_notebook_says_how_long_they_take_and_how_to_make_them(monkeypatch, tmp_path):
    from beyond_outliers.study import plan

    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    monkeypatch.setattr(
        plan, "step_seconds", lambda config, *_, **__: config.tokens_per_step / 10_000
    )  # tokens a second
    with pytest.raises(MissingResults, match=r"make reproduce SCALE=smoke.*build=True") as missing:
        opened(Study("smoke"), build=False)
    hours = plan.plan_table(Study("smoke")).hours.sum()
    assert f"about {60 * hours:.0f} minutes" in str(missing.value)
    with pytest.raises(MissingResults, match="as long as `make plan SCALE=paper` says"):
        opened(Study("paper"), build=False)


@pytest.mark.parametrize(
    ("name", "scale", "said"),
    [
        ("../tests/x", "smoke", "unknown notebook '../tests/x'; valid: 01_full_precision"),
        ("01_full_precision", "../../x", "unknown scale '../../x'; valid: confirm"),
    ],
)
def test_notebooks_and_scales_are_names(name, scale, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        run_notebook(name, scale)


def test_lab_saves_no_outputs_and_serves_what_pages_link_to(monkeypatch, tmp_path):
    """`make lab` reads this file; a browser goes on showing what is not saved."""
    decoy = tmp_path / "kernels" / "python3" / "kernel.json"  # of another environment
    decoy.parent.mkdir(parents=True)
    decoy.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    config = Config()
    source = (paths.NOTEBOOKS / "jupyter_lab_config.py").read_text()
    exec(source, names := {"get_config": lambda: config, "__file__": str(paths.NOTEBOOKS / "jupyter_lab_config.py")})
    assert config.ServerApp.root_dir == str(paths.ROOT)
    kernels = config.ServerApp.kernel_spec_manager_class()
    assert kernels.get_kernel_spec("python3").argv[0] == sys.executable
    notebook = nbformat.read(paths.NOTEBOOKS / "05_qat.ipynb", 4)
    clean = nbformat.writes(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="noise")], 3
    notebook.metadata.language_info.version = "3.11.2"
    names["without_outputs"](model={"type": "notebook", "content": notebook})
    assert nbformat.writes(notebook) == clean
    names["without_outputs"](model={"type": "file", "content": "text"})
