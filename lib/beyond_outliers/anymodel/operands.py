"""Modules that multiply by weights of their own, not by a layer: fused experts, routers, subclasses of nn.Linear.

Their forward pass stays as it is. While it runs, every matrix product with one of their weights (or a part, transpose
or cast of one) gets its other operand rounded, along the dimension that the product sums over. A weight that is used
in any other way is a RuntimeError: nothing could be said about what was rounded.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from beyond_outliers.anymodel.linears import overrides_forward
from beyond_outliers.passes import tensors

# fmt: off
_MOVES = frozenset([  # of a weight: what comes out holds entries of the weight and nothing else
    "__get__", "__getitem__", "bfloat16", "chunk", "clone", "contiguous", "detach", "double", "expand", "flatten",
    "float", "half", "index_select", "movedim", "moveaxis", "narrow", "permute", "repeat_interleave", "reshape",
    "select", "split", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type", "type_as",
    "unbind", "unflatten", "unsqueeze", "view",
])
# products a b that sum over a's last dimension and b's last but one, and the positions of a and b
_PRODUCTS = {
    "matmul": (0, 1), "__matmul__": (0, 1), "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "__rmatmul__": (1, 0),
    "addmm": (1, 2), "baddbmm": (1, 2), "_grouped_mm": (0, 1), "grouped_mm": (0, 1), "grouped_mm_fallback": (0, 1),
}
# fmt: on


class NotAProduct(RuntimeError):
    """A weight is used in a way in which its operand cannot be rounded."""


class RoundedProducts(TorchFunctionMode):
    """Rounds both operands of products with `weights`: the other one by `operand`, the weight by `weight`, if given.

    Both functions take (..., n) with the dimension that is summed over last. sums: that dimension of each weight.
    met: names of the weights that a product was made with.
    """

    def __init__(
        self, weights: dict[str, Tensor], sums: dict[str, int], operand: Callable | None, weight: Callable | None = None
    ):
        super().__init__()
        self.tracked = {id(tensor): (name, tensor) for name, tensor in weights.items()}
        self.widths = {name: tensor.shape[sums[name]] for name, tensor in weights.items()}
        self.operand, self.weight = operand, weight
        self.met: set[str] = set()

    def name(self, value) -> str | None:
        return self.tracked[id(value)][0] if isinstance(value, Tensor) and id(value) in self.tracked else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        label = getattr(function, "__name__", str(function))
        names = {name for value in tensors(args, kwargs) if (name := self.name(value))}
        if not names:
            return function(*args, **kwargs)
        if label == "linear":
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            return function(*self._pair(given["input"], -1, given["weight"], -1), given.get("bias"))
        if label == "einsum":
            return function(*self._einsum(args))
        if label in _PRODUCTS and not (kwargs.keys() - {"offs", "bias", "out_dtype", "out"}):
            return function(*self._product(args, *_PRODUCTS[label]), **kwargs)
        if label not in _MOVES:
            return self._read(function, label, args, kwargs, sorted(names)[0])
        output = function(*args, **kwargs)
        for tensor in tensors(output):
            self.tracked[id(tensor)] = sorted(names)[0], tensor
        return output

    def _read(self, function, label: str, args: tuple, kwargs: dict, name: str):
        """The result of a function that makes no tensor of a weight, such as its shape; any other is an error."""
        refusal = NotAProduct(f"the weight {name!r} is used by {label}, which is no matrix product")
        try:
            output = function(*args, **kwargs)
        except RuntimeError as error:
            raise refusal from error
        if any(True for _ in tensors(output)):
            raise refusal
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
        self.met.update(filter(None, names))
        rounds = [self.weight if name else self.operand for name in names]
        return along(rounds[0], a, a_dim), along(rounds[1], b, b_dim)

    def _product(self, args: tuple, first: int, second: int) -> tuple:
        a, b = args[first], args[second]
        rounded = self._pair(a, -1, b, -1 if b.ndim == 1 else -2)
        given = list(args)
        given[first], given[second] = rounded
        return tuple(given)

    def _einsum(self, args: tuple) -> tuple:
        equation, *given = args
        operands = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
        inputs, _, output = equation.replace(" ", "").partition("->")
        letters = inputs.replace("...", ".").split(",")
        summed = set(letters[0]) & set(letters[-1]) - set(output) - {"."}
        if len(operands) != 2 or len(summed) != 1 or not output:
            raise NotAProduct(
                f"einsum({equation!r}) with a weight: only two operands that share one summed index can be rounded"
            )
        index = summed.pop()
        places = [
            part.index(index) - len(part) if "." in part[: part.index(index) + 1] else part.index(index)
            for part in letters
        ]
        # an ellipsis stands for several dimensions: count from the side of the index where there is none
        return (equation, *self._pair(operands[0], places[0], operands[1], places[1]))


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

    def mode(self, module: nn.Module) -> RoundedProducts:
        weights = {name: getattr(module, name) for name in self.sums}
        return RoundedProducts(weights, self.sums, self.operand, self.weight)

    def enter(self, module: nn.Module, _args):
        mode = self.mode(module)
        mode.__enter__()
        self.running.append(mode)

    def leave(self, module: nn.Module, _args, _output):
        if self.running:
            self.running.pop().__exit__(None, None, None)

    def freeze(self, module: nn.Module):
        """Weights rounded once, as buffers, in place of those that train."""
        if self.weight is not None:
            for name, dim in self.sums.items():
                as_buffer(module, name, along(self.weight, module.get_parameter(name), dim))
            self.weight = None


def as_buffer(module: nn.Module, name: str, value: Tensor):
    del module._parameters[name]
    module.register_buffer(name, value.detach().contiguous().clone())


def rounding_of(module: nn.Module) -> Rounding | None:
    """What `module` carries where its own products are rounded; None for other modules."""
    rounding = module._modules.get("operand_rounding")
    return rounding if isinstance(rounding, Rounding) else None


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

    Known are the fused experts of `transformers` and their routers, by what their classes say, and subclasses of
    nn.Linear, if their forward on a few rows makes products with the weight and does nothing else with it.
    """
    label, weights = type(module).__name__, {n: p for n, p in module._parameters.items() if p is not None}
    if isinstance(module, nn.Linear):
        return {"weight": -1} if _multiplies(module) else None
    if isinstance(getattr(module, "is_transposed", None), bool) and hasattr(module, "has_gate"):
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        found = dict.fromkeys(names, -2 if module.is_transposed else -1)
    elif label in _EXPERTS:
        found = dict.fromkeys(_EXPERTS[label], -1)
    elif label in _TRANSPOSED_EXPERTS:
        found = dict.fromkeys(_TRANSPOSED_EXPERTS[label], -2)
    elif label.lower().endswith(("router", "gate")) and "weight" in weights and weights["weight"].ndim == 2:
        if _has_layers(module) or _refuses(module, weights["weight"]):
            return None
        found = {"weight": -1}
    else:
        return None
    return found if all(name in weights and weights[name].ndim > 1 for name in found) else None


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _multiplies(linear: nn.Linear) -> bool:
    """Whether a forward of its own makes nothing but products with `weight`, as far as a few rows show."""
    names = {name for name, _ in linear.named_parameters()}
    if not overrides_forward(linear, nn.Linear) or names - {"weight", "bias"} or any(True for _ in linear.children()):
        return False
    return (
        "forward" not in vars(linear)
        and linear.weight.device.type != "meta"
        and _refuses(linear, linear.weight) is False
    )


@torch.no_grad()
def _refuses(module: nn.Module, weight: Tensor) -> bool | None:
    """Whether `module` uses its `weight` (out, in) in another way than in products, tried on rows of two shapes.

    None: not to be seen, because the module does not take such rows.
    """
    training, answer = module.training, None
    rows = torch.arange(8 * weight.shape[1], dtype=torch.float32, device=weight.device).add(1).sin().to(weight.dtype)
    try:
        module.eval()
        for shape in ((8, -1), (2, 4, weight.shape[1])):
            mode = RoundedProducts({"weight": weight}, {"weight": -1}, None)
            with torch.random.fork_rng(devices=[]), mode:
                module.forward(rows.reshape(shape).clone())
            answer = False if mode.met else answer
    except NotAProduct:
        return True
    except Exception:  # whatever a forward of its own asks of its input that these rows are not
        return None if not isinstance(module, nn.Linear) else answer
    finally:
        module.train(training)
    return answer
