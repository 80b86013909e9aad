"""What the study's two decoders share: normalisation, rotary positions, attention, the tied head and its loss.

Every step is a module of its own, residual adds and the attention mixing too, so that `propagation.decompose` can watch
it. `model` and `llama` put these parts together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beyond_outliers.config.run import ModelConfig
from beyond_outliers.model.loss import cross_entropy, linear_cross_entropy
from beyond_outliers.passes import made_once


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


_ROTARY_TABLES: dict = {}


def rotary_tables(length: int, head_size: int, base: float, device: torch.device, dtype: torch.dtype):
    """cos and sin of position * base^(-2i / head_size), each (length, head_size / 2), the angles taken in float64."""

    def make() -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size
        angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * base**-exponents
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)

    return made_once(_ROTARY_TABLES, (length, head_size, base, device, dtype), make)


# Traced, the float64 cosines would be taken anew for every element of a batch. This is torch.compiler's
# assume_constant_result, which would import the compiler into every process: a second that most of them never need.
rotary_tables._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Rotary(nn.Module):
    """Rotates pairs (x_a, x_b) of every head by position * base^(-2i / head_size), i counting the pairs from 0.

    interleaved: pair i is (x_2i, x_2i+1); otherwise, as in Llama, (x_i, x_i+head_size/2).
    """

    def __init__(self, head_size: int, base: float, interleaved: bool):
        super().__init__()
        self.head_size, self.base, self.interleaved = head_size, base, interleaved

    def forward(self, x: Tensor) -> Tensor:  # (B, H, T, head_size)
        return self.turn(x, *rotary_tables(x.shape[-2], self.head_size, self.base, x.device, x.dtype))

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, T, head_size) by angles of shapes that broadcast with its pairs, (..., T, head_size / 2)."""
        if self.interleaved:
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1)


class Scores(nn.Module):
    """Query-key products times `scale`, (B, H, T, T), future positions at -inf."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        return (q @ k.transpose(-1, -2) * self.scale).masked_fill(future, float("-inf"))


class Softmax(nn.Module):
    """softmax over the last dimension."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


class Mix(nn.Module):
    """Probabilities times values."""

    def forward(self, probabilities: Tensor, v: Tensor) -> Tensor:
        return probabilities @ v


class AttentionMix(nn.Module):
    """Causal softmax(scale q k^T) v, (B, H, T, head_size); key/value heads are shared by groups of query heads.

    One fused call by default. With `opened = True` the same function runs as three visible modules (scores, softmax,
    mixing), which is what the finest granularity of `propagation.decompose` asks for.
    """

    def __init__(self, scale: float):
        super().__init__()
        self.scores, self.softmax, self.mix = Scores(scale), Softmax(), Mix()
        self.opened = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if self.opened:
            return self.mix(self.softmax(self.scores(q, k)), v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scores.scale)


class Attention(nn.Module):
    """q, k, v projections; rotary positions; QK-norm, if any; mixing; output projection. (B, T, width) -> the same.

    scale: factor of the query-key products. qk_norm: module from (q, k) to (q, k), None for none.
    """

    def __init__(self, config: ModelConfig, rotary: Rotary, scale: float, qk_norm: nn.Module | None = None):
        super().__init__()
        self.head_size = config.head_size
        kv_width = config.kv_heads * config.head_size
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, kv_width, bias=False)
        self.v = nn.Linear(config.width, kv_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.rotary, self.qk_norm = rotary, qk_norm
        self.mixing = AttentionMix(scale)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        q, k = self.rotary(q), self.rotary(k)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        return self.out(self.mixing(q, k, v).transpose(1, 2).flatten(-2))


class Decoder(nn.Module):
    """`Decoder(config, Block)(ids)`: token ids (B, T) int64 -> logits (B, T, vocab_size) in the model's dtype.

    Embedding, `depth` blocks made by `block(config)`, final norm, head. `head` is a bias-free nn.Linear whose weight IS
    the embedding's: a linear layer like the others, so that a `QuantSpec` can include it or leave it alone.
    Every matrix is drawn from N(0, init_std).

    With `recompute = True` (activation checkpointing) a training pass keeps each block's input alone and computes the
    block again on the way back: the same gradients, bit by bit, for less memory and a third more operations.
    """

    recompute = False

    def __init__(self, config: ModelConfig, block: type[nn.Module]):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
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
            if self.recompute and torch.is_grad_enabled():  # no block draws random numbers, so none are kept
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
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
