"""One training run: schedule, loop, checkpoints, resume.

`train(config)` returns at once when the run is finished, continues where it stopped when it was interrupted, and
starts otherwise. Everything it knows is in the run's folder (`runs`).

From a shell: `python -m beyond_outliers.train --scale pocket --size 0.04M --optimizer adamw --lr 0.01`, or the same
under torchrun for data parallelism.
"""

import contextlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from beyond_outliers import paths
from beyond_outliers.config.run import RunConfig
from beyond_outliers.corpus.batches import Batches
from beyond_outliers.corpus.tokens import Corpus, open_corpus
from beyond_outliers.decoder import Decoder
from beyond_outliers.evaluate.loss import validation_loss
from beyond_outliers.optimizers.groups import NonFiniteGradientError
from beyond_outliers.optimizers.registry import build_optimizer
from beyond_outliers.quantizers.convert import weights_held
from beyond_outliers.train.folder import RunResult, build_model, flat_config, load_result, run_folder, weights_path
from beyond_outliers.train.machine import device_named, provenance, should_compile
from beyond_outliers.train.timetable import evaluation_steps, schedule

LOGGED_STEPS = 200  # training losses kept a run, each the mean since the one before


class Diverged(Exception):
    """The loss left the numbers, or rose above where it started and stayed there."""


def train(
    config: RunConfig,
    *,
    device: str = "auto",
    compile: bool | str = "auto",
    threads: int | None = None,
    root: Path | None = None,
    progress: bool = True,
) -> RunResult:
    """Trains one run to its end and returns its result; resumes by itself; a finished run is only loaded.

    device: "auto" (CUDA if there is one), "cpu", "cuda". compile: True, False, or "auto" (where it pays).
    threads: CPU threads, None for torch's default. root: folder of all runs, by default data/runs.
    On CPU the run is float32 and a resumed run ends with bit-identical weights (same machine, threads and compile);
    on CUDA it is bfloat16 autocast. Under torchrun the global batch is shared among the workers.
    """
    folder = run_folder(config, root)
    if (done := load_result(folder)) is not None:
        return done
    if threads:
        torch.set_num_threads(threads)
    run = _Run(config, folder, device, compile, progress)
    try:
        run.loop()
    finally:
        run.close()
    if run.rank != 0:
        return RunResult(config, folder, {})
    done = load_result(folder)
    assert done is not None, "a run that has ended has written its result"
    return done


class LossModule(nn.Module):
    """forward = loss, so that data parallelism wraps one call. Compiled on CUDA as a whole; on CPU all but the head,
    whose loss is library calls on slices of tokens, nothing to fuse (`losses`).
    """

    def __init__(self, model: Decoder, compiled: bool):
        super().__init__()
        self.model = model
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.hidden = torch.compile(model.hidden) if compiled and on_cpu else model.hidden
        if compiled and not on_cpu:
            self.compile()

    def forward(self, ids, targets):
        return self.model.head_loss(self.hidden(ids), targets)


def check_shares(config: RunConfig, world: int) -> None:
    """ValueError unless every worker's share of a batch is whole micro-batches, or smaller than one.

    Other shares would be cut into parts of unequal weight, or of another number than the gradients are summed after.
    """
    share, rest = divmod(config.batch_size, world)
    if rest or (share > config.micro_batch and share % config.micro_batch):
        raise ValueError(
            f"batch_size {config.batch_size} over {world} workers is {config.batch_size / world:g} sequences each, no "
            f"multiple of micro_batch {config.micro_batch}; valid: a batch_size that is a multiple of "
            f"{world * config.micro_batch}, or a micro_batch that divides every worker's share"
        )


