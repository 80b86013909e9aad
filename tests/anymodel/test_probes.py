"""Several checkpoints at once: a row each as `probe` alone gives it, refusals in their rows, and the estimate."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from beyond_outliers import plots
from beyond_outliers.anymodel import probes
from beyond_outliers.anymodel.probes import probe_all, step_of
from beyond_outliers.model import olmo2 as model_module
from beyond_outliers.probe import load, probe, windows
from beyond_outliers.quantizers import QuantSpec, quantize_model
from rounded_models import squared_error

tf = pytest.importorskip("transformers")
TEXT = Path(model_module.__file__)
SETTINGS = {"context": 32, "sequences": 6, "batch_size": 4}
GPTQ = QuantSpec(method="gptq")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer):
    """Three checkpoints of one small Llama; the folders end with their step."""
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = tf.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)
    folder, made = tmp_path_factory.mktemp("run"), []
    for step in (100, 200, 1000):
        torch.manual_seed(step)
        tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"checkpoint-{step}")
        tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / f"checkpoint-{step}")
        made.append(folder / f"checkpoint-{step}")
    return made


def test_a_row_is_what_the_checkpoint_alone_gives(checkpoints):
    found = probe_all(checkpoints, TEXT, progress=False, **SETTINGS)
    assert list(found.table.model) == [folder.name for folder in checkpoints]
    assert list(found.table.step) == [100, 200, 1000] and (found.table.spec == "W4A4").all()
    for folder, (_, row), one in zip(checkpoints, found.table.iterrows(), found.found, strict=True):
        alone = probe(folder, TEXT, **SETTINGS)
        for name, value in alone.summary().items():
            assert row[name] == pytest.approx(value, rel=1e-12)
        assert row.share == alone.quantization.share and row.reason == "" and one.name == folder.name
    assert found.table.R_L.nunique() == 3


def test_gptq_calibrates_on_the_text_behind_what_is_measured(checkpoints):
    found = probe_all(checkpoints[:1], TEXT, [QuantSpec(), GPTQ], progress=False, calibration=10, **SETTINGS)
    assert list(found.table.spec) == ["W4A4", "W4A4+gptq"]
    model, own = load(checkpoints[0])
    ids = windows(own, TEXT.read_text(), 32, 16)
    quantized = quantize_model(model, GPTQ, calibration=ids[6:].split(4))
    assert found.table.R_L[1] == pytest.approx(squared_error(model, quantized, ids[:6]), rel=1e-5)
    assert found.table.R_L[1] != found.table.R_L[0]


def test_without_text_to_calibrate_on_it_is_refused(tmp_path, checkpoints):
    short = tmp_path / "short.txt"
    short.write_text("abcdefgh" * 24)  # six windows of 32 bytes
    assert probe(checkpoints[0], short, **SETTINGS).readings.n.iloc[0] == 6
    with pytest.raises(ValueError, match="6 windows, 6 to measure: none is left to calibrate on"):
        probe(checkpoints[0], short, GPTQ, **SETTINGS)


def test_a_checkpoint_that_cannot_be_probed_keeps_its_row(checkpoints, tmp_path):
    with pytest.warns(UserWarning, match="not probed: nowhere W4A4: no model folder"):
        found = probe_all([checkpoints[0], tmp_path / "nowhere"], TEXT, progress=False, **SETTINGS)
    assert len(found.table) == 2 and len(found.found) == 1
    assert np.isnan(found.table.R_L[1]) and "no model folder" in found.table.reason[1]
    with pytest.raises(ValueError, match="no model could be probed: nowhere W4A4: no model folder"):
        probe_all([tmp_path / "nowhere"], TEXT, progress=False, **SETTINGS)
    with pytest.raises(ValueError, match="there is no model"):
        probe_all([], TEXT)


@pytest.mark.parametrize(
    "name, step",
    [
        *[("run@step1000", 1000), ("checkpoint-200", 200), ("iter_30", 30), ("pythia@143000", 143000), ("a-77", 77)],
        *[("gpt2", None), ("Llama-3.2-1B", None), ("opt-125m", None)],
    ],
)
def test_steps_are_read_off_names(name, step):
    assert step_of(name) == step


def test_revisions_are_fetched_by_name(monkeypatch):
    asked = []

    def get_config_dict(name, revision):
        asked.append((name, revision))
        raise OSError("404\nmore")

    monkeypatch.setattr(tf.PretrainedConfig, "get_config_dict", get_config_dict)
    with pytest.raises(ValueError, match=r"cannot load 'org/model@gone': .* \(404\)"):
        load("org/model@gone")
    assert asked == [("org/model", "gone")]


def test_curves_stand_at_the_steps_where_all_have_one():
    rows = [(f"c-{s}" if s else "plain", s, spec, "", 0.1, 0.08, 0.13, 5.0, 9.0) for s in (100, 1000) for spec in "ab"]
    columns = ["model", "step", "spec", "reason", "R_L", "R_L_low", "R_L_high", "mmr", "kurtosis"]
    table = pd.DataFrame([*rows, ("c-5", 5, "a", "too short", *[np.nan] * 5)], columns=columns)
    figure = plots.checkpoint_curves(table)
    assert list(figure.axes[0].lines[0].get_xdata()) == [100, 1000]
    assert "training step" in {ax.get_xlabel() for ax in figure.axes} and len(figure.axes[1].lines) == 2
    table.loc[table.model == "c-100", "step"] = None
    labels = plots.checkpoint_curves(table).axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["c-100", "c-1000"]
    plt.close("all")


def test_models_are_told_apart_by_as_little_of_their_paths_as_it_takes():
    assert probes.short_names(["/a/gpt2", "org/muon@step1", torch.nn.Linear(1, 1)]) == ["gpt2", "muon@step1", "Linear"]
    assert probes.short_names(["/runs/adamw/last", "/runs/muon/last/"]) == ["adamw/last", "muon/last"]
