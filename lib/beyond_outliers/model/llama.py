"""The second architecture: a pre-norm decoder in the style of Llama, for what holds beyond the paper's model.

Source: Touvron et al., arXiv 2302.13971, section 2.2. RMSNorm on each sublayer's INPUT and before the head; rotary
positions (base 10000, halves of a head as pairs); query-key products over sqrt(d_head), no QK-norm; SwiGLU MLP; no
biases; tied embedding and head. Initialisation as in the OLMo2 variant: matrices from N(0, 0.02), gains 1.
"""

from torch import Tensor, nn

from beyond_outliers.config.run import LlamaConfig as LlamaConfig
from beyond_outliers.model.decoder import Attention, Decoder, ResidualAdd, RMSNorm, Rotary


class Gating(nn.Module):
    """gate * values."""

    def forward(self, gate: Tensor, values: Tensor) -> Tensor:
        return gate * values


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_ratio * config.width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_ratio * config.width, bias=False)
        self.activation, self.gating = nn.SiLU(), Gating()
        self.down = nn.Linear(config.mlp_ratio * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gating(self.activation(self.gate(x)), self.up(x)))


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(
            config,
            Rotary(config.head_size, config.rope_base, interleaved=False),
            scale=config.head_size**-0.5,
        )
        self.attention_add = ResidualAdd()
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config)
        self.mlp_add = ResidualAdd()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_add(x, self.attention(self.attention_norm(x)))
        return self.mlp_add(x, self.mlp(self.mlp_norm(x)))


class Llama(Decoder):
    """`Llama(config)(ids)`: token ids (B, T) int64 -> logits (B, T, vocab_size); see `Decoder`."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config, PreNormBlock)
