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
from transformers.utils import can_return_tuple

from beyond_outliers.config.run import LlamaConfig, model_config
from beyond_outliers.model.decoder import AttentionMix, Decoder, Rotary, rotary_tables
from beyond_outliers.model.llama import Llama
from beyond_outliers.model.olmo2 import Olmo2
from beyond_outliers.quantizers.formats import quantize_tensor
from beyond_outliers.quantizers.hadamard import hadamard_transform
from beyond_outliers.quantizers.spec import QuantSpec

LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")  # what transformers' loss takes beside logits and labels


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
        vocab_size: int | None = None,
        **kwargs: Any,
    ):
        self.shape, self.context, self.run = shape or {}, context, run
        self.quantization, self.rotations = quantization, rotations or {}
        model = model_config(**self.shape)
        self.vocab_size = model.vocab_size if vocab_size is None else vocab_size  # of resized embeddings
        self.hidden_size, self.num_hidden_layers = model.width, model.depth
        self.num_attention_heads, self.num_key_value_heads = model.n_heads, model.kv_heads
        self.head_dim, self.max_position_embeddings = model.head_size, context
        super().__init__(**{"tie_word_embeddings": "head" not in self.rotations, **kwargs})


class RoundedLinear(nn.Module):
    """y = Q(x R) W^T with W rounded before it was stored; x is rounded as it comes, as the specification says."""

    rounds_operands = True

    def __init__(self, shape: tuple[int, ...], spec: QuantSpec, rotation: int | None):
        super().__init__()
        self.rounded = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias, self.spec, self.rotation = None, spec, rotation

    @property
    def weight(self) -> Tensor:
        """What acts on unrotated inputs, (out, in)."""
        return self.rounded if self.rotation is None else hadamard_transform(self.rounded, self.rotation)

    def forward(self, x: Tensor) -> Tensor:
        if self.rotation is not None:
            x = hadamard_transform(x, self.rotation)
        x = quantize_tensor(x, self.spec.activations, self.spec.granularity, self.spec.block)
        return F.linear(x, self.rounded)


class _Pass:
    """What attention must know of a forward pass: positions (B, T), the cache, and which keys a query sees."""

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.padding: Tensor | None = None
        self.cache: Cache | None = None
        self.before = 0

    def seen(self, length: int, keys: int, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T, S), which of S keys T queries see; None where that is all before each, and nothing earlier.

        A key's place is its token's number; places that a static cache has not filled yet come later than any query.
        Padding sees itself, as a row of nothing would be NaN. Positions that begin anew begin another document.
        """
        padding, positions = self.padding, self.positions
        if padding is not None and padding.ndim == 4:  # made by transformers
            return padding[..., :keys]
        restarts = None if positions is None or padding is not None or self.before else positions.diff(dim=-1) != 1
        packed = restarts is not None and bool(restarts.any())
        if padding is None and not packed and length == keys:
            return None
        queries = torch.arange(self.before, self.before + length, device=device)[:, None]
        places = torch.arange(keys, device=device)
        seen = (places <= queries)[None, None]
        if packed:
            document = F.pad(restarts.cumsum(-1), (1, 0))  # type: ignore[union-attr]
            seen = seen & (document[:, None, :, None] == document[:, None, None, :])
        if padding is not None:
            text = F.pad(padding.bool(), (0, keys - padding.shape[1]), value=False)
            seen = (seen & text[:, None, None]) | (places == queries)
        return seen


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
        seen = self.current.seen(q.shape[-2], k.shape[-2], q.device)
        if seen is None:
            return super().forward(q, k, v)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scores.scale)


class BeyondOutliersForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = BeyondOutliersConfig
    _tied_weights_keys = {"decoder.head.weight": "decoder.embedding.weight"}  # noqa: RUF012  # as transformers wants it
    _supports_sdpa = True

    def __init__(self, config: BeyondOutliersConfig):
        super().__init__(config)
        shape = model_config(**config.shape | {"vocab_size": config.vocab_size})
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

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        if "head" in self.config.rotations:
            raise ValueError("the head is rounded: a word more has no rounded row; valid: resize, then export anew")
        return super().resize_token_embeddings(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T) or inputs_embeds (B, T, width) -> logits (B, T, V), as models of `transformers` do.

        attention_mask: (B, all tokens so far), 0 for padding, or (B, 1, T, S). labels: (B, T); those of -100 have no
        loss. logits_to_keep: of so many last positions (0: all), or of these. hidden_states: the embeddings, then what
        each block gives, the last one normalised. kwargs: of the loss, see LOSS; ValueError for others.
        """
        refused = [key for key, value in kwargs.items() if key not in LOSS and value is not None and value is not False]
        if refused:
            raise ValueError(f"BeyondOutliersForCausalLM does not take {', '.join(refused)}; valid: {', '.join(LOSS)}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds, and not both")
        x = self.decoder.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and use_cache and not self.training:
            past_key_values = DynamicCache()
        length, before = x.shape[1], 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if attention_mask is not None and attention_mask.ndim == 2:
            if bool(attention_mask.all()):
                attention_mask = None
            elif position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, before : before + length]
        if position_ids is None and before:
            position_ids = torch.arange(before, before + length, device=x.device)[None]
        now = self.current
        now.positions, now.padding, now.cache, now.before = position_ids, attention_mask, past_key_values, before
        states = [x]
        try:
            for block in self.decoder.blocks:
                states.append(block(states[-1]))
        finally:
            now.positions = now.padding = now.cache = None
            now.before = 0
        states[-1] = self.decoder.final_norm(states[-1])
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.decoder.head(states[-1][:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        told = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=None if use_cache is False else past_key_values,
            hidden_states=tuple(states) if told else None,
        )
