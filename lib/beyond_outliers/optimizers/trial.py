"""What cannot be seen of an optimizer from outside, tried on a small model before it trains for hours.

print("\\n".join(trial("pytorch_optimizer:Lion", lr=1e-3)))
"""

import io
from functools import partial

import torch
from torch import Tensor

from beyond_outliers.model.olmo2 import Olmo2, Olmo2Config
from beyond_outliers.optimizers.groups import ROLES
from beyond_outliers.optimizers.registry import build_optimizer

STEPS = 12
INTERRUPTED_AT = 7  # no multiple of a short period: what happens every second or third step is out of step after it


def trial(name: str, lr: float, **hyper) -> list[str]:
    """What an optimizer (as `build_optimizer` takes it) does not guarantee, a line each; empty where it keeps all.

    It trains twice, once interrupted, and at other rates. The interrupted run goes on in a new optimizer with the state
    of the old one after a round trip through a file, as training does, and with torch's random numbers from another
    seed. ValueError where it cannot be made, or where its step fails, naming the failure.
    """
    roles = hyper.get("roles", ROLES)  # rates of the others are AdamW's, which have an effect in any case
    ours: set[str] = set()  # the weights that the class itself trains
    moved: set[str] = set()

    def run(rate: float, factor: float = 1.0, interrupted: bool = False) -> dict[str, Tensor]:
        """Weights at the end. The schedule's `factor` is 1 at first."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Olmo2(Olmo2Config(vocab_size=24, width=16, depth=1, n_heads=2))
            build = partial(build_optimizer, model, name, rate, **hyper)
            optimizer = build()
            rates = [group["lr"] for group in optimizer.param_groups]
            ours.update(n for group in optimizer.param_groups if group["role"] in roles for n in group["param_names"])
            generator = torch.Generator().manual_seed(1)
            torch.manual_seed(2)
            for step in range(STEPS):
                if interrupted and step == INTERRUPTED_AT:
                    _resume(optimizer, optimizer := build())
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
                moved.update(n for n, p in model.named_parameters() if not torch.equal(p, before[n]))
                optimizer.zero_grad(set_to_none=True)
        return {n: p.detach() for n, p in model.named_parameters()}

    def apart(other: dict[str, Tensor]) -> float:
        return max((weights[n] - other[n]).abs().max().item() for n in ours)

    weights, again = run(lr), run(lr)
    lines = []
    if not all(map(torch.equal, weights.values(), again.values())):
        lines.append("two runs from one seed end in the same weights")
    if not apart(run(lr / 2)):
        lines.append(f"its learning rate has an effect: {lr:g} and {lr / 2:g} end in the same weights")
    if not apart(run(lr, 0.5)):
        lines.append("the schedule of its learning rate has an effect: a rate changed after step 1 has none")
    try:
        distance = apart(run(lr, interrupted=True)) / max(p.abs().max().item() for p in weights.values())
    except _NotKept as error:
        lines.append(f"an interrupted run goes on; its state cannot be kept ({error})")
    else:
        if distance:
            lines.append(
                f"a resumed run ends in the same weights (here {distance:.1e} apart); the class keeps something "
                "outside of its state_dict, such as a random generator or a count"
            )
    if still := weights.keys() - moved:
        lines.append(f"every parameter is trained; these are not: {', '.join(sorted(still))}")
    return lines


class _NotKept(Exception):
    """The state of an optimizer does not survive a file."""


def _resume(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Gives `new` the state of `old` after a round trip through a file; _NotKept where that fails."""
    file = io.BytesIO()
    try:
        torch.save(old.state_dict(), file)
        file.seek(0)
        new.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:  # pickle, torch and the class itself each have errors of their own
        raise _NotKept(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
