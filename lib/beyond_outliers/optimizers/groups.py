"""Parameter groups by role, checks of parameters and hyperparameters, and the refusal of non-finite gradients.

Roles. "matrix": hidden weight matrices. "embedding": (vocabulary, width) tables and output heads. "vector": everything
of fewer than two dimensions (norm gains, QK scales). A group that names no role is split by number of dimensions into
"matrix" and "vector". Vectors are never decayed unless their group sets `weight_decay` itself: shrinking a norm's gain
or a QK scale is not the regularisation that the hyperparameter means.
"""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from beyond_outliers.config.parsing import Limit, between, choose, parse
from beyond_outliers.modules import find_head

ROLES = ("matrix", "embedding", "vector")
LARGE = 1e18  # a norm of all gradients from which on it is looked at closely; its square nears the end of float32


ZERO_OR_MORE = Annotated[float, between(0, math.inf)]
ABOVE_0 = Annotated[float, Limit("above 0", lambda value: value > 0)]
SHARE = Annotated[float, Limit("in [0, 1)", lambda value: 0 <= value < 1)]
TO_1 = Annotated[float, Limit("in (0, 1]", lambda value: 0 < value <= 1)]
COUNT = Annotated[int, between(1, 2**31)]
DTYPES = (None, torch.bfloat16, torch.float32, torch.float64)  # in float16 a large gradient is infinite, a small one 0
# the kind of every hyperparameter of the study's optimizers, as `parse` takes it; `RoleGroups.kinds` where a class has
# another one
KINDS: dict[str, Any] = {
    "lr": ZERO_OR_MORE,
    "weight_decay": ZERO_OR_MORE,
    "momentum": SHARE,
    "betas": Annotated[
        tuple[float, ...], Limit("of two in [0, 1)", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v))
    ],
    "eps": ZERO_OR_MORE,
    "ns_steps": Annotated[int, between(1, 100)],
    "ns_dtype": Annotated[object, Limit(str(DTYPES), DTYPES.__contains__)],
    "nesterov": bool,
    "constrained": bool,
    "scale": ABOVE_0,
    "embedding_lmo": Annotated[object, Limit("sign, column", ("sign", "column").__contains__)],
    "frequency": COUNT,
    "max_block_size": COUNT,
    "max_preconditioned_size": COUNT,
    "max_size_triangular": Annotated[int, between(0, 2**31)],
    "shampoo_beta": SHARE | None,
    "preconditioner_lr": TO_1,
    "update_probability": TO_1 | None,
}


class NonFiniteGradientError(ValueError):
    """A gradient holds NaN or infinity, or its squares do: the run has diverged. All is as before the step."""


class RoleGroups(torch.optim.Optimizer):
    """Base, alone or with one of torch's: groups carry `role`; non-finite gradients are refused.

    `role_defaults[role]` holds the settings in which a role's groups differ from the optimizer's defaults. `kinds`
    holds those hyperparameters whose valid values differ from KINDS. `squared`: the roles whose state keeps squares of
    gradients, which an overflow would spoil for good. `travels`: what a copy or a pickle takes along.
    """

    role_defaults: dict[str, dict] = {}  # noqa: RUF012  # never written to
    kinds: ClassVar[dict[str, Any]] = {}
    squared: ClassVar[tuple[str, ...]] = ()
    travels: ClassVar[tuple[str, ...]] = ("role_defaults",)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; `params` are tensors or (name, tensor) pairs. ValueError for parameters that cannot be used."""
        entries, of_group = param_group["params"], param_group.get("role")
        if of_group is not None:
            choose("role", of_group, ROLES)
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
        for name, kind in {**KINDS, **self.kinds}.items():
            if name in group:
                require(kind, name, group[name])
        least = max((torch.finfo(p.dtype).tiny for p in group["params"]), default=0.0)
        if 0 < group.get("eps", 0) < least:
            raise ValueError(f"eps must be 0 or at least {least:.2g}, the dtype's smallest, not {group['eps']!r}")

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.travels}}

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
        squared = {id(p) for group in self.param_groups if group["role"] in self.squared for p in group["params"]}
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


def lay_out(params: Iterable[Tensor]) -> None:
    """Gives gradients the strides of their parameters, where torch's fused kernels would read them in wrong order."""
    for p in params:
        if p.grad is not None and p.grad.stride() != p.stride():
            p.grad = torch.empty_like(p).copy_(p.grad)


def require(kind: Any, name: str, value: Any) -> None:
    """ValueError naming the hyperparameter, its value and what is valid, unless `value` is of the kind.

    A number may be a tensor of one, torch's word for a rate that a compiled step reads.
    """
    parse(value.item() if hasattr(value, "item") else value, kind, name)


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
