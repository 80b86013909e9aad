"""Modules that multiply by weights of their own, not by a layer: fused experts and routers.

Their forward pass stays as it is. While it runs, every matrix product with one of their weights (or a part, transpose
or cast of one) gets its other operand rounded, along the dimension that the product sums over. A weight that is used
in any other way is a RuntimeError: nothing could be said about what was rounded.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from beyond_outliers.passes import tensors

# fmt: off
_MOVES = frozenset([  # of a weight: what comes out holds entries of the weight and nothing else
    "__get__", "__getitem__", "bfloat16", "chunk", "clone", "contiguous", "detach", "double", "expand", "flatten",
    "float", "half", "index_select", "movedim", "moveaxis", "narrow", "permute", "repeat_interleave", "reshape",
    "select", "split", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type", "type_as",
    "unbind", "unflatten", "unsqueeze", "view",
])
# products a b that sum over a's last dimension and b's last but one (of a linear layer last)
_PRODUCTS = frozenset([
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "_grouped_mm", "grouped_mm",
    "grouped_mm_fallback",
])
_PLACES = {"__rmatmul__": (1, 0), "addmm": (1, 2), "baddbmm": (1, 2)}  # of a and b among the arguments, unless 0 and 1
# fmt: on


class NotAProduct(RuntimeError):
    """A weight is used in a way in which its operand cannot be rounded."""


class RoundedProducts(TorchFunctionMode):
    """Rounds both operands of products with `weights`: the other one by `operand`, the weight by `weight`, if given.

    Both functions take (..., n) with the dimension that is summed over last. sums: that dimension of each weight.
    """

    def __init__(
        self, weights: dict[str, Tensor], sums: dict[str, int], operand: Callable | None, weight: Callable | None = None
    ):
        super().__init__()
        self.tracked = {id(tensor): (name, tensor) for name, tensor in weights.items()}
        self.widths = {name: tensor.shape[sums[name]] for name, tensor in weights.items()}
        self.operand, self.weight = operand, weight

    def name(self, value) -> str | None:
        return self.tracked[id(value)][0] if isinstance(value, Tensor) and id(value) in self.tracked else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        label = getattr(function, "__name__", str(function))
        names = {name for value in tensors(args, kwargs) if (name := self.name(value))}
        if not names:
            return function(*args, **kwargs)
        if label in _PRODUCTS and not (kwargs.keys() - {"offs", "bias", "out_dtype", "out"}):
            given, (first, second) = list(args), _PLACES.get(label, (0, 1))
            summed = -1 if label == "linear" else -min(2, given[second].ndim)
            given[first], given[second] = self._pair(given[first], -1, given[second], summed)
            return function(*given, **kwargs)
        name = min(names)
        refusal = NotAProduct(f"the weight {name!r} is used by {label}, which is no matrix product")
        try:
            output = function(*args, **kwargs)
        except RuntimeError as error:
            raise refusal from error
        for tensor in tensors(output):  # none comes of looking at a weight's shape
            if label not in _MOVES:
                raise refusal
            self.tracked[id(tensor)] = name, tensor
        return output

    def _pair(self, a: Tensor, a_dim: int, b: Tensor, b_dim: int) -> tuple[Tensor, Tensor]:
        names = self.name(a), self.name(b)
        if all(names):
            raise NotAProduct(f"the product of two weights, {names[0]!r} and {names[1]!r}, has no activation to round")
        for name, x, dim in ((names[0], a, a_dim), (names[1], b, b_dim)):
            if name and x.shape[dim] != self.widths[name]:
                raise NotAProduct(
                    f"a product sums over {x.shape[dim]} entries of {name!r}; its rows have {self.widths[name]}"
                )
        rounds = [self.weight if name else self.operand for name in names]
        return along(rounds[0], a, a_dim), along(rounds[1], b, b_dim)


def along(function: Callable | None, x: Tensor, dim: int) -> Tensor:
    """`function` of x with `dim` moved to the end and back."""
    if function is None:
        return x
    return function(x) if dim in (-1, x.ndim - 1) else function(x.movedim(dim, -1)).movedim(-1, dim)


class Rounding(nn.Module):
    """What a module with weights of its own carries under the name `operand_rounding`: hooks that round its products.

    sums: weight's name -> the dimension that its products sum over. operand, weight: modules from (..., n) to the same
    shape, None to leave it (a weight that is rounded once needs none).
    """

    def __init__(self, sums: dict[str, int], operand: nn.Module | None, weight: nn.Module | None = None):
        super().__init__()
        self.sums, self.operand, self.weight = sums, operand, weight
        self.running: list[RoundedProducts] = []

    def attach(self, module: nn.Module):
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave, always_call=True)
        module.operand_rounding = self  # where `coverage` finds it

    def enter(self, module: nn.Module, _args):
        weights = {name: getattr(module, name) for name in self.sums}
        self.running.append(RoundedProducts(weights, self.sums, self.operand, self.weight))
        self.running[-1].__enter__()

    def leave(self, module: nn.Module, _args, _output):
        if self.running:
            self.running.pop().__exit__(None, None, None)

    def freeze(self, module: nn.Module):
        """Weights rounded once, as buffers, in place of those that train."""
        for name, dim in self.sums.items():
            rounded = along(self.weight, module.get_parameter(name), dim)
            del module._parameters[name]
            module.register_buffer(name, rounded.detach().contiguous().clone())
        self.weight = None


# ---------------------------------------------------------------------------------------------- which modules, how

# expert weights (experts, out, in), by the class that holds them; those that say `is_transposed` need no entry
_EXPERTS = {
    "InklingSharedExperts": ("gate_proj", "up_proj", "down_proj"),
    "JetMoeParallelExperts": ("weight",),
    "KyutaiSpeechToTextFlexibleLinear": ("weight",),
    "LongcatFlashExperts": ("gate_up_proj", "down_proj"),
    "MoshiFlexibleLinear": ("weight",),
    "Step3p7Experts": ("gate_up_proj", "down_proj"),
}
_TRANSPOSED_EXPERTS = {"Llama4TextExperts": ("gate_up_proj", "down_proj")}  # (experts, in, out)


def products_of(module: nn.Module) -> dict[str, int] | None:
    """Weights of `module` that its forward multiplies by, name -> dimension summed over; None where it is not known.

    Known are the fused experts of `transformers` and their routers, by what their classes say. A router is tried on
    a few rows: it may do nothing with its weight but multiply by it.
    """
    label, weights = type(module).__name__, {n: p for n, p in module._parameters.items() if p is not None}
    if isinstance(getattr(module, "is_transposed", None), bool) and hasattr(module, "has_gate"):
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        found = dict.fromkeys(names, -2 if module.is_transposed else -1)
    elif label in _EXPERTS:
        found = dict.fromkeys(_EXPERTS[label], -1)
    elif label in _TRANSPOSED_EXPERTS:
        found = dict.fromkeys(_TRANSPOSED_EXPERTS[label], -2)
    elif label.lower().endswith(("router", "gate")) and "weight" in weights and weights["weight"].ndim == 2:
        has_layers = any(isinstance(child, nn.Linear) for child in module.modules() if child is not module)
        if has_layers or _refuses(module, weights["weight"]):
            return None
        found = {"weight": -1}
    else:
        return None
    return found if all(name in weights and weights[name].ndim > 1 for name in found) else None


@torch.no_grad()
def _refuses(module: nn.Module, weight: Tensor) -> bool:
    """Whether `module` uses its `weight` (out, in) in another way than in products, as far as some rows show."""
    training = module.training
    rows = torch.arange(8 * weight.shape[1], dtype=torch.float32, device=weight.device).add(1).sin().to(weight.dtype)
    try:
        module.eval()
        for shape in ((8, -1), (2, 4, weight.shape[1])):
            with torch.random.fork_rng(devices=[]), RoundedProducts({"weight": weight}, {"weight": -1}, None):
                module.forward(rows.reshape(shape).clone())
    except NotAProduct:
        return True
    except Exception:  # whatever a forward of its own asks of its input that these rows are not
        return False
    finally:
        module.train(training)
    return False
