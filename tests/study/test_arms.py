"""Arms of a scale: files of their own, the rates of the scale, runs that differ by what they say."""

import tomllib

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.claims import verdicts
from beyond_outliers.study import Study
from checkouts import made, tiny_study
from scale_files import toml

VARIANTS = [
    {"label": "as it is"},
    {"label": "auxiliary x4", "auxiliary": 4.0},
    {"label": "decay 1", "decay": 1.0},
    {"label": "centred", "hyper": {"centred_embedding": True}},
]
CHOSEN = {"lr": 4e-3, "auxiliary": 2e-3}


@pytest.fixture
def study(tmp_path, monkeypatch, text_file):
    for name in ("SCALES", "RESULTS", "RUNS"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
        (tmp_path / name.lower()).mkdir()
    table = tomllib.loads(tiny_study(text_file, full_precision=[0]))
    del table["learning_rates"], table["plan"]["sweep"]
    table["tuning"] = {"seeds": [7], "factor": 2, "tolerance": 0.1, "start": {"adamw": CHOSEN}}
    (paths.SCALES / "own.toml").write_text(toml(table))
    plan = {"full_precision": {"sizes": ["tiny"], "seeds": [1, 2], "variants": VARIANTS}}
    (paths.SCALES / "own").mkdir()
    (paths.SCALES / "own" / "recipes.toml").write_text(toml({"plan": plan, "measure": {"common_by_seed": True}}))
    own = paths.own_results("own")
    own.mkdir(parents=True)
    pd.DataFrame([{"size": "tiny", "optimizer": "adamw", **CHOSEN}]).to_csv(own / "learning_rates.csv", index=False)
    return Study("own+recipes")


def test_an_arm_is_a_study_whose_runs_differ_by_what_its_file_says(study):
    planned = {(p.variant, p.config.seed): p.config for p in study.planned()}
    assert set(planned) == {(of["label"], seed) for of in VARIANTS for seed in (1, 2)}
    assert {config.lr for config in planned.values()} == {4e-3}
    assert (
        planned["auxiliary x4", 1].hyper["embedding_lr"] == 8e-3 and planned["as it is", 1].hyper["vector_lr"] == 2e-3
    )
    decayed = planned["decay 1", 1]
    each = (decayed.lr, decayed.weight_decay), (decayed.hyper["embedding_lr"], decayed.hyper["embedding_decay"])
    assert [lr * decay * decayed.steps for lr, decay in each] == pytest.approx([1, 1], rel=1e-5)
    made(study)
    runs = study.table("runs")
    assert sorted(runs.variant) == sorted([of["label"] for of in VARIANTS] * 2) and runs.val_loss.nunique() == len(runs)
    table = {p.variant: study.result(p).load_model().embedding.weight for p in study.planned()}
    assert table["centred"].mean(0).abs().max() < 1e-7 < table["as it is"].mean(0).abs().max()
    common = study.table("common_loss")
    assert len(common) == len(runs) and common.groupby("seed").common_loss.nunique().eq(1).all()
    recipes = verdicts.READ["recipes"](Study("own"))
    assert set(recipes.optimizer) == {f"adamw, {of['label']}" for of in VARIANTS} and recipes.increase.notna().any()
