"""How quantization error travels: the ABC decomposition of every module of any two corresponding models.

Paper: arXiv 2509.23500, section 5. Modules h_l = f_l(h_{l-1}) of the model, hq_l = fq_l(hq_{l-1}) of the quantized one,
dh_l = hq_l - h_l; R_l = ||dh_l||^2 / ||h_l||^2 = A_l + B_l + C_l exactly, from four evaluations of every module:

    a = 1/2 [fq(hq) - fq(h) + f(hq) - f(h)]   accumulated: the changed input        A = ||a||^2 / ||h_l||^2
    b = 1/2 [fq(hq) - f(hq) + fq(h) - f(h)]   new: the changed function             B = ||b||^2 / ||h_l||^2
                                              their interaction                     C = 2<a, b> / ||h_l||^2
    gain G_l = A_l / R_in                     R_in: relative error of the module's input

and for a linear layer of weight W and quantized weight W + E the two factors of the gain, G = G1 * G2 (exact when only
weights are quantized, in the reduction "global"):

    spectral_ratio  G1 = (||W + E/2||_2 / ||W||_2)^2        alignment_ratio G2 = (cos_phi / cos_psi)^2
    cos_phi = ||(W + E/2) dh|| / (||W + E/2||_2 ||dh||)     cos_psi = ||f(h)|| / (||W||_2 ||h||)

f(h) includes the bias where there is one, which keeps the identity exact.

Over tokens: the paper defines R for one vector h_l. Neither its text nor public code says how its tables reduce the
tokens of a batch. "token", the default, is the mean over tokens of each token's ratio. "global" is the ratio of the
sums of squares over all tokens; the committed tables of the scales up to `confirm` hold it. R = A + B + C is exact in
both. Logits may have an offset common to the whole vocabulary, which softmax does not see: `centred=True` removes it.

Conventions. Modules are compared by name, through hooks; neither model is edited. Input and output of a module are all
the floating-point tensors that it takes and returns, concatenated; inputs that the two models share (rotary tables,
masks, the input of the first layer) are no activations and do not count in R_in. Positions where the full-precision
value is not finite (the -inf of future positions in attention scores) do not count. l runs over the rows of the table,
in the order in which modules finish: first the embedding (R = 0), last the logits; R_L is the last row's R.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond_outliers.config.parsing import choose
from beyond_outliers.modules import evaluating, find_head, is_linear, linear_weight, text_batches
from beyond_outliers.passes import main_output, plain_settings, reals, text_rows, text_tokens
from beyond_outliers.propagation.hooks import Call, Tape, opened_attention
from beyond_outliers.propagation.norms import REDUCTIONS, Ratios, dot, pieces, quotient, spectral_norm, squared_norms
from beyond_outliers.quantizers.record import CoverageWarning, Runs

GRANULARITIES = ("module", "sublayer", "block")
ATTENTIONS = ("unit", "open")
FUNCTIONAL = " (functional parts)"  # ends the kind of a row for what a module does between the calls of its children
_IDLE = (nn.Identity, nn.modules.dropout._DropoutNd)  # in evaluation they hand on what they get
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


# ------------------------------------------------------------------------------------------ which modules are rows


def _is_attention(module: nn.Module) -> bool:
    """An attention module with its projections: named so, and linear layers are its own children."""
    label = type(module).__name__.lower()
    return ("attention" in label or "attn" in label) and any(is_linear(child) for child in module.children())


def units(model: nn.Module, granularity: str, attention: str) -> Iterator[nn.Module]:
    """Modules that are looked at as a whole.

    Blocks are the elements of the outermost lists (ModuleList, Sequential), sublayers the children of blocks.
    """
    depth = {"block": 1, "sublayer": 2}.get(granularity)

    def walk(module: nn.Module, level: int) -> Iterator[nn.Module]:  # level 0: above the blocks; 1: a block
        is_list = isinstance(module, _LISTS)
        whole = not any(True for _ in module.children())
        if depth is None:
            whole |= attention == "unit" and _is_attention(module)
        elif level:
            whole |= level >= depth and not is_list
        else:
            whole |= module is not model and not any(isinstance(child, _LISTS) for child in module.modules())
        if whole:
            if not isinstance(module, _IDLE):
                yield module
        else:
            for child in module.children():
                yield from walk(child, level + 1 if level or is_list else 0)

    yield from walk(model, 0)


_OWN_KINDS = {"residualadd": "residual add", "attentionmix": "mixing", "mix": "mixing"}
_KINDS = {"norm": "norm", "attention": "attention", "attn": "attention", "mlp": "mlp", "rotary": "rotary"}
_KINDS |= {"relu": "activation", "activation": "activation", "block": "block", "layer": "block"}


def kind_of(name: str, module: nn.Module) -> str:
    """What the table calls a module: by its type, else by a word in its class name, else that name in lower case."""
    label = type(module).__name__.lower()
    if isinstance(module, nn.Embedding):
        return "embedding"
    if is_linear(module):
        return "linear"
    if label == "linear":
        return "own linear"  # of complex numbers, or another library's
    if not name or any(isinstance(part, nn.ModuleList) for part in module.modules()):
        return "model"
    if type(module).__module__ == nn.ReLU.__module__ and not _is_attention(module):
        return "activation"
    return _OWN_KINDS.get(label) or next((kind for word, kind in _KINDS.items() if word in label), label)


class Ours:
    """How a model of this project is watched: every step is a module, which keeps nothing and changes nothing in place.

    kinds: name -> kind of the modules that get rows. elsewhere: those of them that get other tokens in the quantized
    model and lose their rows (`anymodel.tracing` has more to look after).
    """

    def __init__(self, model: nn.Module, quantized: nn.Module, batch: Any, granularity: str, attention: str):
        self.model, self.quantized = model, quantized
        names = {module: name for name, module in model.named_modules()}
        self.kinds = {names[unit]: kind_of(names[unit], unit) for unit in units(model, granularity, attention)}
        self.elsewhere: set[str] = set()

    def run(self, batch: Any, keep: Callable, compare: Callable) -> None:
        """A pass of each model; every call of a watched module goes to `keep` and to `compare`."""
        Tape(self.model, self.kinds, keep).run(batch)
        Tape(self.quantized, self.kinds, compare).run(batch)

    def copy(self, values: Any) -> Any:
        """What a module may be given once more."""
        return values

    def check(self, row: "Row", calls: tuple[Call, Call], evaluate: Callable, outputs: tuple) -> None:
        """Refuses outputs f(h), fq(hq), f(hq), fq(h) that cannot be right."""


def _known(module: nn.Module) -> bool:
    """Whether a module is this project's, or of torch and computes nothing between calls of others."""
    place = type(module).__module__
    leaf = isinstance(module, _LISTS) or not any(True for _ in module.children())
    return place.startswith("beyond_outliers.") or (place.startswith("torch.nn.modules.") and leaf)


