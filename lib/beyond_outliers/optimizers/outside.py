"""Optimizers from outside by `module:Class`: over the roles that they are given, AdamW over the rest.

What the study asks of its own optimizers is asked of them, too: parameters that can be trained, hyperparameters by
name, no step on a gradient that holds NaN or infinity, a state that fits. What cannot be seen from outside is tried on
a small model (see `trial`): whether a resumed run goes on bit by bit, and whether every parameter is trained.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from beyond_outliers.config.loading import load_own
from beyond_outliers.config.parsing import choose
from beyond_outliers.optimizers.adamw import AdamW
from beyond_outliers.optimizers.groups import ROLES, RoleGroups, lay_out

KEYS = ("roles", "rest_lr", "groups")  # hyperparameters of `Outside` itself


def load_optimizer(source: str) -> tuple[Callable, Mapping[str, inspect.Parameter]]:
    """The class (or function) that `source` names, and its arguments; ValueError for what cannot be called."""
    factory = load_own(source, "optimizer")
    try:
        return factory, inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} is no optimizer ({error}); valid: a class of torch.optim's form") from None


def check_hyperparameters(
    name: str, parameters: Mapping[str, inspect.Parameter], given: Iterable[str], more: Iterable[str] = ()
) -> None:
    """ValueError for hyperparameters that a class does not take, naming those that it does, and `more` of others."""
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return  # it takes everything, and says itself what it cannot use
    valid = [*(key for key in list(parameters)[1:] if key not in ("lr", "weight_decay")), *more]
    if unknown := sorted(set(given) - set(valid)):
        raise ValueError(f"{name} has no hyperparameter {', '.join(unknown)}; valid: {', '.join(valid)}")


class Outside(RoleGroups):
    """`source` ("module:Class") over the groups of `roles`, this package's AdamW over the others.

    Arguments: `params` as for every optimizer here; `rest_lr`: AdamW's learning rate for roles that `source` does not
    get (needed where there are any and their groups have no rate of their own); `groups`: by role, what else the class
    wants to read in a group ({"matrix": {"use_muon": True}}); `hyper` goes to the class. Weight decay
    other than 0 is an error where the class does not take it. ValueError, too, for a class that changes parameters when
    it is made, puts them into other groups, or wants to be told when it trains and when it is evaluated.
    """

    travels = ("role_defaults", "source", "roles", "parts")

    def __init__(
        self,
        params,
        source: str,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        roles: Sequence[str] = ROLES,
        rest_lr: float | None = None,
        groups: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        **hyper,
    ):
        for role in (*roles, *groups):
            choose("role", role, ROLES)
        factory, arguments = load_optimizer(source)
        check_hyperparameters(source, arguments, hyper, KEYS)
        if weight_decay and "weight_decay" not in arguments:
            raise ValueError(f"weight_decay of {source}, which has none, must be 0, not {weight_decay!r}")
        self.source, self.roles = source, tuple(roles)
        rest = {"lr": math.nan if rest_lr is None else rest_lr}
        self.role_defaults = {role: rest for role in ROLES if role not in roles}
        self.parts: list[torch.optim.Optimizer] = []
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        ours, others = self._groups()
        if not ours:
            raise ValueError(f"no parameter has a role of {', '.join(roles)}, which {source} is to train")
        before = [p.detach().clone() for group in ours for p in group["params"]]
        try:
            # a class without the argument lr reads the rate in its groups
            rate = {"lr": lr} if {"lr", "kwargs"} & set(arguments) else {}
            made = factory(_plain(ours, "weight_decay" in arguments, groups), **rate, **hyper)
        except (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{source} cannot be made of parameters and lr ({reason}); valid: an optimizer") from error
        self._refuse_strange(made, ours, before)
        self.parts = [made, *([AdamW(_plain(others, True, {}), lr=lr)] if others else [])]

    def check(self, group: dict) -> None:
        if group["role"] not in self.roles and math.isnan(group["lr"]):
            left = ", ".join(role for role in ROLES if role not in self.roles)
            raise ValueError(
                f"{self.source} trains {', '.join(self.roles)}; give rest_lr, the learning rate of AdamW for {left}"
            )
        super().check(group)

    def _groups(self) -> tuple[list[dict], list[dict]]:
        """Groups of the class from outside, and of AdamW."""
        ours = [group for group in self.param_groups if group["role"] in self.roles]
        return ours, [group for group in self.param_groups if group["role"] not in self.roles]

    def _refuse_strange(self, made: Any, groups: list[dict], before: list[Tensor]) -> None:
        if not isinstance(made, torch.optim.Optimizer):
            raise ValueError(f"{self.source} gives a {type(made).__name__}; valid: a torch.optim.Optimizer")
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure and closure.default is inspect.Parameter.empty:
            raise ValueError(f"{self.source} evaluates the loss itself (step needs a closure): that is not supported")
        kept = [{id(p) for p in group["params"]} for group in made.param_groups]
        if kept != [{id(p) for p in group["params"]} for group in groups]:
            raise ValueError(f"{self.source} puts the parameters into groups of its own: its rates cannot be scheduled")
        if callable(getattr(made, "train", None)) and callable(getattr(made, "eval", None)):
            raise ValueError(f"{self.source} keeps other weights for evaluation (train, eval): that is not supported")
        after = [p for group in groups for p in group["params"]]
        if not all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
            raise ValueError(f"{self.source} changes the weights when it is made: every optimizer starts from the same")

    def step(self, closure: Callable | None = None):
        """One update of all parts. Returns the closure's loss. NonFiniteGradientError before anything is changed."""
        loss = self.evaluated(closure)
        for made, groups in zip(self.parts, self._groups(), strict=False):
            for own, group in zip(made.param_groups, groups, strict=True):
                own["lr"] = group["lr"]  # as the schedule set it
                lay_out(group["params"])
            with self.precisely():
                made.step()
        return loss

    def state_dict(self) -> dict:
        """Groups as torch has them, the shapes of the parameters, and the states of the parts."""
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"]]
        own = {"source": self.source, "shapes": shapes, "parts": [part.state_dict() for part in self.parts]}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict) -> None:
        """ValueError, before anything is changed, for the state of another class or of parameters of other shapes."""
        if (source := state_dict.get("source")) != self.source:
            raise ValueError(f"the state's source must be {self.source}, not {source!r}")
        theirs = [tuple(shape) for shape in state_dict["shapes"]]
        if theirs != (shapes := self.state_dict()["shapes"]):
            raise ValueError(f"the state is of parameters of the shapes {theirs}, these are of {shapes}")
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})


def _plain(groups: list[dict], decays: bool, settings: Mapping[str, Mapping[str, Any]]) -> list[dict]:
    """Groups as a class from outside gets them: no names, no roles, but the settings of its role."""
    keys = ("params", "lr", *(["weight_decay"] if decays else []))
    return [{key: group[key] for key in keys} | dict(settings.get(group["role"], {})) for group in groups]
