"""The study's transformer: an OLMo2 variant, every step of it a module of its own.

Paper: arXiv 2509.23500, section 3 (set-up); the details that its text leaves open follow the author's training code:
no biases; rotary positions (base 1024, interleaved pairs); L2-normalised queries and keys with one learned scale a
head in place of 1/sqrt(d_head); RMSNorm on each sublayer's OUTPUT, before the residual add; squared-ReLU MLP of
expansion 4; tied embedding and head; every matrix drawn from N(0, 0.02), every gain 1.

Residual adds, the activation and the attention mixing are modules so that `propagation.decompose` can watch them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond_outliers.config.run import Olmo2Config as Olmo2Config
from beyond_outliers.cross_entropy import cross_entropy, linear_cross_entropy


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension, the mean square taken in float32 (float64 for float64 input)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.gain).to(x.dtype)


class ResidualAdd(nn.Module):
    """stream + update."""

    def forward(self, stream: Tensor, update: Tensor) -> Tensor:
        return stream + update


class ReluSquared(nn.Module):
    """max(x, 0)^2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


_ROTARY_TABLES: dict = {}


@torch.compiler.assume_constant_result  # traced, the float64 cosines would be taken anew for every element of a batch
def rotary_tables(length: int, head_size: int, base: float, device: torch.device, dtype: torch.dtype):
    """cos and sin of position * base^(-2i / head_size), each (length, head_size / 2), the angles taken in float64."""
    key = (length, head_size, base, device, dtype)
    if key not in _ROTARY_TABLES:
        exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
        angles = torch.arange(length, dtype=torch.float64)[:, None] * base**-exponents
        _ROTARY_TABLES[key] = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    return _ROTARY_TABLES[key]


class Rotary(nn.Module):
    """Rotates the interleaved pairs (x_0, x_1), (x_2, x_3), ... of every head by position * base^(-2i / head_size)."""

    def __init__(self, head_size: int, base: float):
        super().__init__()
        self.head_size, self.base = head_size, base

    def forward(self, x: Tensor) -> Tensor:  # (B, H, T, head_size)
        cos, sin = rotary_tables(x.shape[-2], self.head_size, self.base, x.device, x.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class QKNorm(nn.Module):
    """L2-normalises queries and keys per head; queries are then scaled by one learned number a head.

    The scale starts at sqrt(head_size) and stands in place of the usual 1/sqrt(head_size).
    """

    def __init__(self, n_heads: int, head_size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.full((n_heads,), math.sqrt(head_size)))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:  # (B, H, T, head_size), (B, KV, T, head_size)
        q = F.normalize(q, dim=-1) * self.scale.to(q.dtype)[:, None, None]
        return q, F.normalize(k, dim=-1)


class Scores(nn.Module):
    """Query-key products (B, H, T, T), future positions at -inf."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        return (q @ k.transpose(-1, -2)).masked_fill(future, float("-inf"))


class Softmax(nn.Module):
    """softmax over the last dimension."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


class Mix(nn.Module):
    """Probabilities times values."""

    def forward(self, probabilities: Tensor, v: Tensor) -> Tensor:
        return probabilities @ v


class AttentionMix(nn.Module):
    """Causal softmax(q k^T) v, (B, H, T, head_size); key/value heads are shared by groups of query heads.

    One fused call by default. With `opened = True` the same function runs as three visible modules (scores, softmax,
    mixing), which is what the finest granularity of `propagation.decompose` asks for.
    """

    def __init__(self):
        super().__init__()
        self.scores, self.softmax, self.mix = Scores(), Softmax(), Mix()
        self.opened = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if self.opened:
            return self.mix(self.softmax(self.scores(q, k)), v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


class Attention(nn.Module):
    """q, k, v projections; rotary positions; QK-norm; mixing; output projection. (B, T, width) -> (B, T, width)."""

    def __init__(self, config: Olmo2Config):
        super().__init__()
        self.head_size = config.head_size
        kv_width = config.n_kv_heads * config.head_size
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, kv_width, bias=False)
        self.v = nn.Linear(config.width, kv_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.rotary = Rotary(config.head_size, config.rope_base)
        self.qk_norm = QKNorm(config.n_heads, config.head_size)
        self.mixing = AttentionMix()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        q, k = self.qk_norm(self.rotary(q), self.rotary(k))
        return self.out(self.mixing(q, k, v).transpose(1, 2).flatten(-2))


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
        self.attention = Attention(config)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention_add = ResidualAdd()
        self.mlp = MLP(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp_add = ResidualAdd()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_add(x, self.attention_norm(self.attention(x)))
        return self.mlp_add(x, self.mlp_norm(self.mlp(x)))


class Olmo2(nn.Module):
    """`Olmo2(config)(ids)`: token ids (B, T) int64 -> logits (B, T, vocab_size) in the model's dtype.

    `head` is a bias-free nn.Linear whose weight IS the embedding's: a linear layer like the others, so that a
    `QuantSpec` can include it or leave it alone.
    """

    def __init__(self, config: Olmo2Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.init_std)
        self.head.weight = self.embedding.weight

    def hidden(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> what the head reads, (B, T, width)."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token cross-entropy in nats; `ids` and `targets` (B, T) int64."""
        return self.head_loss(self.hidden(ids), targets)

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`loss` from what `hidden` returned, (B, T, width)."""
        if type(self.head) is nn.Linear:
            return linear_cross_entropy(hidden, self.head.weight, targets)
        return cross_entropy(self.head(hidden), targets)
