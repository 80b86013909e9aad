"""Parameter groups by role, checks of parameters and hyperparameters, and the refusal of non-finite gradients.

Roles. "matrix": hidden weight matrices. "embedding": (vocabulary, width) tables and output heads. "vector": everything
of fewer than two dimensions (norm gains, QK scales). A group that names no role is split by number of dimensions into
"matrix" and "vector". Vectors are never decayed unless their group sets `weight_decay` itself: shrinking a norm's gain
or a QK scale is not the regularisation that the hyperparameter means.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from beyond_outliers.modules import find_head

ROLES = ("matrix", "embedding", "vector")
LARGE = 1e18  # a norm of all gradients from which on it is looked at closely; its square nears the end of float32


class Limit(NamedTuple):
    """Which values a hyperparameter may have, in words and as a question."""

    words: str
    allows: Callable[[Any], bool]


def whole(least: int, most: int = 2**31) -> Limit:
    return Limit(
        f"a whole number from {least} to {most}",
        lambda value: type(value) is not bool and isinstance(value, Integral) and least <= int(value) <= most,
    )


def real(words: str, allows: Callable[[Any], bool]) -> Limit:
    """Of a number, or of a tensor of one (torch's word for a rate that a compiled step reads)."""
    return Limit(words, lambda v: type(v) is not bool and isinstance(v, Real | Tensor) and bool(allows(v)))


AT_LEAST_0 = real("at least 0", lambda value: 0 <= value < math.inf)
POSITIVE = real("positive", lambda value: 0 < value < math.inf)
SHARE = real("in [0, 1)", lambda value: 0 <= value < 1)
YES_OR_NO = Limit("True or False", lambda value: isinstance(value, bool))
# of every hyperparameter of the study's optimizers; `RoleGroups.limits` where a class has another one
LIMITS: dict[str, Limit] = {
    "lr": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "momentum": SHARE,
    "betas": Limit("two numbers in [0, 1)", lambda value: len(value) == 2 and all(map(SHARE.allows, value))),
    "eps": AT_LEAST_0,
    "ns_steps": whole(1, 100),
    "ns_dtype": Limit(  # in float16 a large gradient is infinite, and a small one 0
        "None, torch.bfloat16, torch.float32 or torch.float64",
        lambda value: value in (None, torch.bfloat16, torch.float32, torch.float64),
    ),
    "nesterov": YES_OR_NO,
    "constrained": YES_OR_NO,
    "scale": POSITIVE,
    "embedding_lmo": Limit("one of sign, column", lambda value: value in ("sign", "column")),
    "frequency": whole(1),
    "max_block_size": whole(1),
    "max_preconditioned_size": whole(1),
    "max_size_triangular": whole(0),
    "shampoo_beta": Limit("None or in [0, 1)", lambda value: value is None or SHARE.allows(value)),
    "preconditioner_lr": real("in (0, 1]", lambda value: 0 < value <= 1),
    "update_probability": Limit("None or in (0, 1]", lambda value: value is None or 0 < value <= 1),
}


class NonFiniteGradientError(ValueError):
    """A gradient holds NaN or infinity, or its squares do: the run has diverged. All is as before the step."""


class RoleGroups(torch.optim.Optimizer):
    """Base, alone or with one of torch's: groups carry `role`; non-finite gradients are refused.

    `role_defaults[role]` holds the settings in which a role's groups differ from the optimizer's defaults, `limits`
    those hyperparameters whose valid values differ from LIMITS.
    """

    role_defaults: Mapping[str, dict] = MappingProxyType({})
    limits: ClassVar[Mapping[str, Limit]] = MappingProxyType({})

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; `params` are tensors or (name, tensor) pairs. ValueError for parameters that cannot be used."""
        entries, of_group = param_group["params"], param_group.get("role")
        if of_group not in (None, *ROLES):
            raise ValueError(f"unknown role {of_group!r}: valid roles are {', '.join(ROLES)}")
        split: dict[str, list] = {of_group: []} if of_group else {"matrix": [], "vector": []}
        for entry in [entries] if isinstance(entries, Tensor) else entries:
            name, tensor = entry if isinstance(entry, tuple) else ("a parameter", entry)
            if not isinstance(tensor, Tensor):
                raise ValueError(f"a parameter must be a tensor, not {type(tensor).__name__}")
            role = of_group or ("vector" if tensor.ndim < 2 else "matrix")
            refuse_unusable(name, tensor, role)
            split[role].append(entry)
        for role, members in split.items():
            if members or role == of_group:
                vector = {"weight_decay": 0.0} if role == "vector" else {}
                group = {**vector, **self.role_defaults.get(role, {}), **param_group, "params": members, "role": role}
                super().add_param_group(group)
                try:
                    self.check(self.param_groups[-1])
                except ValueError as error:
                    self.param_groups.pop()
                    raise ValueError(f"group {len(self.param_groups)} (role {role}): {error}") from error

    def check(self, group: dict) -> None:
        """ValueError that names a hyperparameter of `group` which is out of range. Every group is asked."""
        for name, limit in {**LIMITS, **self.limits}.items():
            if name in group:
                require(limit, name, group[name])
        least = max((torch.finfo(p.dtype).tiny for p in group["params"]), default=0.0)
        if 0 < group.get("eps", 0) < least:
            raise ValueError(f"eps must be 0 or at least {least:.2g}, the dtype's smallest, not {group['eps']!r}")

    def squares(self, group: dict) -> bool:
        """Whether the group's state keeps squares of gradients, which an overflow would spoil for good."""
        return False

    def __getstate__(self) -> dict:  # what copy.deepcopy and pickle see
        return {**super().__getstate__(), "role_defaults": dict(self.role_defaults)}

    def state_shapes(self, group: dict, parameter: Tensor) -> dict[str, torch.Size]:
        """Shapes of the tensors that a parameter's state holds, by key, once it has taken a step; counts left out."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but a state that does not fit is refused before anything is changed.

        ValueError that names the parameter, the entry, its shape and the right one. Entries come out in the layout of
        their parameter, which torch's fused kernels take for granted.
        """
        self.refuse_foreign_state(state_dict)
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim and not value.is_contiguous():
                    state[key] = value.contiguous()

    def refuse_foreign_state(self, state_dict: dict) -> None:
        groups = state_dict["param_groups"]
        ours = [len(group["params"]) for group in self.param_groups]
        if (theirs := [len(group["params"]) for group in groups]) != ours:
            raise ValueError(f"the state has groups of {theirs} parameters, this optimizer of {ours}")
        names = iter([name for name, _ in self.named_parameters()])
        for group, saved in zip(self.param_groups, groups, strict=True):
            try:
                self.check({**group, **saved, "params": group["params"]})
            except ValueError as error:
                raise ValueError(f"the state's group of {len(saved['params'])} parameters: {error}") from error
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                name, state = next(names), state_dict["state"].get(index)
                if state:
                    _refuse_misfit(name, state, self.state_shapes(group, parameter))

    def evaluated(self, closure: Callable | None):
        """What every step begins with: the closure's loss, if there is one, and usable gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.refuse_nonfinite_gradients()
        return loss

    def precisely(self) -> torch.autocast:
        """The context of an update: autocast, in which a caller may step, would round its matrix products."""
        return torch.autocast(self.param_groups[0]["params"][0].device.type, enabled=False)

    def refuse_nonfinite_gradients(self) -> None:
        """NonFiniteGradientError that names the parameters whose gradient holds NaN or infinity, or overflows squared.

        One reduction for all parameters; they are looked at one by one only where it is not small.
        """
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise ValueError("a gradient is sparse; valid: dense ones, as of nn.Embedding(sparse=False)")
        if not gradients or torch.stack(torch._foreach_norm(gradients)).sum() < LARGE:
            return
        squared = {id(p) for group in self.param_groups if self.squares(group) for p in group["params"]}
        dtype = str(gradients[0].dtype).removeprefix("torch.")
        for what, spoilt in (
            ("non-finite gradient of", lambda p: not p.grad.isfinite().all()),
            (
                f"a gradient whose squares overflow {dtype}, of",
                lambda p: id(p) in squared and not p.grad.square().sum().isfinite(),
            ),
        ):
            if guilty := [name for name, p in self.named_parameters() if p.grad is not None and spoilt(p)]:
                more = f" and {len(guilty) - 5} more" if len(guilty) > 5 else ""
                raise NonFiniteGradientError(f"{what} {', '.join(guilty[:5])}{more}")

    def named_parameters(self):
        """(name, parameter) over all groups; a parameter that came without a name is called by group and position."""
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"parameter {j} of group {i}" for j in range(len(group["params"]))]
            yield from zip(names, group["params"], strict=True)


def _refuse_misfit(name: str, state: dict, shapes: dict[str, torch.Size]) -> None:
    """ValueError unless the tensors of a saved state are those that the optimizer keeps, in shape and name."""
    # counts are numbers or tensors without dimension, as are the states of parameters without any
    found = {k: value.shape for k, value in state.items() if isinstance(value, Tensor) and (value.ndim or k in shapes)}
    if missing := sorted(set(shapes) - set(found)):
        raise ValueError(
            f"the state of {name} lacks {', '.join(missing)}: it is another optimizer's or another shape's"
        )
    for key, shape in found.items():
        if key not in shapes:
            raise ValueError(f"the state of {name} has {key!r}; valid: {', '.join(shapes)}")
        if shape != shapes[key]:
            raise ValueError(f"the state of {name} has {key} of shape {tuple(shape)}, not {tuple(shapes[key])}")


def laid_out_like(p: Tensor) -> Tensor:
    """p's gradient with p's strides: a copy if it has others, which torch's fused kernels would read in wrong order."""
    assert p.grad is not None, "parameters without gradient are left alone"
    return p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad)


