"""Which modules of a model touch activations, and hooks that hand over their calls: the ground under `propagation`."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from beyond_outliers.metrics import forward, is_linear

FUNCTIONAL = " (functional parts)"  # ends the kind of a row for what a module does between the calls of its children


def floats(*values) -> list[Tensor]:
    """Floating-point tensors anywhere in nested tuples, lists and mappings, in order."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found += [value] if value.is_floating_point() else []
        elif isinstance(value, (tuple, list)):
            found += floats(*value)
        elif isinstance(value, dict):
            found += floats(*value.values())
    return found


def clones(value):
    """The same nested structure with every tensor copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        copies = [clones(item) for item in value]
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
    return {key: clones(item) for key, item in value.items()} if isinstance(value, dict) else value


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


@contextmanager
def opened_attention(attention: str, *models: nn.Module) -> Iterator[None]:
    """Lets the attention mixing of this project's model run as visible modules, if asked to."""
    mixers = [m for model in models for m in model.modules() if getattr(m, "opened", None) is False]
    try:
        for mixer in mixers if attention == "open" else ():
            mixer.opened = True
        yield
    finally:
        for mixer in mixers:
            mixer.opened = False


# ------------------------------------------------------------------------------------------------ recording calls


@dataclass
class Call:
    """One call of a module: what went in, what came out, and the tensors' version counters."""

    args: tuple
    kwargs: dict
    output: object = None
    versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def note(self, *values):
        self.versions += [(x, x._version) for x in floats(*values)]


class Tape:
    """Hooks that hand every finished call of the watched modules to `finish(name, number, call)`.

    Tensors are kept by reference. `clone` is set once a model has been caught changing one in place; then copies are.
    """

    def __init__(self, model: nn.Module, names, finish):
        self.model, self.names, self.finish = model, names, finish
        self.clone = False
        self.paused = False  # while modules are evaluated on other inputs, their children's hooks keep still
        self.open: list[Call] = []
        self.count: Counter = Counter()

    def run(self, batch):
        self.count.clear()
        handles = []
        for name in self.names:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaver(name), with_kwargs=True))
        try:
            forward(self.model, batch)
        finally:
            self.open.clear()
            for handle in handles:
                handle.remove()

    def _enter(self, module, args, kwargs):
        if not self.paused:
            call = Call(*clones((args, kwargs))) if self.clone else Call(args, kwargs)
            call.note(args, kwargs)
            self.open.append(call)

    def _leaver(self, name):
        def leave(module, args, kwargs, output):
            if self.paused:
                return
            call = self.open.pop()
            call.output = clones(output) if self.clone else output
            call.note(output)
            self.count[name] += 1
            self.paused = True
            try:
                self.finish(name, self.count[name], call)
            finally:
                self.paused = False

        return leave


def record(tape: Tape, calls: dict, batch):
    """Fills `calls` with one forward pass; a second time, on copies, if the first shows tensors changed in place."""
    calls.clear()
    tape.run(batch)
    if not tape.clone and any(x._version != version for call in calls.values() for x, version in call.versions):
        tape.clone = True
        record(tape, calls, batch)
