"""What all the optimizers share: parameter groups by role, the gradient check, and stacks of same-shaped parameters.

Roles. "matrix": hidden weight matrices. "embedding": (vocabulary, width) tables and output heads. "vector": everything
of fewer than two dimensions (norm gains, QK scales). A group that names no role is split by number of dimensions into
"matrix" and "vector". Vectors are never decayed unless their group sets `weight_decay` itself: shrinking a norm's gain
or a QK scale is not the regularisation that the hyperparameter means.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

CPU_STACK_ELEMENTS = 2**18  # of the largest stacked tensor: 1 MiB in float32
ROLES = ("matrix", "embedding", "vector")


class NonFiniteGradientError(ValueError):
    """A gradient holds NaN or infinity: the run has diverged. Parameters and state are as before the step."""


class RoleGroups:
    """Mixin for `torch.optim.Optimizer`: groups carry `role` and `initial_lr`; non-finite gradients are refused.

    `role_defaults[role]` holds the settings in which a role's groups differ from the optimizer's defaults.
    """

    role_defaults: ClassVar[dict[str, dict]] = {}

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; `params` are tensors or (name, tensor) pairs. ValueError for parameters that cannot be used."""
        entries = param_group["params"]
        entries = [entries] if isinstance(entries, Tensor) else list(entries)
        if "role" in param_group:
            split = {param_group["role"]: entries}
        else:
            split = {"matrix": [], "vector": []}
            for entry in entries:
                split["vector" if _tensor(entry).ndim < 2 else "matrix"].append(entry)
        for role, members in split.items():
            if role not in ROLES:
                raise ValueError(f"unknown role {role!r}: valid roles are {', '.join(ROLES)}")
            for entry in members:
                _refuse_unusable(entry, role)
            if members or role == param_group.get("role"):
                vector = {"weight_decay": 0.0} if role == "vector" else {}
                group = {**vector, **self.role_defaults.get(role, {}), **param_group, "params": members, "role": role}
                super().add_param_group(group)
                group.setdefault("initial_lr", group["lr"])

    def refuse_nonfinite_gradients(self) -> None:
        """NonFiniteGradientError that names the parameters whose gradient holds NaN or infinity.

        One reduction for all parameters; they are looked at one by one only after it failed.
        """
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients or torch.stack(torch._foreach_norm(gradients)).sum().isfinite():
            return
        guilty = [
            name for name, p in self.named_parameters() if p.grad is not None and not p.grad.isfinite().all().item()
        ]
        if guilty:  # none: every entry is finite, and only the sum of squares overflowed
            more = f" and {len(guilty) - 5} more" if len(guilty) > 5 else ""
            raise NonFiniteGradientError(f"non-finite gradient of {', '.join(guilty[:5])}{more}")

    def named_parameters(self):
        """(name, parameter) over all groups; a parameter that came without a name is called by group and position."""
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"parameter {j} of group {i}" for j in range(len(group["params"]))]
            yield from zip(names, group["params"], strict=True)


class Stack:
    """Same-shaped parameters of one group that have taken equally many steps, and their state, stacked along dim 0.

    `state[key]` is (N, ...); each parameter's own entry in the optimizer's state is a view of its slice, so that
    writing in place here keeps `state_dict` right. Counts are plain integers, equal for all N. `derived` is free for
    what can be recomputed from the state.
    """

    def __init__(self, params: list[Tensor], per_parameter: list[dict]):
        self.params = params
        self.per_parameter = per_parameter
        self.state = {}
        self.derived = {}
        for key, value in per_parameter[0].items():
            if isinstance(value, Tensor):
                self.state[key] = torch.stack([entry[key] for entry in per_parameter])
                for entry, view in zip(per_parameter, self.state[key].unbind(), strict=True):
                    entry[key] = view

    def advance(self) -> int:
        """Count a step and return its number, from 1."""
        for entry in self.per_parameter:
            entry["step"] += 1
        return self.count("step")

    def count(self, key: str) -> int:
        return self.per_parameter[0][key]

    def gradient(self) -> Tensor:
        """(N, *shape). May alias `p.grad`: never write to it."""
        if len(self.params) == 1:
            return self.params[0].grad.unsqueeze(0)
        return torch.stack([p.grad for p in self.params])

    def descend(self, update: Tensor, lr: float) -> None:
        """p <- p - lr * update, with `update` (N, *shape)."""
        torch._foreach_add_(self.params, update.unbind(), alpha=-lr)

    def decay(self, factor: float) -> None:
        """p <- factor * p; nothing to do at 1."""
        if factor != 1.0:
            torch._foreach_mul_(self.params, factor)


