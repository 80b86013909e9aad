"""Scale files: every key with every kind of bad value is refused, by file, key, value and what is valid."""

import copy
import math

import pytest

from beyond_outliers import paths
from beyond_outliers.config import OPTIMIZER_NAMES, Protocol, registry, scales
from beyond_outliers.config.registry import REGISTRY
from beyond_outliers.optimizers import build_optimizer
from beyond_outliers.study import Study
from scale_files import WHOLE, toml, with_value


def keys(table: dict, path: tuple[str, ...] = ()):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from keys(value, (*path, key))
        else:
            yield (*path, key), value


def tables(table: dict, path: tuple[str, ...] = ()):
    yield path
    for key, value in table.items():
        if isinstance(value, dict):
            yield from tables(value, (*path, key))


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SCALES", tmp_path)

    def of(table: dict) -> Protocol:
        (tmp_path / "own.toml").write_text(toml(table))
        return Protocol.load("own")

    return of


SMALL = {"width": 32, "depth": 2, "n_heads": 2}
BAD = {
    bool: [1, "yes", []],
    int: ["12", "four", 4.5, -64, 2**30, True, math.nan, []],
    float: ["fast", -0.5, 2**30, 1e300, math.nan, math.inf, False, []],
    str: [3, True, []],
    list: ["int4", 4, [[]], [math.nan]],
}
WHERE_ZERO_IS_VALID = {"seed", "weight_decay", "warmup", "decay", "norm_eps", "tolerance"}


# whole numbers in the files, but not by nature
FLOATS = {"tokens_per_parameter", "limit_mb", "factor"}


def bad_values(key: str, value) -> list:
    """Values of the wrong type or range for a key, by the valid one that it has."""
    kind = float if key in FLOATS else type(value)
    values = list(BAD[kind])
    if kind in (int, float) and key not in WHERE_ZERO_IS_VALID:
        values.append(0)
    if kind is list:
        values += [value + value] + [[]] * (key not in ("formats", "specs"))  # everything twice; nothing
    return values


def test_the_whole_scales_of_these_tests_are_valid(load):
    for table in WHOLE.values():
        load(table)


@pytest.mark.parametrize(
    ("kind", "path", "valid"),
    [
        pytest.param(kind, path, value, id=f"{kind}-{'.'.join(path)}")
        for kind, table in WHOLE.items()
        for path, value in keys(table)
        if path[0] != "hyper"  # whose ranges are the optimizers' own
    ],
)
def test_bad_values_are_refused(load, kind, path, valid):
    for value in bad_values(path[-1], valid):
        with pytest.raises(ValueError) as refused:
            load(with_value(WHOLE[kind], path, value))
        message = str(refused.value)
        if path[0] == "learning_rates" and "different lengths" in message:
            continue
        key = ".".join(path[:2]) if path[0] == "sizes" else ".".join(path)
        assert "own.toml" in message and key in message and path[-1] in message, message
        assert "must be " in message or "unknown" in message, message
        bad = value[0] if isinstance(value, list) and len(value) == 1 else value  # the entry of the list
        assert repr(bad) in message, message


@pytest.mark.parametrize("kind", WHOLE)
def test_unknown_keys_are_refused_in_every_table(load, kind):
    fits = {"learning_rates": [1e-3, 1e-2], "start": {"lr": 1e-3, "auxiliary": 1e-3}, "hyper": {}, "seeds": [1]}
    fits["plan"] = {"sizes": list(WHOLE[kind]["sizes"]), "seeds": [1]}
    said = r"own\.toml.*(unknown keys \['nonsense'\]; valid: |names size 'nonsense')"
    for path in tables(WHOLE[kind]):
        # where any name is a size, and what the optimizers themselves refuse
        if path[-1:] != ("sizes",) and (path[:1] != ("hyper",) or len(path) == 1):
            with pytest.raises(ValueError, match=said):
                load(with_value(WHOLE[kind], (*path, "nonsense"), fits.get("".join(path[-1:]), 1)))


@pytest.mark.parametrize("kind", WHOLE)
def test_missing_sections_are_refused(load, kind):
    for section in set(WHOLE[kind]) - {"hyper"}:
        table = {key: value for key, value in WHOLE[kind].items() if key != section}
        with pytest.raises(ValueError, match=rf"own\.toml.*{section}"):
            load(table)


