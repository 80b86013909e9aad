"""The paper's sides: which sides of a parameter are preconditioned at 32,000 words, and in our studies in small.

The papers' constants leave the vocabulary side of the paper's embedding alone (SOAP), keep its diagonal (PSGD) or cut
it into three blocks (Shampoo). A study in small does the same where the thresholds of its scale file are scaled.
"""

import dataclasses

import pytest
import torch

from beyond_outliers.config import Protocol
from beyond_outliers.model import Olmo2
from beyond_outliers.optimizers import build_optimizer, parameter_groups

PAPER = {"soap": ("max_preconditioned_size", 10_000), "psgd": ("max_size_triangular", 8_192)}
PAPER |= {"shampoo": ("max_block_size", 12_288)}


@pytest.fixture(autouse=True)
def no_random_numbers(monkeypatch):
    """Shapes need none, and the first draw on the meta device loads torch's compiler for four seconds."""
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, **__: self)


def sides(name, model_config, threshold=None):
    """Parameter -> what the optimizer keeps for each of its sides, read off its state's shapes."""
    optimizer = optimizer_with(name, threshold)
    with torch.device("meta"):
        groups = parameter_groups(Olmo2(model_config))
    found = {}
    for group in groups:
        for parameter, p in group["params"]:
            shapes = optimizer.state_shapes({**optimizer.param_groups[0], "role": group["role"]}, p)
            kept = [_kept(shapes, side, size) for side, size in zip(("left", "right"), p.shape, strict=False)]
            found[parameter] = tuple(kept)
    return found


def optimizer_with(name, threshold):
    hyper = {} if threshold is None else {PAPER[name][0]: threshold}
    return build_optimizer(torch.nn.Linear(2, 2), name, 0.01, **hyper)


def _kept(shapes, side, size):
    """ "none", "diagonal", or the number of blocks whose factors are kept whole."""
    own = {shape for key, shape in shapes.items() if key.startswith(side) and not key.endswith("_basis")}
    own = {shape for shape in own if len(shape)}
    if not own:
        return "none"
    if any(len(shape) == 1 for shape in own):
        return "diagonal"
    return -(-size // max(shape[0] for shape in own))


def by_hand(name, size, threshold):
    """The rule of each paper for one side of a matrix."""
    whole = size <= threshold
    return {"soap": 1 if whole else "none", "psgd": 1 if whole else "diagonal", "shampoo": -(-size // threshold)}[name]


def of_the_paper(name):
    """The paper's shapes, two blocks of each; AdamW, Muon and Shampoo alone were trained at 500M and 1.5B."""
    protocol = Protocol.load("paper")
    assert protocol.corpus.vocab_size == 32_000 and len(protocol.sizes) == 6
    sizes = [size for size in protocol.sizes if name == "shampoo" or size not in ("500M", "1.5B")]
    return [dataclasses.replace(protocol.model(size), depth=2) for size in sizes]


def kinds(found):
    """The pattern of `sides`, where two blocks and more are one kind."""
    return {name: tuple(min(side, 2) if isinstance(side, int) else side for side in of) for name, of in found.items()}


@pytest.mark.parametrize("name", PAPER)
def test_scaled_thresholds_make_the_papers_sides(name):
    paper, *others = (sides(name, config) for config in of_the_paper(name))
    assert all(pattern == paper for pattern in others), "one pattern for all of the paper's sizes"
    expected = {"soap": "none", "psgd": "diagonal", "shampoo": 3}[name]
    assert paper["embedding.weight"] == (expected, 1)
    assert {kept for n, kept in paper.items() if len(kept) == 2 and n != "embedding.weight"} == {(1, 1)}
    for scale in ("confirm2", "smoke"):
        protocol = Protocol.load(scale)
        threshold = protocol.settings.hyper[name][PAPER[name][0]]
        for size in protocol.sizes:
            config = dataclasses.replace(protocol.model(size), depth=2)
            found = sides(name, config, threshold)
            assert kinds(found) == kinds(paper), (scale, size)
            assert found == paper or scale == "smoke", "in as many blocks; smoke has too few words for three"
            assert sides(name, config)["embedding.weight"] == (1, 1), "as `confirm` had it: the whole vocabulary side"


@pytest.mark.parametrize("name", PAPER)
def test_the_rule_of_a_side_is_that_of_its_paper(name):
    """Sizes about the threshold, in both places of a matrix, from the class and by hand."""
    key, constant = PAPER[name]
    p = torch.empty(5, 7, device="meta", requires_grad=True)
    assert optimizer_with(name, None).param_groups[0][key] == constant
    for threshold in (4, 5, 6, 7, 40):
        optimizer = optimizer_with(name, threshold)
        shapes = optimizer.state_shapes({**optimizer.param_groups[0], "role": "matrix"}, p)
        kept = [_kept(shapes, side, size) for side, size in (("left", 5), ("right", 7))]
        assert kept == [by_hand(name, size, threshold) for size in (5, 7)], threshold
