"""What cannot be seen of an optimizer from outside, tried on a small model before it trains for hours.

print(trial("pytorch_optimizer:Lion", lr=1e-3))
"""

import io
from dataclasses import dataclass

import torch
from torch import Tensor

from beyond_outliers.model.olmo2 import Olmo2, Olmo2Config
from beyond_outliers.optimizers.groups import ROLES
from beyond_outliers.optimizers.registry import build_optimizer

STEPS = 12
INTERRUPTED_AT = 7  # no multiple of a short period: what happens every second or third step is out of step after it


@dataclass(frozen=True)
class Trial:
    """What `trial` found.

    distance: largest difference, over the largest weight, between a run that was interrupted and one that was not;
    None where the state could not be kept, for the `reason`. without_effect: which uses of the learning rate change
    nothing. unmoved: parameters that no step changes.
    """

    name: str
    repeats: bool
    distance: float | None
    reason: str
    without_effect: tuple[str, ...]
    unmoved: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.name}, on a small model for {STEPS} steps:"]
        lines.append("  a gradient with NaN or infinity is refused before anything changes (the study's own check)")
        lines += [f"  NOT guaranteed: {use}" for use in self.without_effect]
        if not self.repeats:
            lines.append("  NOT guaranteed: two runs from one seed end in different weights")
        if self.distance is None:
            lines.append(f"  NOT guaranteed: an interrupted run goes on; its state cannot be kept ({self.reason})")
        elif self.distance:
            lines.append(
                f"  NOT guaranteed: a resumed run ends in the same weights (here {self.distance:.1e} apart); the class "
                "keeps something outside of its state_dict, such as a random generator or a count"
            )
        else:
            lines.append("  a resumed run ends in bit-identical weights")
        if self.unmoved:
            lines.append(f"  parameters that it does not train: {', '.join(self.unmoved)}")
        return "\n".join(lines)


class _NotKept(Exception):
    """The state of an optimizer does not survive a file."""


def trial(name: str, lr: float, **hyper) -> Trial:
    """Trains with an optimizer (as `build_optimizer` takes it): twice, once interrupted, and at other rates.

    The interrupted run goes on in a new optimizer with the state of the old one after a round trip through a file, as
    training does, and with torch's random numbers from another seed. ValueError where it cannot be made, or where its
    step fails, naming the failure.
    """

    def run(rate: float, factor: float = 1.0, interrupted_at: int | None = None) -> tuple[dict[str, Tensor], set[str]]:
        """Weights at the end, and names of those that some step moved; the schedule's `factor` is 1 at first."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Olmo2(Olmo2Config(vocab_size=24, width=16, depth=1, n_heads=2))
            optimizer = build_optimizer(model, name, rate, **hyper)
            rates = [group["lr"] for group in optimizer.param_groups]
            generator, moved = torch.Generator().manual_seed(1), set()
            torch.manual_seed(2)
            for step in range(STEPS):
                if step == interrupted_at:
                    optimizer = _resumed(optimizer, build_optimizer(model, name, rate, **hyper))
                    torch.manual_seed(3)
                for group, base in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = base * (factor if step and group["role"] in roles else 1.0)
                ids = torch.randint(24, (8, 17), generator=generator)
                model.loss(ids[:, :-1], ids[:, 1:]).backward()
                before = {n: p.detach().clone() for n, p in model.named_parameters()}
                try:
                    optimizer.step()
                except Exception as error:  # whatever a class from outside may raise
                    raise ValueError(f"{name} fails in step {step}: {type(error).__name__}: {error}") from error
                moved |= {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
                optimizer.zero_grad(set_to_none=True)
        return {n: p.detach() for n, p in model.named_parameters()}, moved

    def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        """The largest difference of weights that the class itself trains."""
        return max((one[n] - other[n]).abs().max().item() for n in ours)

    roles = hyper.get("roles", ROLES)  # rates of the others are AdamW's, which have an effect in any case
    whole, moved = run(lr)
    groups = build_optimizer(Olmo2(Olmo2Config(vocab_size=24, width=16, depth=1, n_heads=2)), name, lr, **hyper)
    ours = [n for group in groups.param_groups if group["role"] in roles for n in group["param_names"]]
    repeats = not any(not torch.equal(p, again) for p, again in zip(whole.values(), run(lr)[0].values(), strict=True))
    without_effect = []
    if not apart(whole, run(lr / 2)[0]):
        without_effect.append(f"its learning rate has an effect: {lr:g} and {lr / 2:g} end in the same weights")
    if not apart(whole, run(lr, 0.5)[0]):
        without_effect.append("the schedule of its learning rate has an effect: a rate changed after step 1 has none")
    distance, reason = None, ""
    try:
        resumed, _ = run(lr, interrupted_at=INTERRUPTED_AT)
        distance = apart(whole, resumed) / max(p.abs().max().item() for p in whole.values())
    except _NotKept as error:
        reason = str(error)
    unmoved = tuple(n for n in whole if n not in moved)
    return Trial(name, repeats, distance, reason, tuple(without_effect), unmoved)


def _resumed(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`new` with the state of `old` after a round trip through a file; _NotKept where that fails."""
    file = io.BytesIO()
    try:
        torch.save(old.state_dict(), file)
        file.seek(0)
        new.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:  # pickle, torch and the class itself each have errors of their own
        raise _NotKept(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
    return new