@pytest.mark.parametrize("name", ["../pocket", "a/pocket", "", "..", "po ket"])
def test_a_scale_is_a_name_and_not_a_path(name):
    with pytest.raises(ValueError, match="the name of a scale must be a text of letters"):
        Protocol.load(name)


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("swept", ("sizes", "tiny", "width"), 30, "sizes.tiny: width 30 does not divide"),
        ("swept", ("learning_rates", "adamw"), [1e-3], r"different lengths \[1, 2\]"),
        ("swept", ("measure", "propagation_tokens"), 63, r"propagation_tokens must be 64 \(training.context\) or more"),
        ("swept", ("measure", "formats"), [], "either formats or specs must say"),
        ("swept", ("measure", "specs"), ["W4A4"], "either formats or specs must say"),
        ("swept", ("sizes", "tiny", "architecture"), "olmo", "sizes.tiny: unknown architecture 'olmo'; valid: olmo2"),
        ("swept", ("plan", "sweep", "sizes"), ["tini"], "plan.sweep names size 'tini'; valid: tiny, small"),
        ("swept", ("sizes", "tiny", "deep"), 2, r"sizes.tiny has unknown keys .*'deep'.*depth"),
        ("swept", ("hyper", "muon", "adamw_lr"), math.nan, "hyper.muon.adamw_lr must be .*not nan"),
        ("swept", ("sizes",), {"tiny": SMALL, "TINY": SMALL}, "differ in case alone: tiny, TINY"),
        ("swept", ("sizes",), {}, "no size"),
        ("swept", ("sizes",), {"small": {**SMALL, "depth": 3}, "tiny": SMALL}, "smallest size first"),
        ("swept", ("sizes", "tiny", "vocab_size"), 300, r"sizes.tiny has unknown keys \['vocab_size'\]"),
        ("swept", ("sizes", "tiny"), {"width": 32}, r"sizes.tiny lacks \['depth', 'n_heads'\]"),
        ("swept", ("plan", "branches", "at"), [0.9], "plan.branches.at must be above 0 and at most 0.8"),
        ("swept", ("plan", "schemes", "optimizers"), ["sgd"], "plan.schemes names optimizer 'sgd'; valid: adamw"),
        ("swept", ("plan", "qat", "seeds"), {"small": [0]}, "plan.qat.seeds has no seeds for size 'tiny'"),
        (
            "swept",
            ("plan", "qat", "seeds"),
            {"tiny": [0], "tini": [0]},
            "plan.qat names size 'tini'; valid: tiny",
        ),
        ("tuned", ("hyper",), {"muon": {"embedding_lr": 0.1}}, r"hyper.muon has \['embedding_lr'\], which"),
        (
            "tuned",
            ("plan", "sweep"),
            {"sizes": ["0.08M"], "seeds": [0]},
            "which tunes every size, for none",
        ),
        ("tuned", ("tuning", "seeds"), [1, 2], "shape must be two numbers, or none with one seed, not .* with 2"),
        ("tuned", ("tuning", "shape"), [5, 3], "cross_seeds must be of every size but the smallest, .*not {}"),
        ("tuned", ("tuning", "start", "adamw"), {"lr": 1e-3}, r"tuning.start.adamw lacks \['auxiliary'\]"),
        ("tuned", ("rates_from",), "confirm", "rates_from = 'confirm' and .rates. ask for each other"),
        ("tuned", ("learning_rates",), {"adamw": [1e-3]}, "either .learning_rates. or .tuning.start."),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(load, kind, path, value, message):
    with pytest.raises(ValueError, match=message):
        load(with_value(WHOLE[kind], path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("hyper", "muon", "ns_steps"),
            101,
            r"own.toml: hyper.muon: .*ns_steps must be a whole number in .1, 100., not 101",
        ),
        (
            ("hyper", "muon", "momentum"),
            1.0,
            r"own.toml: hyper.muon: .*momentum must be .* in \[0, 1\), not 1.0",
        ),
        (("hyper", "muon", "adam_lr"), 1e-3, r"hyper.muon: Muon has no hyperparameter adam_lr.*adamw_lr.*embedding_lr"),
        (("measure", "formats"), ["int9"], r"own.toml: measure.formats: .*'int9'; valid: .*int4"),
        (("measure", "primary"), "W3A3", r"own.toml: measure.primary: unknown spec 'W3A3'; valid: .*W4A4\+head"),
        (("plan", "qat", "scheme"), "guest", r"unknown scheme 'guest'; valid: quest"),
    ],
)
def test_what_only_the_library_can_judge_is_refused_before_anything_runs(load, path, value, message):
    load(with_value(WHOLE["swept"], path, value))
    with pytest.raises(ValueError, match=message):
        Study("own").check()


def test_whole_numbers_stay_whole():
    """20 and 20.0 are the same number and different run ids."""
    steps = Protocol.load("smoke").settings.training, Protocol.load("pocket").settings.training
    assert [type(training.tokens_per_parameter) for training in steps] == [float, int]