# ------------------------------------------------------------------------------------------------- A, B, C and gain


class Row:
    """Sums of one module's calls over the batches, and the table row that they give."""

    def __init__(self, name: str, kind: str, pair: tuple[nn.Module, nn.Module], reduction: str, centred: bool):
        self.name, self.kind, self.pair, self.reduction, self.centred = name, kind, pair, reduction, centred
        self.output, self.phi, self.psi = (Ratios(reduction) for _ in range(3))
        self.inputs: dict[int, Ratios] = defaultdict(lambda: Ratios(reduction))
        self.other_integers = False  # such as the entries of a table that a router picks

    def add(self, call: Call, call_q: Call, watch: Ours, outputs: Callable, text: Tensor | None):
        """`outputs`: picks the tensors to compare from what the module returns. text: see `text_tokens`."""

        def evaluate(module: nn.Module, given: Call) -> list[Tensor]:
            return outputs(module(*watch.copy(given.args), **watch.copy(given.kwargs)))

        h, hq = (reals(given.args, given.kwargs) for given in (call, call_q))
        f_h, fq_hq = outputs(call.output), outputs(call_q.output)
        f_hq, fq_h = evaluate(self.pair[0], call_q), evaluate(self.pair[1], call)
        four = f_h, fq_hq, f_hq, fq_h
        shapes = [[tuple(x.shape) for x in values] for values in four]
        if any(s != shapes[0] for s in shapes):
            raise ValueError(f"module {self.name!r} returns other shapes in the quantized model: {shapes}")
        watch.check(self, (call, call_q), evaluate, four)
        # with d = dh and t = f(hq) - fq(h): a = (d + t) / 2 and b = (d - t) / 2
        for values in zip(*four, strict=True):
            rows = tuple(text_rows(x, text) for x in values)
            for x, xq, moved, replaced in pieces(rows, self.reduction, self.centred):
                d, t = xq - x, moved - replaced
                a, b = d + t, d - t
                self.output.add(dot(x, x), dot(d, d), dot(a, a) / 4, dot(b, b) / 4, dot(a, b) / 2)
        h, hq, f_h = ([text_rows(x, text) for x in values] for values in (h, hq, f_h))
        for position, inputs in enumerate(zip(h, hq, strict=True)):
            for x, xq in pieces(inputs, self.reduction):
                self.inputs[position].add(dot(x, x), dot(xq - x, xq - x))
        if self.kind == "linear":
            wide = torch.promote_types(h[0].dtype, torch.float32)
            weight, weight_q = (linear_weight(module).to(wide) for module in self.pair)
            error = hq[0].to(wide) - h[0].to(wide)
            for ratios, x, y in ((self.phi, error, F.linear(error, (weight + weight_q) / 2)), (self.psi, h[0], f_h[0])):
                ratios.add(squared_norms(x, self.reduction), squared_norms(y, self.reduction))

    def as_dict(self) -> dict:
        r, a, b, c = self.output.values(4)
        changed = [ratios.sums for ratios in self.inputs.values() if ratios.sums.ndim and ratios.sums[1] != 0]
        r_in = float(sum(s[1] for s in changed) / sum(s[0] for s in changed)) if changed else 0.0
        r_in = np.nan if self.other_integers else r_in
        row = {"name": self.name, "kind": self.kind, "R": r, "A": a, "B": b, "C": c}
        row |= {"gain": a / r_in if r_in else np.nan}
        row |= dict.fromkeys(("spectral_ratio", "alignment_ratio", "cos_phi", "cos_psi"), np.nan)
        if self.kind == "linear":
            weight, quantized = (linear_weight(module).double() for module in self.pair)
            norm, middle_norm = spectral_norm(weight), spectral_norm((weight + quantized) / 2)
            row["spectral_ratio"] = quotient(middle_norm, norm) ** 2
            row["cos_phi"] = quotient(float(self.phi.values()[0] ** 0.5), middle_norm)
            row["cos_psi"] = quotient(float(self.psi.values()[0] ** 0.5), norm)
            row["alignment_ratio"] = quotient(row["cos_phi"], row["cos_psi"]) ** 2
        return row | {"R_in": r_in}