def require(limit: Limit, name: str, value: Any) -> None:
    """ValueError naming the hyperparameter, its value and what is valid, unless the limit allows it."""
    try:
        allowed = limit.allows(value)
    except TypeError:  # of another kind
        allowed = False
    if not allowed:
        raise ValueError(f"{name} must be {limit.words}, not {value!r}")


def refuse_unusable(name: str, tensor: Tensor, role: str) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        # Loading a state_dict casts the state to the parameter's dtype, so half-precision weights could not resume.
        raise ValueError(f"{name} is {tensor.dtype}: train float32 (or float64) weights under autocast instead")
    if not tensor.is_contiguous():
        # torch's fused kernels would write beside a strided view, and read a transposed one in the wrong order
        strides = f"strides {tensor.stride()} for the shape {tuple(tensor.shape)}"
        raise ValueError(f"{name} is no contiguous tensor ({strides}): train a contiguous copy instead")
    if tensor.ndim > 2 or (tensor.ndim < 2) != (role == "vector"):
        valid = "fewer than 2 dimensions" if role == "vector" else "2 dimensions"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: role {role!r} takes {valid}")


def parameter_groups(model: nn.Module) -> list[dict]:
    """`model`'s trainable parameters by role, in the model's order, as (name, tensor) pairs; empty roles left out.

    embedding: weights of nn.Embedding (a tied head is the same tensor, listed once) and of an untied output head (see
    `find_head`); matrix: every other two-dimensional parameter; vector: ndim < 2.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = find_head(model)
    if head is not None:
        tables.add(id(model.get_submodule(head)._parameters.get("weight")))
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"matrix": [], "embedding": [], "vector": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = "vector" if parameter.ndim < 2 else "embedding" if id(parameter) in tables else "matrix"
            groups[role].append((name, parameter))
    return [{"params": members, "role": role} for role, members in groups.items() if members]
