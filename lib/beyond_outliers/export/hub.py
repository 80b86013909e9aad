"""The study's decoders as a model of `transformers`: the code that travels in an exported folder.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs it. The layers are the study's own files,
copied beside this one; what is added is a key/value cache, padding masks, and layers that multiply by rounded weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from beyond_outliers.config.run import LlamaConfig, model_config
from beyond_outliers.model.decoder import AttentionMix, Decoder, Rotary, rotary_tables
from beyond_outliers.model.llama import Llama
from beyond_outliers.model.olmo2 import Olmo2
from beyond_outliers.quantizers.formats import quantize_tensor
from beyond_outliers.quantizers.hadamard import hadamard_transform
from beyond_outliers.quantizers.spec import QuantSpec


class BeyondOutliersConfig(PretrainedConfig):
    """`shape`: the fields of a `ModelConfig`, its architecture among them. `context`: tokens a training sequence.

    quantization: fields of a `QuantSpec`, None in full precision. rotations: rounded layer -> size of the Hadamard
    blocks in whose basis its weight is stored, None for none. run: name of the training run.
    """

    model_type = "beyond_outliers"

    def __init__(
        self,
        shape: dict[str, Any] | None = None,
        context: int = 128,
        quantization: dict[str, Any] | None = None,
        rotations: dict[str, int | None] | None = None,
        run: str = "",
        **kwargs: Any,
    ):
        self.shape, self.context, self.run = shape or {}, context, run
        self.quantization, self.rotations = quantization, rotations or {}
        model = model_config(**self.shape)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = model.vocab_size, model.width, model.depth
        self.num_attention_heads, self.num_key_value_heads = model.n_heads, model.kv_heads
        self.head_dim, self.max_position_embeddings = model.head_size, context
        super().__init__(**{"tie_word_embeddings": "head" not in self.rotations, **kwargs})


class RoundedLinear(nn.Module):
    """y = Q(x R) W^T with W rounded before it was stored; x is rounded as it comes, as the specification says."""

    def __init__(self, shape: tuple[int, ...], spec: QuantSpec, rotation: int | None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.spec, self.rotation = spec, rotation

    def forward(self, x: Tensor) -> Tensor:
        if self.rotation is not None:
            x = hadamard_transform(x, self.rotation)
        x = quantize_tensor(x, self.spec.activations, self.spec.granularity, self.spec.block)
        return F.linear(x, self.weight)


class _Pass:
    """What attention must know of a forward pass: positions (B, T), which keys are seen (B, 1, T, S), the cache."""

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.seen: Tensor | None = None
        self.cache: Cache | None = None


class _PlacedRotary(Rotary):
    """Rotates by the positions of the pass."""

    def __init__(self, rotary: Rotary, current: _Pass):
        super().__init__(rotary.head_size, rotary.base, rotary.interleaved)
        self.current = current

    def forward(self, x: Tensor) -> Tensor:
        positions = self.current.positions
        if positions is None:
            return super().forward(x)
        tables = rotary_tables(int(positions.max()) + 1, self.head_size, self.base, x.device, x.dtype)
        return self.turn(x, *(table[positions][:, None] for table in tables))


class _CachedMix(AttentionMix):
    """Attention over the keys and values of earlier passes, too."""

    def __init__(self, mixing: AttentionMix, current: _Pass, layer: int):
        super().__init__(mixing.scores.scale)
        self.current, self.layer = current, layer

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.current.cache is not None:
            k, v = self.current.cache.update(k, v, self.layer)
        if self.current.seen is None and k.shape[-2] == q.shape[-2]:
            return super().forward(q, k, v)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.current.seen, scale=self.scores.scale)


class BeyondOutliersForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = BeyondOutliersConfig
    _tied_weights_keys = {"decoder.head.weight": "decoder.embedding.weight"}  # noqa: RUF012  # as transformers wants it
    _supports_sdpa = True

    def __init__(self, config: BeyondOutliersConfig):
        super().__init__(config)
        shape = model_config(**config.shape)
        self.decoder: Decoder = (Llama if isinstance(shape, LlamaConfig) else Olmo2)(shape)  # type: ignore[arg-type]
        if config.quantization is not None:
            spec = QuantSpec(**config.quantization)
            shapes = {name: tuple(weight.shape) for name, weight in self.decoder.state_dict().items()}
            for name, rotation in config.rotations.items():
                self.decoder.set_submodule(name, RoundedLinear(shapes[f"{name}.weight"], spec, rotation))
        self.current = _Pass()
        for layer, block in enumerate(self.decoder.blocks):
            attention: Any = block.attention
            attention.rotary = _PlacedRotary(attention.rotary, self.current)
            attention.mixing = _CachedMix(attention.mixing, self.current, layer)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The decoder draws its own weights when it is made."""

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.decoder.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.decoder.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T) -> logits (B, T, V), of the last `logits_to_keep` positions where that is not 0.

        attention_mask: (B, all tokens so far), 0 for padding. labels: (B, T); positions of -100 have no loss.
        """
        cached = past_key_values
        if cached is None and use_cache and not self.training:
            cached = DynamicCache()
        length, before = input_ids.shape[1], cached.get_seq_length() if cached is not None else 0
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, before:]
        if position_ids is None and before:
            position_ids = torch.arange(before, before + length, device=input_ids.device)[None]
        self.current.positions, self.current.cache = position_ids, cached
        self.current.seen = _seen(length, before, attention_mask, input_ids.device)
        try:
            hidden = self.decoder.hidden(input_ids)
        finally:
            self.current.positions = self.current.cache = self.current.seen = None
        logits = self.decoder.head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cached if use_cache else None)


def _seen(length: int, before: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """(B or 1, 1, T, S) bool: which keys a query sees. None where that is all before it, and nothing came earlier."""
    if padding is None and not before:
        return None
    seen = torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)[None, None]
    if padding is None:
        return seen
    own = torch.eye(length, dtype=torch.bool, device=device)
    itself = F.pad(own, (before, 0))  # padding sees itself: a row of nothing would be NaN
    return (seen & padding[:, None, None, :].bool()) | itself
