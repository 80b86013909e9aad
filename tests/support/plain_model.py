"""The study's decoder as one would first write it in torch.nn: what benchmarks compare with."""

import torch
import torch.nn.functional as F
from torch import nn

from beyond_outliers.config import Olmo2Config

CONTEXT = 128


class PlainBlock(nn.Module):
    """The study's block as one would first write it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), (width // heads) ** 0.5))

    def forward(self, x, cos, sin):
        def heads(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def rotate(y):
            even, odd = y[..., 0::2], y[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

        q, k = (F.normalize(rotate(heads(project(x))), dim=-1) for project in (self.q, self.k))
        mixed = F.scaled_dot_product_attention(q * self.scale, k, heads(self.v(x)), is_causal=True, scale=1.0)
        x = x + self.norm1(self.out(mixed.transpose(1, 2).flatten(-2)))
        return x + self.norm2(self.down(F.relu(self.up(x)).square()))


class PlainModel(nn.Module):
    def __init__(self, config: Olmo2Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(PlainBlock(config.width, config.n_heads) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        pairs = torch.arange(0, config.head_size, 2) / config.head_size
        angles = torch.arange(CONTEXT)[:, None] * config.rope_base**-pairs
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def loss(self, ids, targets):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.norm(x) @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
