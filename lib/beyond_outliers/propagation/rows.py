"""Which modules of a model touch activations: the rows of a decomposition, and their kinds."""

from collections.abc import Iterator

from torch import Tensor, nn

from beyond_outliers.modules import is_linear
from beyond_outliers.passes import as_real, floats, main_output
from beyond_outliers.propagation.selection import Watch

FUNCTIONAL = " (functional parts)"  # ends the kind of a row for what a module does between the calls of its children


# ------------------------------------------------------------------------------------------ which modules are rows

# aten operators that only move, copy or recast numbers: between modules they are no function of their own
# fmt: off
_MOVES = frozenset([
    "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "cat", "clone", "copy_", "detach",
    "empty_like", "expand", "index", "index_select", "lift_fresh", "new_empty", "new_zeros", "permute", "repeat",
    "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind",
    "unfold", "unsqueeze", "view", "zeros_like",
])
# fmt: on


class _Trace(Watch):
    """Watches one forward pass: which modules touch activations, which call others, which compute between the calls.

    output: what the model gave. last: the name and the output of the last of `units` to finish.
    """

    def __init__(self, model: nn.Module, batch, units: set[nn.Module]):
        super().__init__(model, batch)
        self.units = units
        self.seen: set[str] = set()  # modules whose output is an activation
        self.parents: set[str] = set()  # modules that call modules
        self.functional: set[str] = set()  # modules that compute on activations themselves
        self.last: list[Tensor] = []
        self.output = self.run()

    def computed(self, operator: str):
        if operator not in _MOVES and self.open:
            self.functional.add(self.open[-1][0])

    def enter(self, module, args, kwargs):
        self.parents.update(name for name, _ in self.open[-1:])
        super().enter(module, args, kwargs)

    def leave(self, module, args, kwargs, output):
        super().leave(module, args, kwargs, output)
        found = floats(output)
        if any(x in self.activations for x in found):
            self.seen.add(self.names[module])
            if module in self.units:
                self.last = found

    def ends_with_the_last(self) -> bool:
        """Whether the model's answer holds the numbers that the last unit gave, in whatever shape."""
        answer = [as_real(x).double() for x in main_output(self.output)]
        last = [as_real(x).double() for x in self.last]
        return {(x.numel(), float(x.sum())) for x in answer} <= {(x.numel(), float(x.sum())) for x in last}


def _is_attention(module: nn.Module) -> bool:
    """An attention module with its projections: named so, and linear layers are its own children."""
    label = type(module).__name__.lower()
    return ("attention" in label or "attn" in label) and any(is_linear(child) for child in module.children())


def _units(model: nn.Module, granularity: str, attention: str) -> Iterator[nn.Module]:
    """Modules that are looked at as a whole.

    Blocks are the elements of the outermost lists (ModuleList, Sequential), sublayers the children of blocks.
    """
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    depth = {"block": 1, "sublayer": 2}.get(granularity)

    def walk(module: nn.Module, level: int) -> Iterator[nn.Module]:  # level 0: above the blocks; 1: a block
        is_list = isinstance(module, lists)
        whole = not any(True for _ in module.children())
        if depth is None:
            whole |= attention == "unit" and _is_attention(module)
        elif level:
            whole |= level >= depth and not is_list
        else:
            whole |= module is not model and not any(isinstance(child, lists) for child in module.modules())
        if whole:
            yield module
        else:
            for child in module.children():
                yield from walk(child, level + 1 if level or is_list else 0)

    yield from walk(model, 0)


_OWN_KINDS = {"residualadd": "residual add", "attentionmix": "mixing", "mix": "mixing"}
_KINDS = {"norm": "norm", "attention": "attention", "attn": "attention", "mlp": "mlp", "rotary": "rotary"}
_KINDS |= {"relu": "activation", "activation": "activation", "block": "block", "layer": "block"}


def _kind(name: str, module: nn.Module) -> str:
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


def watched(model: nn.Module, batch, granularity: str, attention: str) -> tuple[dict[str, str], set[str]]:
    """name -> kind of the modules that get rows: units that touch activations, and what computes around them.

    Beside them the names of those whose inputs are rows that the model picks (see `selection`). Where the model's
    answer is not what the last unit gave, such as beside a pooler, the model itself has the last row.
    """
    idle = (nn.Identity, nn.modules.dropout._DropoutNd)  # in evaluation they hand on what they get
    whole = {module for module in _units(model, granularity, attention) if not isinstance(module, idle)}
    trace = _Trace(model, batch, whole)
    units = {trace.names[module] for module in whole}
    around = {""} | {".".join(name.split(".")[:i]) for name in units for i in range(1, name.count(".") + 1)}
    if not trace.ends_with_the_last():
        trace.functional.add("")
    kinds = {}
    for module, name in trace.names.items():
        if name in trace.seen and (name in units or name in around & trace.functional):
            partial = name not in units and name in trace.parents
            kinds[name] = _kind(name, module) + (FUNCTIONAL if partial else "")
    return kinds, {name for name, calls in trace.picked.items() if any(calls)} & set(kinds)
