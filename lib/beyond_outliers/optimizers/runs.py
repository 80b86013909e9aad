"""Several runs stepped as one: optimizers of one class whose parameters are slices of the same stacked tensors.

On an accelerator the step of a small model is all launches of kernels; here as many are launched for many runs as for
one. What each optimizer holds (state, counts, random numbers) stays its own, as views and by `settle`, so that its
state_dict is that of a run by itself. Steps equal single ones up to the rounding of their sums.
"""

import torch
from torch import Tensor

from beyond_outliers.optimizers.adamw import AdamW
from beyond_outliers.optimizers.groups import LARGE, NonFiniteGradientError
from beyond_outliers.optimizers.psgd import PSGD
from beyond_outliers.optimizers.stacking import Stack, StackedOptimizer, cut_to_cache

Steppable = StackedOptimizer | AdamW


class RunsStack(Stack):
    """Parameters of one shape in several runs: `params` are leaves (runs, *shape), state is (len(params) * runs, ...).

    Learning rates are tensors (runs,). Counts are kept here and reach the runs' optimizers by `settle`.
    """

    def __init__(
        self, leaves: list[Tensor], per_parameter: list[dict]
    ):  # per parameter: all runs of the first leaf, ...
        self.runs = len(leaves[0])
        super().__init__(leaves, [{k: v for k, v in entry.items() if k != "step"} for entry in per_parameter])
        self.counts = {key: int(value) for key, value in per_parameter[0].items() if key not in self.state}
        if any(int(entry[key]) != value for entry in per_parameter for key, value in self.counts.items()):
            raise ValueError("runs that are stepped as one have taken equally many steps; these have not")
        for entry, own in zip(per_parameter, self.per_parameter, strict=True):
            entry |= {key: own[key] for key in self.state}  # views of the stacked state
        self.entries = per_parameter

    @property
    def shape(self) -> torch.Size:
        return self.params[0].shape[1:]

    def count(self, key: str) -> int:
        return self.counts[key]

    def put(self, key: str, value: int) -> None:
        self.counts[key] = value

    def settle(self) -> None:
        """Writes the counts into the states of all runs."""
        for entry in self.entries:
            for key, value in self.counts.items():
                entry[key] = torch.full_like(entry[key], value) if isinstance(entry[key], Tensor) else value

    def gradient(self) -> Tensor:
        gradients = [leaf.grad for leaf in self.params if leaf.grad is not None]  # all have one, see `step`
        return gradients[0] if len(gradients) == 1 else torch.cat(gradients)

    def descend(self, update: Tensor, lr: Tensor) -> None:  # type: ignore[override]  # a rate a run
        scaled = update.unflatten(0, (-1, self.runs)) * self._a_run(lr)
        torch._foreach_sub_(self.params, scaled.unbind())

    def decay(self, lr: Tensor, rate: float) -> None:  # type: ignore[override]  # a rate a run
        if rate:
            factor = self._a_run(1 - lr * rate)
            torch._foreach_mul_(self.params, [factor] * len(self.params))

    def _a_run(self, values: Tensor) -> Tensor:
        return values.to(self.params[0].dtype).view(-1, *[1] * len(self.shape))


