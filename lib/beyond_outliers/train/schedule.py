"""When a run does what: the learning rate of a step, and the steps after which it is evaluated."""

from beyond_outliers.config.run import RunConfig


def rate_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Trapezoidal factor of the learning rate at `step` (from 0): linear up, constant, linear down to 0 at the end."""
    up = (step + 1) / (warmup * steps) if warmup else 1.0
    down = (steps - step) / (decay * steps) if decay else 1.0
    return min(up, 1.0, down)


def evaluation_steps(config: RunConfig) -> list[int]:
    """Steps after which the run is evaluated: evenly spread, the last step among them, at most `evaluations`."""
    return sorted({round(config.steps * i / config.evaluations) for i in range(1, config.evaluations + 1)} - {0})
