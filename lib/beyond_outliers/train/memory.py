"""What a run takes of memory, before it is started: its step is traced on tensors that have a shape and no content.

The same code runs as in training: model, loss, backward pass, optimizer. Every storage that it makes is counted until
it is freed, so that what an optimizer keeps, a quantizer saves for the backward pass or recomputation leaves out needs
no formula here. Not seen: the workspace inside a kernel (LAPACK's, for one), and the interpreter with its libraries.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beyond_outliers.config.run import ModelConfig, RunConfig
from beyond_outliers.model.build import build_model
from beyond_outliers.model.decoder import Decoder
from beyond_outliers.model.loss import cross_entropy
from beyond_outliers.optimizers.registry import build_optimizer
from beyond_outliers.optimizers.sharing import Sharing
from beyond_outliers.optimizers.stacking import StackedOptimizer
from beyond_outliers.quantizers.qat import LSQQuantizer

EVALUATED = 32  # windows that `validation_loss` looks at in one pass
# what an optimizer does now and then: at every step, and seldom. Every sixth step is seldom enough: Shampoo has its
# roots, and of the steps that `forecast.pace` times (the 8th to 10th, SOAP's 7th to 9th) none is a multiple of it
OFTEN: dict[str, float] = {"frequency": 1, "update_probability": 1.0}
SELDOM: dict[str, float] = {"frequency": 6, "update_probability": 0.03}


@dataclass(frozen=True)
class Memory:
    """Bytes of a worker: what there is of each kind, and all that lives at once at the worst of three moments."""

    weights: int
    gradients: int
    optimizer: int  # its state
    activations: int  # kept for the backward pass of a micro-batch, up to what the head reads
    logits: int  # while the loss is computed: logits, or slices of them, and the head's gradients
    copies: int  # gradients on their way to the other workers
    passes: int  # at most, forward and backward
    update: int  # at most, in the optimizer's step
    evaluation: int  # at most, until its weights and state are saved

    @property
    def peak(self) -> int:
        return max(self.passes, self.update, self.evaluation)

    @property
    def moment(self) -> str:
        where = {
            "the forward and backward pass": self.passes,
            "the optimizer's step": self.update,
            "the evaluation": self.evaluation,
        }
        return max(where, key=where.__getitem__)


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside: alive `now`, and at `most` so far.

    Questions to the content of a tensor, which has none, are answered as for ordinary numbers: a norm is below its
    limit, `all` holds, `any` does not, weights are equal to their copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._bytes: dict[int, int] = {}

    def most_during(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """What `call` returns, and the most bytes alive meanwhile."""
        before, self.most = self.most, self.now
        result, most = call(), self.most
        self.most = max(before, most)
        return result, most

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return not getattr(args[0], "of_any", False)
        if function is torch.ops.aten.equal.default:
            return True
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.any.default:
            out.of_any = True
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self.now += self._bytes[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._bytes.pop(key)


def memory(config: RunConfig, device: str = "cpu", workers: int = 1, recompute: bool = False) -> Memory:
    """Bytes that a worker of this run needs, uncompiled; compiled it needs less.

    device: "cpu", or "cuda" for bfloat16 autocast, traced through the CPU's kernels. recompute: see `Decoder`.
    Every block adds the same, so two blocks are traced at most. Of several workers, which divide the state of a matrix
    optimizer, it is the one that keeps most.
    """
    depth = config.model.depth
    if depth <= 2:
        found = _traced(config, device, workers, recompute)
    else:
        one, two = (
            vars(_traced(config.replace(model=dataclasses.replace(config.model, depth=n)), device, workers, recompute))
            for n in (1, 2)
        )
        found = Memory(**{name: one[name] + (depth - 1) * (two[name] - one[name]) for name in one})
    return found if workers == 1 else _of_several(found, config, device, workers)


def roughly(model: ModelConfig, micro_batch: int, context: int, quantized: bool) -> int:
    """Bytes that training takes at most, by a formula: a trace takes seconds, and the workflow asks for every size.

    Weights, gradients and the largest optimizer state (13 numbers a parameter), activations of a micro-batch, logits of
    a micro-batch or of an evaluation. quantized: with what LSQ, the scheme that keeps most, adds. One to four times
    what `memory` finds, at the shapes that are tested.
    """
    weights, activations = (16, 70) if quantized else (13, 40)
    activations *= micro_batch * model.depth * model.width
    logits = 3 * max(micro_batch, EVALUATED) * model.vocab_size
    return 4 * (weights * model.n_parameters + context * (activations + logits))


def _of_several(whole: Memory, config: RunConfig, device: str, workers: int) -> Memory:
    """Less the state that other workers keep, and with what they send each other: parameters at the end of a step, and
    to the first worker, after an evaluation, the states that it saves (it has them on the CPU)."""
    with torch.device("meta"):
        optimizer = build_optimizer(build_model(config), config.optimizer, config.lr, **config.hyper)
    if not isinstance(optimizer, StackedOptimizer):
        return whole
    optimizer.share(Sharing(0, workers))
    kept, every, sent = [0] * workers, 0, 0
    for group in optimizer.param_groups:
        for part, owner in zip(*optimizer.parts(group, group["params"]), strict=True):
            state = sum(v.nbytes for p in part for v in optimizer.state[p].values() if isinstance(v, Tensor))
            every += state
            sent += 0 if owner is None else sum(p.nbytes for p in part)
            for worker in range(workers) if owner is None else [owner]:
                kept[worker] += state
    elsewhere = round(whole.optimizer * (1 - max(kept) / every))
    sending = whole.weights + whole.gradients + whole.copies + whole.optimizer + sent
    saving = whole.weights + whole.copies + whole.optimizer if device == "cpu" else 0
    return dataclasses.replace(
        whole,
        optimizer=whole.optimizer - elsewhere,
        passes=whole.passes - elsewhere,
        update=max(whole.update, sending) - elsewhere,
        evaluation=max(whole.evaluation - elsewhere, saving),
    )


def _traced(config: RunConfig, device: str, workers: int, recompute: bool) -> Memory:
    share = config.batch_size // workers
    with torch.device("meta"):
        model = build_model(config)  # outside of the trace: drawing random numbers needs a generator with content
    with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
        _give_storage(model)
        model.recompute = recompute
        weights = live.now
        optimizer = build_optimizer(
            model, config.optimizer, config.lr, weight_decay=config.weight_decay, **config.hyper
        )
        ids = torch.zeros(min(share, config.micro_batch), config.context, dtype=torch.int64)
        before_passes = live.now
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=device == "cuda")
        activations = logits = 0

        def pass_twice() -> None:
            """A micro-batch when there are no gradients, another one where there is one."""
            nonlocal activations, logits
            for _ in range(min(2, share // len(ids))):
                before = live.now
                with mixed:
                    hidden = model.hidden(ids)
                    activations = live.now - before
                    loss, most = live.most_during(lambda hidden=hidden: model.head_loss(hidden, ids))
                logits = most - before - activations
                del hidden
                loss.backward()

        def update() -> None:
            for now_and_then in (OFTEN, OFTEN, SELDOM):  # the first steps are special
                set_groups(optimizer, now_and_then)
                optimizer.step()

        pass_twice()
        gradients = live.now - before_passes
        _, updating = live.most_during(update)
        optimizer.zero_grad(set_to_none=True)
        state = live.now - before_passes
        _, passing = live.most_during(pass_twice)
        optimizer.zero_grad(set_to_none=True)
        windows = min(EVALUATED, config.validation_tokens // config.context)
        seen = torch.zeros(windows, config.context, dtype=torch.int64)
        with torch.no_grad(), mixed:
            _, evaluating = live.most_during(lambda: cross_entropy(model(seen), seen, "none"))
    copies = gradients if workers > 1 else 0
    return Memory(
        weights, gradients, state, activations, logits, copies, passing + copies, updating + copies, evaluating + copies
    )


def set_groups(optimizer: torch.optim.Optimizer, settings: Mapping[str, float]) -> None:
    """Changes hyperparameters in all groups that have them."""
    for group in optimizer.param_groups:
        group.update({key: value for key, value in settings.items() if key in group})


def _give_storage(model: Decoder) -> None:
    """Takes a model off the meta device."""
    model.to_empty(device="cpu")
    model.head.weight = model.embedding.weight
    for module in model.modules():
        if isinstance(module, LSQQuantizer):
            module.started = True  # from a first batch that there is not
