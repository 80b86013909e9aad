"""Layers that hide linear layers, put in terms of nn.Linear: the same function in full precision, and then quantizable.

GPT-2's Conv1D stores its weight transposed. torch's MultiheadAttention reads the weights of four projections without
calling a layer, and TransformerEncoderLayer has a fused kernel that reads those of all its layers.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond_outliers.anymodel.linears import overrides_forward
from beyond_outliers.modules import is_conv1d, substitute


def open_layers(model: nn.Module) -> nn.Module:
    """Replaces Conv1D and MultiheadAttention, in place, by modules that call nn.Linear; returns the model.

    Encoder layers of torch lose their fused kernel. Attention whose weights are parametrized or whose class has a
    forward of its own stays as it is.
    """
    made: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if is_conv1d(module):  # of GPT-2, its weight is (in, out)
            made[module] = _linear(cast(Tensor, module.weight).T, cast(Tensor, module.bias)).train(module.training)
        elif isinstance(module, nn.MultiheadAttention) and _can_open(module):
            made[module] = OpenAttention(module)
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its forward asks for 1 or 2 before it takes the kernel
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return substitute(model, made)


def _can_open(attention: nn.MultiheadAttention) -> bool:
    plain = type(attention.out_proj).forward is nn.Linear.forward and "weight" in attention.out_proj._parameters
    stored = attention._parameters.get("in_proj_weight", None) is not None or not attention._qkv_same_embed_dim
    parametrized = nn.utils.parametrize.is_parametrized(attention)
    return plain and stored and not parametrized and not overrides_forward(attention, nn.MultiheadAttention)


class OpenAttention(nn.Module):
    """nn.MultiheadAttention with its four projections as layers q_proj, k_proj, v_proj, out_proj; the same interface.

    Nested tensors are refused with a ValueError.
    """

    # as in nn.MultiheadAttention
    embed_dim: Any
    num_heads: Any
    dropout: Any
    batch_first: Any
    bias_k: Any
    bias_v: Any
    add_zero_attn: Any
    # nn.Linear until they are quantized
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    # what nn.TransformerEncoder and its layers look at before they take their fused kernels
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        for name in ("embed_dim", "num_heads", "dropout", "batch_first", "bias_k", "bias_v", "add_zero_attn"):
            setattr(self, name, getattr(attention, name))
        if attention._qkv_same_embed_dim:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        bias = attention.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        for name, weight, part in zip("qkv", weights, biases, strict=True):
            self.add_module(f"{name}_proj", _linear(weight, part))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: (T, B, width), (B, T, width) with `batch_first`, or (T, width)."""
        if query.is_nested:
            raise ValueError(
                "attention under quantization takes no nested tensors; valid: a padded batch with its mask"
            )
        by_batch = self.batch_first and query.dim() == 3
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (x.transpose(0, 1) if by_batch else x for x in (q, k, v))
        one = torch.eye(self.embed_dim, dtype=q.dtype, device=q.device)  # the projections stand outside
        y, weights = F.multi_head_attention_forward(
            *(q, k, v, self.embed_dim, self.num_heads, None, None, self.bias_k, self.bias_v, self.add_zero_attn),
            *(self.dropout, one, None, self.training, key_padding_mask, need_weights, attn_mask),
            use_separate_proj_weight=True,
            q_proj_weight=one,
            k_proj_weight=one,
            v_proj_weight=one,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return self.out_proj(y.transpose(0, 1) if by_batch else y), weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of copies of `weight` (out, in) and `bias`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = _copied(weight)
    linear.bias = None if bias is None else _copied(bias)  # type: ignore[assignment]  # torch's annotation forgets it
    return linear


def _copied(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach().clone(memory_format=torch.contiguous_format), requires_grad=x.requires_grad)
