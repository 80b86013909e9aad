"""Which layers cost how much, and how many bits each should have.

Two measures of a linear layer, both in what the model loses (KL, nats per token; R_L where there are no logits):

    carried   the layer's new error e = fq(h) - f(h), the B of `propagation`, times what all that follows makes of it,
              to first order: Var_p(J e) / 2 = E_y[(e . grad log p(y))^2] / 2 over words y drawn from p, J the Jacobian
              of the logits; without logits ||J e||^2 / ||h_L||^2, by normal draws. One pass backwards gives all layers
    ablation  how much less is lost once the layer, and it alone, has 8 bits: a pass for every layer

Bits: a grid of b bits has 2^(b - 1) - 1 steps, and squared errors fall with the square of that. A budget goes where it
buys most per weight entry.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from beyond_outliers.metrics import METRICS
from beyond_outliers.modules import evaluating, find_head, forward, hooked
from beyond_outliers.passes import main_output, plain_settings
from beyond_outliers.propagation.output_error import ratio_of_sums
from beyond_outliers.quantizers.convert import QuantizedLinear, converted_linear
from beyond_outliers.quantizers.record import Quantization, record_of, rounding_layers
from beyond_outliers.quantizers.spec import QuantSpec


def bits_of(spec: QuantSpec) -> int:
    """Bits of a spec's weights, else of its activations, as its format's name says: 4 of int4g128; 16 without any."""
    found = re.search(r"\d+", (spec.weights if spec.weights != "none" else spec.activations).rpartition(":")[2])
    return int(found[0]) if found else 16


def with_bits(spec: QuantSpec, bits: int) -> QuantSpec:
    """The spec with integers of so many bits in place of whatever it rounds to, weights to the nearest."""
    formats: dict[str, Any] = {end: f"int{bits}" for end in ("weights", "activations") if getattr(spec, end) != "none"}
    return replace(spec, method="rtn", **formats)


def mixed(model: nn.Module, quantized: nn.Module, bits: Mapping[str, int]) -> nn.Module:
    """A copy of `quantized`, which shares its tensors, with integers of bits[name] in the layers that are named.

    model: of full precision, as `quantize_model` got it. ValueError for names that are no rounded linear layers.
    """
    record = record_of(quantized)
    if wrong := [name for name in bits if name not in linear_layers(quantized)]:
        raise ValueError(f"no rounded linear layers: {', '.join(wrong)}; valid: {', '.join(linear_layers(quantized))}")
    shared = {id(tensor): tensor for tensor in (*quantized.parameters(), *quantized.buffers())}
    copied = copy.deepcopy(quantized, shared)
    for name, width in bits.items():
        made = Quantization(with_bits(record.spec, width))
        copied.set_submodule(name, converted_linear(model.get_submodule(name), made, True))  # type: ignore[arg-type]
    return copied.eval()


def linear_layers(quantized: nn.Module) -> dict[str, QuantizedLinear]:
    """Rounded linear layers by name."""
    return {name: m for m, name in rounding_layers(quantized).items() if isinstance(m, QuantizedLinear)}


class Damage:
    """What is lost by quantized copies of `model` on ids (N, T): `of(quantized)` is a table, a row a sequence.

    Columns: kl to the model, and increase of the loss (nats per token); of a model without logits, R_L alone. All
    logits of the model are kept, in float32.
    """

    @plain_settings()
    def __init__(self, model: nn.Module, ids: Tensor):
        self.batches, self.unit = ids.split(max(1, 512 // ids.shape[1])), "kl" if find_head(model) else "R_L"
        with evaluating(model):
            self.answers = [self._answer(model, batch) for batch in self.batches]
        self.signal = sum(float(y.double().square().sum()) for y in self.answers) / len(ids)

    def _answer(self, model: nn.Module, batch: Tensor) -> Tensor:
        y = main_output(forward(model, batch))[0].float()
        return y.log_softmax(-1) if self.unit == "kl" else y

    @plain_settings()
    def of(self, quantized: nn.Module) -> pd.DataFrame:
        rows = []
        with evaluating(quantized):
            for batch, y in zip(self.batches, self.answers, strict=True):
                yq = self._answer(quantized, batch)
                if self.unit == "R_L":
                    columns = {"R_L": (yq - y).double().square().flatten(1).sum(1) / self.signal}
                else:
                    targets = batch[:, 1:, None].to(y.device)
                    nats, nats_q = (x[:, :-1].gather(2, targets).double().mean((1, 2)) for x in (y, yq))
                    columns = {"kl": (y.exp() * (y - yq)).sum(-1).double().mean(1), "increase": nats - nats_q}
                rows.append(pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()}))
        return pd.concat(rows, ignore_index=True)


def estimate_with(values: Iterable[float], log: bool = True) -> dict[str, float]:
    """Mean over sequences with its 95 % interval, on the log scale for what cannot be negative."""
    return ratio_of_sums([(1.0, value) for value in values], log=log)


@plain_settings()
def carried(model: nn.Module, quantized: nn.Module, ids: Tensor, samples: int = 4, seed: int = 0) -> pd.DataFrame:
    """`carried` of the module docstring, with its interval over the sequences of ids (N, T); a row a linear layer.

    samples: draws of words per sequence. Columns: name, entries, B (relative new error of the layer's own output),
    carried, low, high, share (of all layers' sum). Costs about 2 + `samples` passes. Layers that did not run are left
    out. Raises ValueError as `record_of` for a model that is not quantized.
    """
    record_of(quantized)
    with_logits, layers = find_head(model) is not None, linear_layers(quantized)
    places = {model.get_submodule(name): (i, layer) for i, (name, layer) in enumerate(layers.items())}
    generator = torch.Generator().manual_seed(seed)
    runs: list[tuple[int, Tensor, Tensor]] = []  # of one pass: layer, its new error, the zero that takes its gradient
    norms = torch.zeros(len(layers), 2, dtype=torch.float64)
    costs = torch.zeros(len(layers), len(ids), dtype=torch.float64)
    signal = 2.0 * ids.shape[1] if with_logits else 0.0

    def after(module, args, kwargs, output):
        place, rounded = places[module]
        with torch.no_grad():
            error = rounded(*args, **kwargs) - output
            norms[place] += torch.stack([x.double().square().sum() for x in (output, error)]).cpu()
        runs.append((place, error, torch.zeros_like(output, requires_grad=True)))
        return output + runs[-1][2]

    with hooked(places, after=after), evaluating(model, quantized), torch.enable_grad():
        for sequence, row in enumerate(ids):
            runs.clear()
            output = main_output(forward(model, row[None]))[0].float()
            signal += 0.0 if with_logits else float(output.detach().double().square().sum()) / len(ids)
            for _ in range(samples):
                if with_logits:
                    p = output.detach().flatten(0, -2).softmax(-1).cpu()
                    words = torch.multinomial(p, 1, generator=generator).to(output.device)
                    target = output.flatten(0, -2).log_softmax(-1).gather(1, words).sum()
                else:
                    target = (output * torch.randn(output.shape, generator=generator).to(output)).sum()
                zeros = [zero for *_, zero in runs]
                dots = torch.zeros(len(layers), dtype=torch.float64)
                gradients = torch.autograd.grad(target, zeros, retain_graph=True, allow_unused=True)
                for (place, error, _), gradient in zip(runs, gradients, strict=True):
                    dots[place] += 0.0 if gradient is None else (gradient * error).sum(dtype=torch.float64).cpu()
                costs[:, sequence] += dots.square() / samples
    rows = [
        {"name": name, "entries": layer.rounded.numel(), "B": change / size, **estimate_with(values.tolist())}
        for (name, layer), (size, change), values in zip(layers.items(), norms.tolist(), costs / signal, strict=True)
        if size
    ]
    table = pd.DataFrame(rows).rename(columns={"value": "carried"})
    return table.assign(share=table.carried / table.carried.sum())


def ablate(model: nn.Module, quantized: nn.Module, damage: Damage, bits: int = 8) -> pd.DataFrame:
    """What each linear layer, given `bits` bits alone, takes off the damage: a row a sequence, a column a layer."""
    start = damage.of(quantized)[damage.unit]
    columns = {n: start - damage.of(mixed(model, quantized, {n: bits}))[damage.unit] for n in linear_layers(quantized)}
    return pd.DataFrame(columns)


PER_ENTRY = (*METRICS, "B")  # guides that say nothing of a layer's size: their value is taken per weight entry


def recommend(
    layers: pd.DataFrame, budget: float = 4.5, by: str = "carried", widths: tuple[int, ...] = (4, 8)
) -> pd.Series:
    """Bits for each layer, so that the mean over weight entries stays within `budget` and the sum of `by` falls most.

    layers: a table with name, entries and `by`, such as `Probe.layers`. widths: what there is; all layers start at the
    least, the step that saves most per bit is taken first. ValueError for a column or a budget that cannot be.
    """
    widths = tuple(sorted(widths))
    if by not in layers.columns or by in ("name", "entries"):
        raise ValueError(
            f"no column {by!r} to go by; valid: {[c for c in layers.columns if c not in ('name', 'entries')]}"
        )
    if not widths[0] <= budget <= widths[-1]:
        raise ValueError(f"a budget of {budget} bits; valid: {widths[0]} to {widths[-1]}, of the widths {widths}")
    table = layers.set_index("name")
    entries, each = table.entries, table[by] * (table.entries if by in PER_ENTRY else 1)
    left = [1 / (2 ** (width - 1) - 1) ** 2 for width in widths]  # squared step, of a grid over the same range
    steps = [
        (each[name] * (left[i] - left[i + 1]) / ((widths[i + 1] - widths[i]) * entries[name]), i, name)
        for name in table.index
        for i in range(len(widths) - 1)
    ]
    bits, spent = dict.fromkeys(table.index, widths[0]), (budget - widths[0]) * entries.sum()
    for _, i, name in sorted(steps, key=lambda step: (-step[0], step[1])):
        cost = (widths[i + 1] - widths[i]) * entries[name]
        if bits[name] == widths[i] and cost <= spent * (1 + 1e-12):
            bits[name], spent = widths[i + 1], spent - cost
    return pd.Series(bits, name="bits")
