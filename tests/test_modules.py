"""Walking a model."""

from torch import nn

from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.modules import find_head


class Untied(nn.Module):
    """An untied lm_head after another linear layer."""

    def __init__(self):
        super().__init__()
        self.rest, self.lm_head = nn.Linear(8, 4), nn.Linear(4, 3)


def test_find_head():
    model = Olmo2(Olmo2Config(vocab_size=96, width=64, depth=2, n_heads=4))
    assert find_head(model) == "head" and find_head(Untied()) == "lm_head" and find_head(nn.Linear(2, 2)) is None
