"""Heads, whatever they are called; layers that only look linear."""

import pytest
import torch
from torch import nn

from beyond_outliers.anymodel.linears import computes_linear
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.modules import HEAD_NAMES, evaluating, find_head, is_linear
from beyond_outliers.optimizers.groups import parameter_groups


class Network(nn.Module):
    def __init__(self, head: str, entries: int = 48):
        super().__init__()
        self.table = nn.Embedding(entries, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"output": nn.Linear(16, 16), "score": nn.Linear(16, 16)}) for _ in "ab"
        )
        if head:
            self.add_module(head, nn.Linear(16, 48, bias=False))


@pytest.mark.parametrize("name", [*HEAD_NAMES, "to_logits"])
def test_untied_heads(name):
    model = Network(name)
    assert find_head(model) == name
    roles = {n: group["role"] for group in parameter_groups(model) for n, _ in group["params"]}
    assert roles.pop(f"{name}.weight") == roles.pop("table.weight") == "embedding"
    assert {role for n, role in roles.items() if n.endswith("weight")} == {"matrix"}


def test_no_head():
    assert find_head(Network("")) is None  # output and score of the blocks are hidden layers
    assert find_head(Network("projection", entries=50)) is None
    assert find_head(nn.Linear(4, 4)) is None


def test_roles_of_this_projects_model():
    model = Olmo2(Olmo2Config(vocab_size=32, width=16, depth=1, n_heads=2))
    names = {group["role"]: [n for n, _ in group["params"]] for group in parameter_groups(model)}
    assert names["embedding"] == ["embedding.weight"] and len(names["matrix"]) == 6
    assert find_head(model) == "head"


def test_declared_heads():
    tf = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    assert find_head(tf.BertForMaskedLM(tf.BertConfig(**shape))) == "cls.predictions.decoder"
    neox = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**shape, tie_word_embeddings=False))
    assert (
        isinstance(neox.get_submodule(find_head(neox)), nn.Linear) and neox.get_output_embeddings().out_features == 40
    )
    assert neox.get_submodule(find_head(neox)) is neox.get_output_embeddings()
    assert find_head(tf.LlamaForSequenceClassification(tf.LlamaConfig(**shape, num_labels=3))) == "score"
    assert find_head(tf.BertModel(tf.BertConfig(**shape))) is None


class Matmul(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-3, 3)


class Dropped(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Gated(nn.Linear):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.gate


def test_what_computes_a_linear_layer():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert computes_linear(nn.Linear(8, 8)) and computes_linear(Matmul(8, 8).half()) and is_linear(Matmul(8, 8))
    torch.set_rng_state(state)
    for kind in (Clamped, Dropped, Gated):
        layer = kind(8, 8)
        assert not computes_linear(layer) and not is_linear(layer) and layer.training
    patched = nn.Linear(8, 8)
    patched.forward = lambda x: nn.Linear.forward(patched, x) * 2
    assert not computes_linear(patched)
    layer = Dropped(8, 8)
    state = torch.get_rng_state()
    computes_linear(layer)
    assert torch.equal(torch.get_rng_state(), state)


def test_fused_kernels_are_off_only_inside():
    assert torch.backends.mha.get_fastpath_enabled()
    with evaluating(nn.Linear(2, 2)):
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
