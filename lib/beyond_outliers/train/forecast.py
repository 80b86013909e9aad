"""`--dry-run`: what a run is, the memory that it takes by a formula, and the time of a step tried on this machine."""

from collections.abc import Callable
from typing import Any

from beyond_outliers.config.run import ModelConfig, RunConfig

# saved for the backward pass of a block: numbers a token and width, and copies of its weights; measured
SAVED = {"none": (23, 0), "ste": (25, 1), "quest": (28, 1), "lsq": (50, 3)}
LARGEST_STATE = 12  # numbers a parameter: of the study's optimizers, SOAP keeps most
EVALUATED = 32  # windows that `validation_loss` looks at in one pass
LONGEST = 5e11  # operations of a micro-batch that is still tried: some seconds of a core


def memory(
    model: ModelConfig,
    micro_batch: int,
    context: int,
    scheme: str = "none",
    state: float = LARGEST_STATE,
    cuda: bool = False,
    recompute: bool = False,
) -> dict[str, int]:
    """Bytes of a training process on top of Python and torch: by kind, and the "peak".

    state: numbers that the optimizer keeps per parameter. cuda: under bfloat16 autocast. Within 25 % of what was
    measured on CPU at three sizes (tests/train/test_forecast.py). No torch here: the workflow asks for every size.
    """
    n, tokens = model.n_parameters, micro_batch * context
    numbers, copies = SAVED[scheme]
    blocks = 1 + model.depth / numbers if recompute else model.depth  # inputs alone, and one block computed again
    saved = tokens * model.width * numbers * blocks * (0.75 if cuda else 1) + copies * (
        n - model.vocab_size * model.width
    )
    found = {"weights": n, "gradients": n, "optimizer": state * n, "activations": saved}
    found["logits"] = tokens * model.vocab_size * (3 if cuda else 1)
    passes = sum(found.values())
    update = (3 + state) * n  # with as many temporaries as there are weights
    evaluation = (1 + state) * n + 2 * EVALUATED * context * model.vocab_size
    return {kind: round(4 * count) for kind, count in {**found, "peak": max(passes, update, evaluation)}.items()}


def state_per_parameter(config: RunConfig) -> float:
    """Numbers that the optimizer keeps per parameter, by the shapes of its state; AdamW's two for one from outside."""
    import torch
    from torch import nn

    from beyond_outliers.model.build import build_model
    from beyond_outliers.optimizers.groups import parameter_groups
    from beyond_outliers.optimizers.registry import build_optimizer

    optimizer: Any = build_optimizer(nn.Linear(2, 2), config.optimizer, config.lr, **config.hyper)
    with torch.device("meta"):
        groups = parameter_groups(build_model(config.replace(quantization=None)))
    settings = optimizer.param_groups[0]
    kept = [optimizer.state_shapes({**settings, "role": g["role"]}, p).values() for g in groups for _, p in g["params"]]
    return sum(shape.numel() for shapes in kept for shape in shapes) / config.model.n_parameters or 2.0


def step_seconds(
    config: RunConfig, device: str, workers: int = 1, recompute: bool = False, threads: int | None = None
) -> float | None:
    """Seconds of a step, uncompiled: a micro-batch as often as a step has some, and an update.

    None where one takes too long to try, or there is no such device.
    """
    import torch
    from torch.utils.benchmark import Timer

    from beyond_outliers.model.build import build_model
    from beyond_outliers.optimizers.registry import build_optimizer

    torch.set_num_threads(threads or torch.get_num_threads())
    share = config.batch_size // workers
    rows = min(share, config.micro_batch)
    operations = 6 * config.model.n_parameters * rows * config.context
    if (operations > LONGEST and device == "cpu") or (device == "cuda" and not torch.cuda.is_available()):
        return None
    model = build_model(config).to(device)
    model.recompute = recompute
    optimizer = build_optimizer(model, config.optimizer, config.lr, weight_decay=config.weight_decay, **config.hyper)
    ids = torch.randint(config.model.vocab_size, (rows, config.context), device=device)

    def passes() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model.loss(ids, ids)
        loss.backward()

    def seconds(call: Callable[[], object], times: int) -> float:
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return timer.timeit(times).mean  # after two calls that do not count

    return share / rows * seconds(passes, 3) + seconds(optimizer.step, 10)


def forecast(config: RunConfig, device: str = "auto", workers: int = 1, recompute: bool = False) -> str:
    """What `--dry-run` prints. device: as `train` takes it; memory is told for "cuda" also where there is none."""
    import torch

    from beyond_outliers.train.machine import check_shares

    check_shares(config, workers)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokens = config.model, config.steps * config.tokens_per_step
    rows = min(config.micro_batch, config.batch_size // workers)
    scheme = (config.quantization or {}).get("scheme", "none")
    state = state_per_parameter(config)
    needed = memory(model, rows, config.context, scheme, state, device == "cuda", recompute)
    seconds = step_seconds(config, device, workers, recompute)
    passes = config.steps + config.evaluations * config.validation_tokens / config.tokens_per_step / 3
    return "\n".join(
        [
            f"{config.name}: nothing is run, nothing is written",
            f"parameters  {model.n_parameters:,} ({model.architecture}, width {model.width}, depth {model.depth})",
            f"tokens      {tokens:,} ({tokens / model.n_parameters:.3g} per parameter)",
            f"steps       {config.steps:,} of {config.batch_size} x {config.context} tokens, {rows} sequences at once",
            f"memory      about {needed.pop('peak') / 1e6:,.0f} MB per process, on top of Python and torch:",
            *(f"  {kind:<12}{size / 1e6:,.1f} MB" for kind, size in needed.items()),
            f"time        about {passes * seconds / 60:,.1f} min here, uncompiled: {seconds:.3g} s per step"
            if seconds
            else f"time        unknown: a step of this run cannot be tried here on {device}",
        ]
    )