class StackedOptimizer(RoleGroups, torch.optim.Optimizer):
    """Base of the matrix optimizers: finds the stacks and calls `update(group, stack)` for each.

    A subclass gives `init_state(group, parameter) -> dict of tensors` and `update(group, stack)`. Parameters without
    gradient are left alone; which ones have a gradient may change from step to step.
    """

    def __init__(self, params, defaults: dict, role_defaults: dict[str, dict] | None = None):
        self.role_defaults = role_defaults or {}
        self._stacks = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._stacks = {}  # their views are stale: loading (and copying) gives every parameter new tensors

    def init_state(self, group: dict, parameter: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def update(self, group: dict, stack: Stack) -> None:
        raise NotImplementedError

    def stacks(self, group: dict) -> list[Stack]:
        """The group's stacks over the parameters that have a gradient; rebuilt only when that set changes."""
        live = [p for p in group["params"] if p.grad is not None]
        signature = [id(p) for p in live]
        cached = self._stacks.get(id(group))
        if cached is None or cached[0] != signature:
            buckets = {}
            for p in live:
                if not self.state[p]:
                    self.state[p] = {"step": 0, **self.init_state(group, p)}
                counts = [value for value in self.state[p].values() if not isinstance(value, Tensor)]
                key = (p.shape, p.dtype, p.device, *counts)
                buckets.setdefault(key, []).append(p)
            parts = [part for same in buckets.values() for part in cut_to_cache(same, self.state[same[0]])]
            found = [Stack(part, [self.state[p] for p in part]) for part in parts]
            self._stacks[id(group)] = cached = (signature, found)
        return cached[1]

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update. Returns the closure's loss. NonFiniteGradientError before anything is changed."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.refuse_nonfinite_gradients()
        for group in self.param_groups:
            for stack in self.stacks(group):
                self.update(group, stack)
        return loss


def cut_to_cache(params: list[Tensor], state: dict) -> list[list[Tensor]]:
    """Same-shaped parameters in parts that are worth stacking: all at once, but on CPUs only what stays in cache.

    There, stacking saves the overhead of many small calls; temporaries beyond the cache cost more than that.
    `state` is one parameter's: its largest tensor counts.
    """
    if params[0].device.type != "cpu":
        return [params]
    largest = max([1] + [value.numel() for value in state.values() if isinstance(value, Tensor)])
    count = max(1, CPU_STACK_ELEMENTS // largest)
    return [params[start : start + count] for start in range(0, len(params), count)]


def strips(n: int) -> list[slice]:
    """Cuts of 0..n for products with structure: more of them save more work, but small products run slower."""
    count = 1 if n < 256 else 2 if n < 512 else 4
    size = -(-n // count)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def add_gram_(out: Tensor, x: Tensor, beta: float, alpha: float) -> Tensor:
    """out <- beta out + alpha x x^T in place, for symmetric out: (N, n, n) and (N, n, k); beta 0 ignores old content.

    Only strips up to the diagonal are computed, the rest is mirrored.
    """
    for r in strips(x.shape[1]):
        out[:, r, : r.stop].baddbmm_(x[:, r], x[:, : r.stop].mT, beta=beta, alpha=alpha)
        if r.start:
            out[:, : r.start, r] = out[:, r, : r.start].mT
    return out


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N, n), ascending, and eigenvectors (N, n, n) of symmetric matrices; in float64 if float32 fails."""
    try:
        return torch.linalg.eigh(x)
    except torch.linalg.LinAlgError:
        values, vectors = torch.linalg.eigh(x.double())
        return values.to(x.dtype), vectors.to(x.dtype)


def laid_out_like(p: Tensor) -> Tensor:
    """p's gradient with p's strides: a copy if it has others, which torch's fused kernels would read in wrong order."""
    return p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad)


def require(valid: bool, name: str, value, expected: str) -> None:
    """ValueError naming the hyperparameter, its value and what is valid, unless `valid`."""
    if not valid:
        raise ValueError(f"{name} must be {expected}, not {value!r}")


def require_common(lr: float, weight_decay: float) -> None:
    require(lr >= 0, "lr", lr, "at least 0")
    require(weight_decay >= 0, "weight_decay", weight_decay, "at least 0")


def require_betas(betas: tuple[float, float], name: str = "betas") -> None:
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), name, betas, "two numbers in [0, 1)")


def _tensor(entry) -> Tensor:
    return entry[1] if isinstance(entry, tuple) else entry


def _refuse_unusable(entry, role: str) -> None:
    tensor = _tensor(entry)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"a parameter must be a tensor, not {type(tensor).__name__}")
    name = entry[0] if isinstance(entry, tuple) else "a parameter"
    if tensor.dtype not in (torch.float32, torch.float64):
        # Loading a state_dict casts the state to the parameter's dtype, so half-precision weights could not resume.
        raise ValueError(f"{name} is {tensor.dtype}: train float32 (or float64) weights under autocast instead")
    if tensor.ndim > 2 or (tensor.ndim < 2) != (role == "vector"):
        valid = "fewer than 2 dimensions" if role == "vector" else "2 dimensions"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: role {role!r} takes {valid}")