class _Run:
    """A run in progress."""

    def __init__(self, config: RunConfig, folder: Path, device: str, compile: bool | str, progress: bool):
        self.config, self.folder = config, folder
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = device_named(device)
        check_shares(config, self.world)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.corpus: Corpus = open_corpus(config.corpus, config.context)
        self.batches = Batches(self.corpus.train, config.context, config.batch_size, config.seed)
        self.model = build_model(config).to(self.device)
        self.optimizer = build_optimizer(
            self.model, config.optimizer, config.lr, weight_decay=config.weight_decay, **config.hyper
        )
        self.compiled = should_compile(compile, config, self.device)
        if self.compiled:  # kernels are kept between processes: runs of one shape compile once
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(paths.CACHE / "compiled"))
        self.loss: LossModule | DistributedDataParallel = LossModule(self.model, self.compiled)
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.loss = DistributedDataParallel(self.loss, device_ids=ids)
        self.step, self.seconds = 0, 0.0
        self.rows: list[dict] = []
        self.progress = progress and self.rank == 0
        folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            paths.write_whole(folder / "config.json", config.to_json())
        if (folder / "state.pt").exists():
            self._restore()

    # ------------------------------------------------------------------------------------------------------ the loop

    def loop(self) -> None:
        config = self.config
        stops = evaluation_steps(config)
        log_every = max(1, config.steps // LOGGED_STEPS)
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc=config.name,
            unit="step",
            disable=None if self.progress else True,
        )
        try:
            if self.step == 0:
                self._evaluate(save=False)
            mean, count, clock = torch.zeros((), device=self.device), 0, time.perf_counter()
            while self.step < config.steps:
                mean, count = mean + self._step(), count + 1
                bar.update()
                evaluate = self.step in stops
                if evaluate or self.step % log_every == 0:
                    train_loss = (mean / count).item()
                    now = time.perf_counter()
                    speed = count * config.tokens_per_step / (now - clock)
                    self.seconds += now - clock
                    self._log(train_loss=train_loss, tokens_per_second=speed)
                    bar.set_postfix_str(f"loss {train_loss:.3f}, {speed:,.0f} tokens/s")
                    if not np.isfinite(train_loss):
                        raise Diverged(f"training loss {train_loss} at step {self.step}")
                    if evaluate:
                        self._evaluate(save=True)
                    mean, count, clock = torch.zeros_like(mean), 0, time.perf_counter()
            status, reason = "finished", ""
        except (Diverged, NonFiniteGradientError) as error:
            status, reason = "diverged", str(error)
        finally:
            bar.close()
        if self.rank == 0:
            self._finish(status, reason)

    def _step(self) -> torch.Tensor:
        """One optimizer step; returns the mean training loss of its batch as a 0-d tensor."""
        config = self.config
        ids, targets = (torch.from_numpy(part) for part in self.batches(self.step, self.rank, self.world))
        parts = max(1, len(ids) // config.micro_batch)
        factor = schedule(self.step, config.steps, config.warmup, config.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        total = torch.zeros((), device=self.device)
        held = weights_held(self.model) if parts > 1 and config.quantization else contextlib.nullcontext()
        with held:  # QAT rounds the weights once a step, not once a micro-batch
            for part, (x, y) in enumerate(zip(ids.chunk(parts), targets.chunk(parts), strict=True)):
                last = part == parts - 1
                with (
                    self._autocast(),
                    self.loss.no_sync()
                    if isinstance(self.loss, DistributedDataParallel) and not last
                    else contextlib.nullcontext(),
                ):
                    loss = self.loss(x.to(self.device), y.to(self.device)) / parts
                    loss.backward()
                total += loss.detach()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.world > 1:
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
        return total / self.world

    def _autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    # --------------------------------------------------------------------------------------- evaluation and the folder

    def _evaluate(self, save: bool) -> None:
        config = self.config
        with self._autocast():
            found = validation_loss(
                self.model,
                self.corpus.validation,
                config.context,
                max_tokens=config.validation_tokens,
                token_bytes=self.corpus.token_bytes,
            )
        self._log(val_loss=found.loss, val_standard_error=found.standard_error, bits_per_byte=found.bits_per_byte)
        losses = [row["val_loss"] for row in self.rows if "val_loss" in row]
        start, high = losses[0], [not loss <= losses[0] for loss in losses]  # NaN is high
        # one bump at the full learning rate is forgiven: such runs come back to the losses of their neighbours
        if high[-1] and (not np.isfinite(found.loss) or self.step == config.steps or high[-2]):
            raise Diverged(f"validation loss {found.loss:.3f} at step {self.step}, {start:.3f} at the start")
        if save and self.rank == 0:
            self._save()

    def _log(self, **values) -> None:
        tokens = self.step * self.config.tokens_per_step
        if self.rows and self.rows[-1]["step"] == self.step:
            self.rows[-1] |= values
        else:
            lr = self.optimizer.param_groups[0]["lr"]
            self.rows.append({"step": self.step, "tokens": tokens, "lr": lr, "seconds": self.seconds, **values})

    def _write_metrics(self) -> None:
        columns = ["step", "tokens", "lr", "seconds", "train_loss", "tokens_per_second"]
        columns += ["val_loss", "val_standard_error", "bits_per_byte"]
        table = pd.DataFrame(self.rows).reindex(columns=columns)
        paths.write_whole(self.folder / "metrics.csv", table.to_csv(index=False))

    def _save(self) -> None:
        path = weights_path(self.folder, self.step)
        path.parent.mkdir(exist_ok=True)
        save_model(self.model, str(path.with_suffix(".tmp")))
        os.replace(path.with_suffix(".tmp"), path)
        self._write_metrics()
        state = {
            "step": self.step,
            "rows": self.rows,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")  # last: a state always has its weights

    def _restore(self) -> None:
        state = torch.load(self.folder / "state.pt", map_location=self.device, weights_only=True)
        load_model(self.model, weights_path(self.folder, state["step"]), device=str(self.device))
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.rows, self.seconds = state["step"], state["rows"], state["seconds"]

    def _finish(self, status: str, reason: str) -> None:
        self._write_metrics()
        config, metrics = self.config, pd.DataFrame(self.rows)
        last = next(row for row in reversed(self.rows) if "val_loss" in row)
        speed = metrics.tokens_per_second if "tokens_per_second" in metrics else pd.Series(dtype=float)
        row = {
            "run": config.name,
            "run_id": config.run_id,
            "status": status,
            "reason": reason,
            **flat_config(config),
            "val_loss": last["val_loss"] if status == "finished" else float("nan"),
            "val_standard_error": last["val_standard_error"],
            "bits_per_byte": last["bits_per_byte"] if status == "finished" else float("nan"),
            "steps": self.step,
            "tokens": self.step * config.tokens_per_step,
            "epochs": self.step * config.batch_size / self.batches.windows,
            "seconds": self.seconds,
            "tokens_per_second": float(speed.median()),  # the median leaves out compilation and other stalls
            **provenance(self.device, self.compiled),
        }
        paths.write_whole(self.folder / "result.json", json.dumps(row, indent=1))
        (self.folder / "state.pt").unlink(missing_ok=True)

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ helpers
