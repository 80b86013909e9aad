"""Quantized models that are saved, loaded, copied and pickled give identical outputs, or are refused."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.quantizers import (
    QuantSpec,
    coverage,
    freeze_qat,
    load_quantized,
    prepare_qat,
    quantize_model,
    save_quantized,
)

CONFIG = Olmo2Config(vocab_size=32, width=16, depth=1, n_heads=2)
IDS = torch.arange(24).reshape(2, 12)


def model(seed: int = 0) -> Olmo2:
    torch.manual_seed(seed)
    return Olmo2(CONFIG)


def trained(scheme: str):
    qat = prepare_qat(model(), QuantSpec(), scheme)
    qat.loss(IDS, IDS).backward()
    torch.optim.SGD(qat.parameters(), 0.05).step()
    return qat


MADE = {
    "rtn": lambda: quantize_model(model(), QuantSpec()),
    "rotated mxfp4 with the head": lambda: quantize_model(model(), QuantSpec("nvfp4", "nvfp4", rotate=True, head=True)),
    "gptq": lambda: quantize_model(model(), QuantSpec(method="gptq"), calibration=IDS),
    **{f"{scheme}, training": lambda scheme=scheme: trained(scheme) for scheme in ("quest", "ste", "lsq")},
    **{f"{scheme}, frozen": lambda scheme=scheme: freeze_qat(trained(scheme)) for scheme in ("quest", "ste", "lsq")},
}


@pytest.mark.parametrize("name", list(MADE))
def test_round_trips(name, tmp_path):
    made = MADE[name]()
    y = made(IDS)
    loaded = load_quantized(model(1), save_quantized(made, tmp_path / "saved"))
    by_factory = load_quantized(lambda: model(2), str(tmp_path / "saved"))
    other = copy.deepcopy(made)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(made.state_dict())
    for one in (loaded, by_factory, other, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(one(IDS), y)
        assert coverage(one).equals(coverage(made)) and one.quantization == made.quantization
    assert (loaded.head.weight is loaded.embedding.weight) == (made.head.weight is made.embedding.weight)
    assert (
        json.loads((tmp_path / "saved/quantization.json").read_text())["spec"]["weights"]
        == made.quantization.spec.weights
    )


def test_transformers_models(tmp_path):
    tf = pytest.importorskip("transformers")
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "bos_token_id": 0}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "eos_token_id": 0}
    config = tf.MixtralConfig(**shape)
    quantized = quantize_model(tf.MixtralForCausalLM(config).eval(), QuantSpec())
    for part in (quantized, quantized.model, copy.deepcopy(quantized)):
        with pytest.raises(ValueError, match="random weights; valid: save_quantized"):
            part.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    loaded = load_quantized(tf.MixtralForCausalLM(config).eval(), save_quantized(quantized, tmp_path))
    assert torch.equal(loaded(IDS).logits, quantized(IDS).logits)
    with pytest.raises(ValueError, match="save_quantized"):
        loaded.save_pretrained(tmp_path / "no")
    # what trains keeps the names and the full-precision weights of the model: its files load
    qat = prepare_qat(tf.LlamaForCausalLM(tf.LlamaConfig(**shape)).eval(), QuantSpec())
    qat.save_pretrained(tmp_path / "qat")
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "qat")
    assert all(torch.equal(p, dict(again.named_parameters())[n]) for n, p in qat.named_parameters())


class Past(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.called(x) @ self.read.weight.T


@pytest.mark.filterwarnings("ignore")
def test_what_was_left_alone_is_loaded_as_such(tmp_path):
    x = torch.randn(3, 16)
    made = quantize_model(Past(), QuantSpec(), example=x)
    loaded = load_quantized(Past, save_quantized(made, tmp_path))
    assert torch.equal(loaded(x), made(x)) and loaded.quantization == made.quantization


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="Olmo2 has no record"):
        save_quantized(model(), tmp_path)
    with pytest.raises(ValueError, match=r"no quantized model at .*empty"):
        load_quantized(model(), tmp_path / "empty")
    folder = save_quantized(quantize_model(model(), QuantSpec()), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"does not fit Olmo2, saved: .*blocks\.1\."):
        load_quantized(Olmo2(Olmo2Config(vocab_size=32, width=16, depth=2, n_heads=2)), folder)
    with pytest.raises(ValueError, match=r"does not fit"):
        load_quantized(model().double(), folder)


class Kept(nn.LayerNorm):
    """Keeps something beside its parameters, as a calibrated layer does."""

    def __init__(self, kept):
        super().__init__(4)
        self.kept = kept

    def get_extra_state(self):
        return self.kept

    def set_extra_state(self, kept):
        self.kept = kept


def test_states_beside_parameters_are_written_or_refused(tmp_path):
    made = [quantize_model(nn.Sequential(nn.Linear(4, 4), Kept(x)), QuantSpec()) for x in (torch.ones(1), {"amax": 1})]
    folder = save_quantized(made[0], tmp_path / "tensor")
    assert load_quantized(nn.Sequential(nn.Linear(4, 4), Kept(torch.zeros(1))), folder)[1].kept == 1
    with pytest.raises(ValueError, match=r"no tensors: 1\._extra_state"):
        save_quantized(made[1], tmp_path / "other")
    assert not (tmp_path / "other").exists()
