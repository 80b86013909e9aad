"""What cannot be seen of an optimizer from outside, tried on a small model before it trains for hours.

print(trial("pytorch_optimizer:Lion", lr=1e-3))
"""

import io
from dataclasses import dataclass

import torch
from torch import Tensor

from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.optimizers.registry import build_optimizer

STEPS = 12
INTERRUPTED_AT = 7  # no multiple of a short period: what happens every second or third step is out of step after it


@dataclass(frozen=True)
class Trial:
    """What `trial` found. `distance`: largest difference, over the largest weight, between a run that was interrupted
    and one that was not; None where the state could not be kept, for the `reason`."""

    name: str
    repeats: bool
    distance: float | None
    reason: str
    unmoved: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.name}, on a small model for {STEPS} steps:"]
        lines.append("  a gradient with NaN or infinity is refused before anything changes (the study's own check)")
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


def trial(name: str, lr: float, **hyper) -> Trial:
    """Trains with an optimizer (as `build_optimizer` takes it) twice, and once interrupted.

    The interrupted run goes on in a new optimizer with the state of the old one after a round trip through a file, as
    training does, and with torch's random numbers from another seed. ValueError where it cannot be made, or where its
    step fails, naming the failure.
    """
    (moved, first), (_, again) = (_run(name, lr, hyper, None) for _ in range(2))
    unmoved = tuple(n for n in first if n not in moved)
    repeats = all(torch.equal(first[n], again[n]) for n in first)
    try:
        resumed = _run(name, lr, hyper, INTERRUPTED_AT)[1]
    except _NotKept as error:
        return Trial(name, repeats, None, str(error), unmoved)
    largest = max(p.abs().max().item() for p in first.values())
    apart = max((first[n] - resumed[n]).abs().max().item() for n in first) / largest
    return Trial(name, repeats, apart, "", unmoved)


class _NotKept(Exception):
    """The state of an optimizer does not survive a file."""


def _model() -> Olmo2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Olmo2(Olmo2Config(vocab_size=24, width=16, depth=1, n_heads=2))


def _run(name: str, lr: float, hyper: dict, interrupted_at: int | None) -> tuple[set[str], dict[str, Tensor]]:
    """Names of the parameters that some step moved, and the weights at the end."""
    model = _model()
    optimizer = build_optimizer(model, name, lr, **hyper)
    generator, moved = torch.Generator().manual_seed(1), set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for step in range(STEPS):
            if step == interrupted_at:
                state = _through_a_file(optimizer.state_dict())
                optimizer = build_optimizer(model, name, lr, **hyper)
                _load(optimizer, state)
                torch.manual_seed(3)
            ids = torch.randint(24, (8, 17), generator=generator)
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            try:
                optimizer.step()
            except Exception as error:  # whatever a class from outside may raise
                raise ValueError(f"{name} fails in step {step}: {type(error).__name__}: {error}") from error
            moved |= {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            optimizer.zero_grad(set_to_none=True)
    return moved, {n: p.detach().clone() for n, p in model.named_parameters()}


def _through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    except Exception as error:  # pickle, torch and the class itself each have errors of their own
        raise _NotKept(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}") from error


def _load(optimizer: torch.optim.Optimizer, state: dict) -> None:
    try:
        optimizer.load_state_dict(state)
    except Exception as error:
        raise _NotKept(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
