"""One training run: schedule, loop, checkpoints, resume.

`train(config)` returns at once when the run is finished, continues where it stopped when it was interrupted, and
starts otherwise. Everything it knows is in the run's folder (`folder`).
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch._functorch.config as functorch
from safetensors.torch import save_model
from torch import nn
from tqdm.auto import tqdm

from beyond_outliers import checksums, paths
from beyond_outliers.config.run import RunConfig
from beyond_outliers.corpus.batches import Batches
from beyond_outliers.corpus.tokens import Corpus, open_corpus
from beyond_outliers.evaluate.loss import validation_loss
from beyond_outliers.lock import held
from beyond_outliers.model.build import build_model
from beyond_outliers.optimizers.groups import NonFiniteGradientError
from beyond_outliers.optimizers.registry import build_optimizer
from beyond_outliers.passes import plain_settings
from beyond_outliers.quantizers.convert import weights_held
from beyond_outliers.train.folder import RunResult, load_result, result_row, run_folder, weights_name
from beyond_outliers.train.machine import LossModule, check_shares, device_named, provenance, should_compile
from beyond_outliers.train.resume import read_state, read_trunk, states, trunk_name, write_state
from beyond_outliers.train.schedule import evaluation_steps, rate_factor
from beyond_outliers.train.workers import Workers, place

LOGGED_STEPS = 200  # training losses kept a run, each the mean since the one before
SAVE_EVERY = 240.0  # seconds; with the step in progress, less than five minutes are lost
TRY_AGAIN = 75  # exit code (EX_TEMPFAIL) of a run that saved and stopped: the same command goes on
COLUMNS = ["step", "tokens", "lr", "seconds", "train_loss", "tokens_per_second"]  # of metrics.csv
COLUMNS += ["val_loss", "val_standard_error", "bits_per_byte"]
KEPT = ("step", "rows", "seconds", "mean", "count")  # of `_Run`, in its states


class Diverged(Exception):
    """The loss left the numbers, or rose above where it started and stayed there."""


class Termination:
    """Whether SIGTERM has come, while this is entered; the signal itself then ends nothing."""

    asked = False

    def __enter__(self) -> "Termination":
        self.here = threading.current_thread() is threading.main_thread()  # the only one that may handle signals
        if self.here:
            self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        return self

    def __exit__(self, *_: object) -> None:
        if self.here:
            signal.signal(signal.SIGTERM, self.before)


def train(
    config: RunConfig,
    *,
    device: str = "auto",
    compile: bool | str = "auto",
    threads: int | None = None,
    recompute: bool = False,
    root: Path | None = None,
    progress: bool = True,
    keep: Collection[int] = (),
    trunk: RunConfig | None = None,
    start: int = 0,
) -> RunResult:
    """Trains one run to its end and returns its result; resumes by itself; a finished run is only loaded.

    Of two processes that train the same run, the second says who the first is and waits for its result. On SIGTERM the
    run is saved and the process ends with exit code 75. DamagedFile, with the remedy, for a finished run whose files
    are not what was written; a damaged state is named, and the one before it is gone on from.

    device: "auto" (CUDA if there is one), "cpu", "cuda". compile: True, False, or "auto" (where it pays).
    threads: CPU threads, None for torch's default. recompute: less memory for more operations and the same numbers
    (see `Decoder`). root: folder of all runs, by default data/runs.
    keep: steps whose whole state stays, for branches. trunk, start: the run is a branch, and begins with
    the state that `trunk` kept at step `start`, which goes when the branch has ended. Until then the two are one run
    (same rates, batches and warm-up), so that without that state the branch is trained from its first step.
    On CPU the run is float32 and a resumed run ends with bit-identical weights (same machine, threads and compile);
    on CUDA it is bfloat16 autocast. Under torchrun the global batch is shared among the workers.
    """
    folder = run_folder(config, root)
    if (done := load_result(folder)) is not None:
        return done
    if threads:
        torch.set_num_threads(threads)
    if trunk:  # a compiled kernel rounds in another way
        compile = should_compile(compile, trunk, device_named(device))
    world, rank = place()
    lock = held(folder / ".lock", wait=world == 1) if rank == 0 else contextlib.nullcontext()
    with plain_settings(training=True), lock:
        if (done := load_result(folder)) is None:  # of the process that held the run
            run = _Run(config, folder, device, compile, recompute, progress)
            run.keep = keep
            if trunk and run.step == 0:
                run.take(read_trunk(run_folder(trunk, root), trunk, start, run.device))
            try:
                run.loop()
            finally:
                run.workers.leave()
            if rank != 0:
                return RunResult(config, folder, {})
            done = load_result(folder)
    assert done is not None, "a run that has ended has written its result"
    if trunk and (file := run_folder(trunk, root) / trunk_name(start)).exists():
        checksums.write_files(file.parent, {}, remove=[file.name])
    return done


class _Run:
    """A run in progress."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        device: str,
        compile: bool | str,
        recompute: bool,
        progress: bool,
    ):
        self.config, self.folder = config, folder
        self.device = device_named(device)
        check_shares(config, place()[0])
        self.workers = Workers(self.device)
        self.first = self.workers.rank == 0  # the worker that writes
        self.corpus: Corpus = open_corpus(config.corpus, config.context)
        self.batches = Batches(self.corpus.train, config.context, config.batch_size, config.seed)
        self.model = build_model(config).to(self.device)
        self.model.recompute = recompute
        self.optimizer = build_optimizer(
            self.model, config.optimizer, config.lr, weight_decay=config.weight_decay, **config.hyper
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]  # before the schedule, and any state
        self.compiled = should_compile(compile, config, self.device)
        if self.compiled:  # kernels are kept between processes: runs of one shape compile once
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(paths.CACHE / "compiled"))
            # also of quantizers, whose functions have nothing beside the graph: 3 seconds of a start in place of 9
            functorch.autograd_cache_allow_custom_autograd_functions = True
        self.loss = self.workers.join(LossModule(self.model, self.compiled), self.optimizer)
        self.step, self.seconds = 0, 0.0
        self.rows: list[dict] = []
        self.mean, self.count = torch.zeros((), device=self.device), 0  # training losses since the last logged one
        self.clock = self.saved = time.perf_counter()
        self.termination, self.late = Termination(), False
        self.progress = progress and self.first
        self.keep: Collection[int] = ()
        self.take(read_state(folder, config, self.device))
        settings, text = folder / "config.json", config.to_json()
        if self.first and not (settings.exists() and settings.read_bytes() == text.encode()):
            checksums.write_text(settings, text)

    # ------------------------------------------------------------------------------------------------------ the loop

    def loop(self) -> None:
        config = self.config
        stops = evaluation_steps(config)
        log_every = max(1, config.steps // LOGGED_STEPS)
        hidden = None if self.progress else True  # None: shown on a terminal
        bar = tqdm(total=config.steps, initial=self.step, desc=config.name, unit="step", disable=hidden)
        try:
            with self.termination, bar:
                if self.step == 0:
                    self._evaluate(save=False)
                    self.clock = time.perf_counter()
                while self.step < config.steps:
                    self.mean, self.count = self.mean + self._step(), self.count + 1
                    bar.update()
                    if self.step in stops or self.step % log_every == 0:
                        self._log_training(bar)
                    self._save_in_time()
            status, reason = "finished", ""
        except (Diverged, NonFiniteGradientError) as error:
            status, reason = "diverged", str(error)
        if self.first:
            self._finish(status, reason)

    def _log_training(self, bar: tqdm) -> None:
        """The mean training loss since it was last logged, and the evaluation of steps that have one."""
        train_loss = (self.mean / self.count).item()
        taken = time.perf_counter() - self.clock
        speed = self.count * self.config.tokens_per_step / taken
        self.seconds += taken
        self._log(train_loss=train_loss, tokens_per_second=speed)
        bar.set_postfix_str(f"loss {train_loss:.3f}, {speed:,.0f} tokens/s")
        if not np.isfinite(train_loss):
            raise Diverged(f"training loss {train_loss} at step {self.step}")
        self.mean, self.count = torch.zeros_like(self.mean), 0
        if self.step in evaluation_steps(self.config):
            self._evaluate(save=True)
        self.clock = time.perf_counter()

    def _save_in_time(self) -> None:
        """Saves when the last time is long ago, and when the process is asked to end, which it then does."""
        if self.step == self.config.steps:
            return
        if self.late or self.termination.asked or self.step in self.keep:
            self._save()
        if self.termination.asked:
            if self.first:
                said = f"SIGTERM: {self.config.name} is saved at step {self.step}; run it again to go on"
                print(said, file=sys.stderr)
            raise SystemExit(TRY_AGAIN)

    def _step(self) -> torch.Tensor:
        """One optimizer step; returns the mean training loss of its batch as a 0-d tensor."""
        config = self.config
        ids, targets = (
            torch.from_numpy(part) for part in self.batches(self.step, self.workers.rank, self.workers.count)
        )
        parts = max(1, len(ids) // config.micro_batch)
        factor = rate_factor(self.step, config.steps, config.warmup, config.decay)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        total = torch.zeros((), device=self.device)
        rounded_once = weights_held(self.model) if parts > 1 and config.quantization else contextlib.nullcontext()
        with rounded_once:  # QAT: once a step, not a micro-batch
            for part, (x, y) in enumerate(zip(ids.chunk(parts), targets.chunk(parts), strict=True)):
                last = part == parts - 1
                with self._autocast(), contextlib.nullcontext() if last else self.workers.apart(self.loss):
                    loss = self.loss(x.to(self.device), y.to(self.device)) / parts
                    loss.backward()
                total += loss.detach()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        late = time.perf_counter() - self.saved > SAVE_EVERY
        # all workers save, and stop, after the same step
        mean, (self.late, self.termination.asked) = self.workers.agree(total, late, self.termination.asked)
        return mean

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    # --------------------------------------------------------------------------------------- evaluation and the folder

    def _evaluate(self, save: bool) -> None:
        config = self.config
        with self._autocast():
            tokens, most, n_bytes = self.corpus.validation, config.validation_tokens, self.corpus.token_bytes
            found = validation_loss(self.model, tokens, config.context, max_tokens=most, token_bytes=n_bytes)
        self._log(val_loss=found.loss, val_standard_error=found.standard_error, bits_per_byte=found.bits_per_byte)
        losses = [row["val_loss"] for row in self.rows if "val_loss" in row]
        start, high = losses[0], [not loss <= losses[0] for loss in losses]  # NaN is high
        # one bump at the full learning rate is forgiven: such runs come back to the losses of their neighbours
        if high[-1] and (not np.isfinite(found.loss) or self.step == config.steps or high[-2]):
            raise Diverged(f"validation loss {found.loss:.3f} at step {self.step}, {start:.3f} at the start")
        if save:
            self._save(evaluated=True)

    def _log(self, **values) -> None:
        tokens = self.step * self.config.tokens_per_step
        if self.rows and self.rows[-1]["step"] == self.step:
            self.rows[-1] |= values
        else:
            lr = self.optimizer.param_groups[0]["lr"]
            self.rows.append({"step": self.step, "tokens": tokens, "lr": lr, "seconds": self.seconds, **values})

    def _write_metrics(self, path: Path) -> None:
        pd.DataFrame(self.rows).reindex(columns=COLUMNS).to_csv(path, index=False)

    def _save(self, evaluated: bool = False) -> None:
        """Writes all that the run needs to go on, and the weights of an evaluation. All workers take part."""
        optimizer = self.optimizer.state_dict()  # gathered: all workers call it
        self.saved, self.late = time.perf_counter(), False
        if not self.first:
            return
        state = {name: getattr(self, name) for name in KEPT} | {
            "run_id": self.config.run_id,
            "taken": time.perf_counter() - self.clock,
            "model": self.model.state_dict(),
            "optimizer": optimizer,
        }
        weights = {weights_name(self.step): lambda path: save_model(self.model, str(path))} if evaluated else {}
        kept = {trunk_name(self.step): lambda path: torch.save(state, path)} if self.step in self.keep else {}
        write_state(self.folder, state, {**weights, **kept, "metrics.csv": self._write_metrics})

    def take(self, state: dict[str, Any] | None) -> None:
        """Goes on from a state, if there is one."""
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in KEPT:
            setattr(self, name, state[name])
        self.clock = time.perf_counter() - state["taken"]

    def _finish(self, status: str, reason: str) -> None:
        epochs = self.step * self.config.batch_size / self.batches.windows
        row = result_row(self.config, status, reason, self.rows, self.step, self.seconds, epochs)
        text = json.dumps(row | provenance(self.device, self.compiled), indent=1)
        written = {"metrics.csv": self._write_metrics, "result.json": lambda path: path.write_text(text)}
        checksums.write_files(self.folder, written, remove=[file.name for file in states(self.folder)])
