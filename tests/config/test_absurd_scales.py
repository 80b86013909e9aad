"""Scale files that no one can mean: each is refused, by file and key, before anything is fetched or trained."""

import math

import pytest

from beyond_outliers import paths
from beyond_outliers.study import Study
from scale_files import WHOLE, toml, with_value

TINY = ("sizes", "tiny")
ABSURD = [
    # names that leave their folder, hide, become options or commands, or that no disk holds
    *[("sizes", name) for name in ("../../x", "tiny||touch PWNED||", "$(reboot)", "a b", "-rf", "..", "größe")],
    ("sizes", "x" * 65),
    *[(("plan", "qat", "scheme"), name) for name in ("../../x", "quest; touch PWNED", "", "quest\nste")],
    (("plan", "schemes", "schemes"), ["ste", "../lsq"]),
    (("plan", "schemes", "optimizers"), ["../adamw"]),
    # text that is not there
    *[(("corpus", "source"), source) for source in ("", " ", "..", "/no/such/file.txt", "embedded\0", "embeded")],
    (("corpus", "wheels"), ["../../x"]),
    (("corpus", "limit_mb"), 1e-9),
    (("corpus", "validation_share"), 0.999),
    (("corpus", "vocab_size"), 257),
    # numbers that are none, or that nothing holds
    *[((*TINY, "init_std"), value) for value in (0, -0.02, math.nan, 10**400)],
    *[((*TINY, key), 2**30) for key in ("width", "depth", "n_heads", "n_kv_heads", "mlp_ratio", "rope_base")],
    ((*TINY, "norm_eps"), -1e-6),
    ((*TINY, "width"), 33),
    ((*TINY, "n_heads"), 16.0),
    ((*TINY,), {"width": 2**16, "depth": 1000, "n_heads": 2}),
    # trainings of no step, of fewer steps than evaluations, without end, or judged on nothing
    *[(("training", "tokens_per_parameter"), value) for value in (1e-300, 0.001, 1e6, math.inf)],
    (("training", "batch_size"), 2**20),
    (("training", "context"), 2**20),
    (("training", "evaluations"), 40.5),
    (("training", "validation_tokens"), 1),
    (("training", "warmup"), 1.5),
    (("training", "clip"), 0),
    (("threads",), 10**9),
    # rates and hyperparameters
    *[(("learning_rates", "adamw"), grid) for grid in ([1e-300, 1e-3], [-1e-3, 1e-3], [1e-3, 1e4], [1e-3, math.nan])],
    (("learning_rates", "../muon"), [1e-3, 1e-2]),
    *[(("hyper", "muon", "ns_steps"), value) for value in (2**30, 2.5, True, 0, "5")],
    *[(("hyper", "muon", "adamw_eps"), value) for value in (-1, 2**30, "small")],
    (("hyper", "muon", "nesterov"), 3),
    (("hyper", "muon", "ns_dtype"), "bfloat16"),
    (("hyper", "muon", "adamw_betas"), [0.9, 1e300]),
    (("hyper", "soap", "frequency"), 1e300),
    (("hyper", "shampoo", "eps"), 1e300),
    (("hyper", "psgd", "update_probability"), True),
    (("hyper", "psgd", "seed"), "one"),
    (("hyper", "scion", "embedding_lr"), True),
    (("hyper", "scion", "learning_rate"), 0.1),
    # seeds, measurements
    (("plan", "sweep", "seeds"), [2**30]),
    (("measure", "questions"), 0),
    (("measure", "formats"), ["int4; touch PWNED"]),
    (("measure", "primary"), "../W4A4"),
]


@pytest.mark.parametrize(("path", "value"), ABSURD, ids=lambda part: repr(part)[:60])
def test_an_absurd_scale_file_is_refused(tmp_path, monkeypatch, path, value):
    monkeypatch.setattr(paths, "SCALES", tmp_path)
    table = WHOLE["swept"]
    if path == "sizes":  # a name
        table = with_value(table, ("sizes", value), table["sizes"]["small"])
    else:
        section = path[:2] if path[0] == "hyper" and path[1] not in table["hyper"] else path
        table = with_value(table, section, {path[2]: value} if section != path else value)
    (tmp_path / "own.toml").write_text(toml(table), encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.toml: ") as refused:
        Study("own").check()
    key = path if path == "sizes" else path[-1] if path[0] in ("hyper", "corpus") else path[0]
    assert key in str(refused.value) or path[0] in ("training", "learning_rates"), refused.value


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"threads = 1\nthreads = 1\n",
        b"threads = " + b"[" * 100_000,
        b"threads = " + b"9" * 5000,
        b"a = 1979-05-27",
        b"\x00",
        b"threads = 1\n[corpus]\n" * 2,
    ],
)
def test_what_is_no_scale_file_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.setattr(paths, "SCALES", tmp_path)
    (tmp_path / "own.toml").write_bytes(text)
    with pytest.raises(ValueError, match=r"own\.toml: "):
        Study("own")


def test_sizes_stand_in_order_and_differ_in_more_than_case(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SCALES", tmp_path)
    table, sizes = WHOLE["swept"], WHOLE["swept"]["sizes"]
    turned = {name: sizes[name] for name in reversed(sizes)}
    alike = {**sizes, "SMALL": sizes["small"]}
    for wrong, said in ((turned, "smallest size first"), (alike, "differ in case alone"), ({}, "no size")):
        (tmp_path / "own.toml").write_text(toml(with_value(table, ("sizes",), wrong)))
        with pytest.raises(ValueError, match=said):
            Study("own")
