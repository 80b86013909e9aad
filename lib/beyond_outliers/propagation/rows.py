"""Which modules of a model touch activations: the rows of a decomposition, and their kinds."""

from collections.abc import Iterator

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from beyond_outliers.modules import forward, is_linear
from beyond_outliers.propagation.recording import floats

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
class _Trace(TorchDispatchMode):
    """Watches one forward pass: which modules touch activations, which call others, which compute between the calls.

    An activation is whatever descends from an embedding or from a floating-point input of the model; tables and masks
    made from positions alone are none.
    """

    def __init__(self, model: nn.Module, batch):
        super().__init__()
        self.model, self.batch = model, batch
        self.names = {module: name for name, module in model.named_modules()}
        self.open: list[str] = []
        self.seen: set[str] = set()  # modules whose output is an activation
        self.parents: set[str] = set()  # modules that call modules
        self.functional: set[str] = set()  # modules that compute on activations themselves
        self.activations = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        operator = function.overloadpacket.__name__
        if operator == "embedding" or any(x in self.activations for x in floats(args, kwargs)):
            for x in floats(output):
                self.activations[x] = True
            if operator not in _MOVES:
                self.functional.add(self.open[-1])
        return output

    def _enter(self, module, args):
        self.parents.update(self.open[-1:])
        self.open.append(self.names[module])

    def _leave(self, module, args, output):
        name = self.open.pop()
        if any(x in self.activations for x in floats(output)):
            self.seen.add(name)

    def run(self) -> "_Trace":
        handles = [module.register_forward_pre_hook(self._enter) for module in self.names]
        handles += [module.register_forward_hook(self._leave) for module in self.names]
        inputs = self.batch if isinstance(self.batch, (tuple, dict)) else (self.batch,)
        for x in floats(inputs):
            self.activations[x] = True
        try:
            with self:
                forward(self.model, self.batch)
        finally:
            for handle in handles:
                handle.remove()
        return self


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
    if not name or any(isinstance(part, nn.ModuleList) for part in module.modules()):
        return "model"
    if type(module).__module__ == nn.ReLU.__module__ and not _is_attention(module):
        return "activation"
    return _OWN_KINDS.get(label) or next((kind for word, kind in _KINDS.items() if word in label), label)


def watched(model: nn.Module, batch, granularity: str, attention: str) -> dict[str, str]:
    """name -> kind of the modules that get rows: units that touch activations, and what computes around them."""
    trace = _Trace(model, batch).run()
    idle = (nn.Identity, nn.modules.dropout._DropoutNd)  # in evaluation they hand on what they get
    units = {trace.names[module] for module in _units(model, granularity, attention) if not isinstance(module, idle)}
    around = {""} | {".".join(name.split(".")[:i]) for name in units for i in range(1, name.count(".") + 1)}
    kinds = {}
    for module, name in trace.names.items():
        if name in trace.seen and (name in units or name in around & trace.functional):
            partial = name not in units and name in trace.parents
            kinds[name] = _kind(name, module) + (FUNCTIONAL if partial else "")
    return kinds