def test_a_scale_without_qat_is_valid_and_says_what_it_lacks(load):
    table = copy.deepcopy(WHOLE["swept"])
    del table["plan"]["qat"], table["plan"]["schemes"], table["plan"]["branches"]
    protocol = load(table)
    assert protocol.purposes() == ["sweep", "full_precision"] and protocol.purposes("small") == ["full_precision"]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"threads = 1\nthreads = 1\n",
        b"threads = " + b"[" * 100_000,
        b"threads = " + b"9" * 5000,
        b"\x00",
    ],
)
def test_what_is_no_scale_file_is_refused(load, tmp_path, text):
    (tmp_path / "own.toml").write_bytes(text)
    with pytest.raises(ValueError, match=r"own\.toml: "):
        Protocol.load("own")


ABSURD = [  # what no one can mean, beyond `BAD`: path, value
    # names that leave their folder, hide, become options or commands, or that no disk holds
    *[(("sizes", name), SMALL) for name in ("../../x", "tiny||touch PWNED||", "a b", "a\nb", "-rf", "..", "größe", "")],
    (("sizes", "x" * 65), SMALL),
    *[(("plan", "qat", "scheme"), name) for name in ("../../x", "quest; touch PWNED", "", "quest\nste")],
    (("plan", "schemes", "schemes"), ["ste", "../lsq"]),
    (("plan", "schemes", "optimizers"), ["../adamw"]),
    (("learning_rates", "../muon"), [1e-3, 1e-2]),
    # text that is not there
    *[(("corpus", "source"), source) for source in ("", " ", "..", "/no/such/file.txt", "embedded\0", "embeded")],
    (("corpus", "wheels"), ["../../x"]),
    # trainings of no step, of fewer steps than evaluations, or without end
    *[(("training", "tokens_per_parameter"), value) for value in (0.001, 1e6)],
    (("training", "batch_size"), 2**20),
    (("sizes", "tiny"), {"width": 2**16, "depth": 1000, "n_heads": 2}),
    (("hyper", "muon", "adamw_betas"), [0.9, 1e300]),
    (("hyper", "muon", "ns_dtype"), "bfloat16"),
    (("hyper", "psgd", "seed"), "one"),
    (("hyper", "scion", "embedding_lr"), True),
    (("measure", "formats"), ["int4; touch PWNED"]),
]


@pytest.mark.parametrize(("path", "value"), ABSURD, ids=lambda part: repr(part)[:60])
def test_an_absurd_scale_file_is_refused_before_anything_is_fetched_or_trained(load, path, value):
    table = WHOLE["swept"]
    if path[0] == "hyper":
        path, value = path[:2], {path[2]: value}
    with pytest.raises(ValueError, match=r"own\.toml: ") as refused:
        load(with_value(table, path, value))
        Study("own").check()
    assert path[0] in str(refused.value) or "size" in str(refused.value), refused.value


# ------------------------------------------------------------------------------------------------------ the optimizers


def test_the_six_have_one_look_each():
    entries = [REGISTRY[name] for name in OPTIMIZER_NAMES]
    assert [len({getattr(e, key) for e in entries}) for key in ("label", "colour", "marker", "source")] == [6] * 4
    assert "sgd" in REGISTRY and "sgd" not in OPTIMIZER_NAMES


def test_a_seventh_optimizer_is_one_entry(load, monkeypatch):
    """With grids in a scale file it is swept; scales that do not name it stay as they are."""
    entry = registry.Entry("RMSprop", "torch.optim.rmsprop:RMSprop", "#F0E442", "*")
    monkeypatch.setitem(REGISTRY, "rmsprop", entry)
    table = with_value(WHOLE["swept"], ("learning_rates", "rmsprop"), [1e-3, 1e-2])
    table["hyper"]["rmsprop"] = {"alpha": 0.9}
    protocol = load(table)
    assert protocol.optimizers == (*OPTIMIZER_NAMES, "rmsprop")
    assert [p.config.lr for p in protocol.sweep_runs() if p.config.optimizer == "rmsprop"] == [1e-3, 1e-2]
    import torch

    built = build_optimizer(torch.nn.Sequential(torch.nn.Linear(4, 4)), "rmsprop", lr=1e-3, alpha=0.9)
    assert isinstance(built, torch.optim.RMSprop) and built.defaults["alpha"] == 0.9
    monkeypatch.undo()
    for scale in scales():
        assert set(Protocol.load(scale).optimizers) <= set(OPTIMIZER_NAMES)