class RunsAsOne:
    """`RunsAsOne(optimizers, leaves).step(factor)` steps every run at `factor` times its initial learning rates.

    optimizers: of one class, with equal hyperparameters but for learning rates, all at the same step. leaves: for every
    parameter of the first one (by id) a tensor (runs, *shape) with the gradients of all runs, of which the runs'
    parameters are slices. ValueError for optimizers that cannot be stepped as one.
    """

    def __init__(self, optimizers: list[Steppable], leaves: dict[int, Tensor]):
        self.optimizers, self.leaves, first = optimizers, leaves, optimizers[0]
        if not isinstance(first, Steppable):
            raise ValueError(f"runs of {type(first).__name__} cannot be stepped as one; valid: the study's six")
        for other in optimizers[1:]:
            if type(other) is not type(first) or _settings(other) != _settings(first):
                raise ValueError("runs that are stepped as one differ in learning rates alone, not in hyperparameters")
        generators = [o.generator.get_state() for o in optimizers if isinstance(o, PSGD)]
        if any(not torch.equal(state, generators[0]) for state in generators):
            raise ValueError("runs that are stepped as one draw the same random numbers; these generators differ")
        device = next(iter(leaves.values())).device
        self.rates = [
            torch.tensor([group["initial_lr"] for group in groups], dtype=torch.float64, device=device)
            for groups in zip(*(o.param_groups for o in optimizers), strict=True)
        ]
        self.stacks = [self._stacks_of(number) for number in range(len(self.rates))]

    def _stacks_of(self, number: int) -> list[RunsStack]:
        """A group's stacks, cut as those of a run by itself are: its random numbers are drawn stack by stack."""
        groups = [optimizer.param_groups[number] for optimizer in self.optimizers]
        for optimizer, group in zip(self.optimizers, groups, strict=True):
            for p in group["params"]:
                if not optimizer.state[p]:
                    count = torch.zeros((), device=p.device) if isinstance(optimizer, AdamW) else 0
                    optimizer.state[p] = {"step": count, **optimizer.init_state(group, p)}
        first: list[Tensor] = groups[0]["params"]
        buckets: dict[tuple, list[int]] = {}
        for place, p in enumerate(first):
            buckets.setdefault((p.shape, p.dtype), []).append(place)
        found = []
        for places in buckets.values():
            parts = cut_to_cache([first[place] for place in places], self.optimizers[0].state[first[places[0]]])
            for part in parts:
                mine, places = places[: len(part)], places[len(part) :]
                entries = [
                    o.state[g["params"][at]] for at in mine for o, g in zip(self.optimizers, groups, strict=True)
                ]
                found.append(RunsStack([self.leaves[id(first[at])] for at in mine], entries))
        return found

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update of all runs; NonFiniteRuns, naming those at fault, before anything is changed."""
        self.refuse_nonfinite_gradients()
        first = self.optimizers[0]
        for group, rates, stacks in zip(first.param_groups, self.rates, self.stacks, strict=True):
            for stack in stacks:
                first.update({**group, "lr": rates * factor}, stack)

    def refuse_nonfinite_gradients(self) -> None:
        gradients = {key: leaf.grad for key, leaf in self.leaves.items() if leaf.grad is not None}  # all have one
        norms = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients.values()]
        guilty = {}
        for run, norm in enumerate(torch.stack(norms).sum(0).tolist()):
            if not norm < LARGE:
                optimizer = self.optimizers[run]
                for own, first in zip(optimizer.param_groups, self.optimizers[0].param_groups, strict=True):
                    for p, q in zip(own["params"], first["params"], strict=True):
                        p.grad = gradients[id(q)][run]
                try:
                    optimizer.refuse_nonfinite_gradients()
                except NonFiniteGradientError as error:
                    guilty[run] = error
                optimizer.zero_grad(set_to_none=True)
        if guilty:
            raise NonFiniteRuns(guilty)

    def settle(self) -> None:
        """Makes every run's optimizer what it would be by itself; before its state_dict is taken."""
        for stacks in self.stacks:
            for stack in stacks:
                stack.settle()
        for optimizer in self.optimizers[1:]:
            if isinstance(optimizer, PSGD) and isinstance(self.optimizers[0], PSGD):
                optimizer.generator.set_state(self.optimizers[0].generator.get_state())


class NonFiniteRuns(ValueError):
    """`errors`: the NonFiniteGradientError of every run (by number) whose gradient cannot be used."""

    def __init__(self, errors: dict[int, NonFiniteGradientError]):
        super().__init__("; ".join(f"run {run}: {error}" for run, error in errors.items()))
        self.errors = errors


def _settings(optimizer: Steppable) -> list[dict]:
    own = ("params", "param_names", "lr", "initial_lr")
    shapes = [[p.shape for p in group["params"]] for group in optimizer.param_groups]
    groups = [{key: value for key, value in group.items() if key not in own} for group in optimizer.param_groups]
    return [{**group, "shapes": shape} for group, shape in zip(groups, shapes, strict=True)]