@plain_settings()
def decompose(
    model: nn.Module,
    quantized: nn.Module,
    batches,
    granularity: str = "module",
    attention: str = "unit",
    reduction: str = "token",
    centred: bool = False,
) -> pd.DataFrame:
    """R, A, B, C, gain and the linear layers' spectral and alignment ratios of every module (module docstring).

    `quantized` has modules of the same names as `model`, as `quantize_model` and `freeze_qat` give it; its linear
    layers offer their dequantized weight W + E as `.weight` (so a `prepare_qat` model goes through `freeze_qat` first).
    `batches`: an iterable of inputs (a tensor, a tuple of positional or a mapping of keyword arguments each), or one
    tensor or mapping. Padding, as an `attention_mask` (B, T) tells it, does not count. Autocast is off.

    granularity "module": every module without children (linear, norm, activation, residual add, ...); "sublayer": the
        children of the blocks; "block": the blocks (elements of the outermost ModuleList or Sequential).
    attention "unit": an attention module with its projections is one row, as in the paper; "open": its projections,
        rotary positions, query/key norm, scores, softmax, mixing and output each have a row. Applies to "module".
    reduction "token": the mean over rows (last dimension) of each row's own ratio, rows of norm zero left out:
        R = A + B + C is exact, G = G1 * G2 is not, and cos_phi, cos_psi are root mean squares; "global": norms are
        Frobenius norms over all tokens of all batches, so that every identity is exact. With several inputs R_in is
        over all of them, concatenated (global), or over the rows of all of them (token).
    centred: the logits (rows of the output head and of the model around it) without their mean over the vocabulary, a
        linear map, so that R = A + B + C stays exact; their gain then relates a centred A to what the head reads.

    What a module computes itself between the calls of its children (a residual add written as `+`) has no row of its
    own: the module around it gets a row whose kind ends with " (functional parts)", after its children's rows. A module
    that runs several times has a row a call, named "name#2" and so on. Dropout and Identity have none. The model's
    answer (see `passes.main_output`: logits, not a pooled state beside them) has the last row, whatever ran last.

    Checked as it goes (`anymodel.invariants`): A = 0 where the input has no error, B = 0 where the function has not
    changed, modules give the same again for the same input. Experts that get other tokens in the
    quantized model have no row; a CoverageWarning names them.

    Columns: index, name, kind, R, A, B, C, gain, spectral_ratio, alignment_ratio, cos_phi, cos_psi, R_in. NaN where a
    quantity is not defined (gain of a module whose input has no error; ratios of what is not linear; R_in where the
    two models give a module other integers, such as the entries of a table that it is to look up).

    Cost: one pass of the first batch to see what runs, then a batch at a time one pass of each model and, a module at
    a time, the two crossed evaluations. Memory: the activations of one full-precision pass over one batch, released
    as the quantized pass proceeds, and float64 copies of at most a few million elements.

    Raises ValueError for unknown options, `centred` for a model without output head, no batches, modules that the
    quantized model lacks or runs a different number of times, a model without floating-point activations, or a
    quantized layer whose weight is read without a call of it. Layers that got no input at all, such as idle experts,
    are named in a CoverageWarning.
    """
    choose("granularity", granularity, GRANULARITIES)
    choose("attention", attention, ATTENTIONS)
    choose("reduction", reduction, REDUCTIONS)
    logits = {find_head(model), ""} if centred else set()
    if None in logits:
        raise ValueError(f"{type(model).__name__} has no output head whose logits could be centred")
    kind_of_watch = Ours
    if not all(_known(module) for one in (model, quantized) for module in one.modules()):
        from beyond_outliers.anymodel.tracing import Foreign as kind_of_watch
    calls: dict[tuple[str, int], Call] = {}
    rows: dict[tuple[str, int], Row] = {}
    watch: Any = None  # an `Ours`, once there is a batch

    def keep(name: str, number: int, call: Call):
        calls[name, number] = call

    def compare(name: str, number: int, call: Call):
        original = calls.pop((name, number), None)
        if original is None:
            raise ValueError(f"module {name!r} runs more often in the quantized model than in the model")
        if (name, number) not in rows:
            pair = model.get_submodule(name), quantized.get_submodule(name)
            label = (name or "(model)") + (f"#{number}" if number > 1 else "")
            rows[name, number] = Row(label, watch.kinds[name], pair, reduction, name in logits)
        rows[name, number].add(original, call, watch, reals if name else main_output, text)

    runs = Runs(quantized)
    with evaluating(model, quantized), opened_attention(attention, model, quantized), runs.counted():
        for batch in text_batches(model, batches):
            if watch is None:
                watch = kind_of_watch(model, quantized, batch, granularity, attention)
                _check_names(watch.kinds, model, quantized)
            text = text_tokens(batch, model)
            watch.run(batch, keep, compare)
            if calls:
                raise ValueError(f"the quantized model does not run {sorted({name for name, _ in calls})}")
        if watch is None:
            raise ValueError("there is no batch in batches")
        table = pd.DataFrame([row.as_dict() for (name, _), row in rows.items() if name not in watch.elsewhere])
    runs.check(batch)
    if watch.elsewhere:
        warnings.warn(
            "modules without a row, because the quantized model sends them other tokens (their error is in the row of "
            f"the module around them): {', '.join(sorted(watch.elsewhere))}",
            CoverageWarning,
            stacklevel=2,
        )
    table.insert(0, "index", range(len(table)))
    return table


def _check_names(kinds: dict[str, str], model: nn.Module, quantized: nn.Module):
    if not kinds:
        raise ValueError(f"no module of {type(model).__name__} computes on floating-point activations")
    missing = set(kinds) - {name for name, _ in quantized.named_modules(remove_duplicate=False)}
    if missing:
        raise ValueError(f"modules of the model that the quantized model lacks: {sorted(missing)}")


def summarise(table: pd.DataFrame) -> pd.Series:
    """The scalars of a `decompose` table that serve as predictors.

    R_L (last row), mean R, A and B over the modules (rows of functional parts would count their children twice and are
    left out), and over the linear layers the mean gain, spectral and alignment ratio; where no linear layer has a row
    of its own (sublayer, block) the latter are NaN.
    """
    own = table[~table["kind"].str.endswith(FUNCTIONAL)]
    linear = own[own["kind"] == "linear"]
    means = own[["R", "A", "B", "gain"]].mean().add_prefix("mean_")
    of_linear = linear[["gain", "spectral_ratio", "alignment_ratio"]].mean().add_prefix("linear_")
    return pd.concat([pd.Series({"R_L": table["R"].iloc[-1]}), means, of_linear])
