"""The study's transformer: an OLMo2 variant.

Paper: arXiv 2509.23500, section 3 (set-up); the details that its text leaves open follow the author's training code:
no biases; rotary positions (base 1024, interleaved pairs); L2-normalised queries and keys with one learned scale a
head in place of 1/sqrt(d_head); RMSNorm on each sublayer's OUTPUT, before the residual add; squared-ReLU MLP of
expansion 4; tied embedding and head; every matrix drawn from N(0, 0.02), every gain 1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond_outliers.config.run import Olmo2Config as Olmo2Config
from beyond_outliers.model.decoder import Attention, Decoder, ResidualAdd, RMSNorm, Rotary


class ReluSquared(nn.Module):
    """max(x, 0)^2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class QKNorm(nn.Module):
    """L2-normalises queries and keys per head; queries are then scaled by one learned number a head.

    The scale starts at sqrt(head_size) and stands in place of the usual 1/sqrt(head_size).
    """

    def __init__(self, n_heads: int, head_size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.full((n_heads,), math.sqrt(head_size)))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:  # (B, H, T, head_size), (B, KV, T, head_size)
        return _unit(q) * self.scale.to(q.dtype)[:, None, None], _unit(k)


def _unit(x: Tensor) -> Tensor:
    """x over its L2 norm, taken in float32 at least: the smallest norm, 1e-12, is 0 in half precision."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1).to(x.dtype)


class MLP(nn.Module):
    """down(relu(up(x))^2), not gated."""

    def __init__(self, config: Olmo2Config):
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_ratio * config.width, bias=False)
        self.activation = ReluSquared()
        self.down = nn.Linear(config.mlp_ratio * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(self, config: Olmo2Config):
        super().__init__()
        self.attention = Attention(
            config,
            Rotary(config.head_size, config.rope_base, interleaved=True),
            scale=1.0,
            qk_norm=QKNorm(config.n_heads, config.head_size),
        )
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention_add = ResidualAdd()
        self.mlp = MLP(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp_add = ResidualAdd()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_add(x, self.attention_norm(self.attention(x)))
        return self.mlp_add(x, self.mlp_norm(self.mlp(x)))


class Olmo2(Decoder):
    """`Olmo2(config)(ids)`: token ids (B, T) int64 -> logits (B, T, vocab_size); see `Decoder`."""

    def __init__(self, config: Olmo2Config):
        super().__init__(config, Block)
