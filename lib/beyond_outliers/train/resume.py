"""What a run goes on from: the last two states in its folder, each complete in itself, checked before it is used."""

import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from beyond_outliers import checksums
from beyond_outliers.config.run import RunConfig
from beyond_outliers.train.folder import check, weights_name

# what a state holds; one without is of an older version
KEYS = ("step", "run_id", "rows", "seconds", "mean", "count", "taken", "model", "optimizer")


def states(folder: Path) -> list[Path]:
    """The states of a run, newest first."""
    return sorted(folder.glob("state-*.pt"), reverse=True)


def trunk_name(step: int) -> str:
    """The file of a state that stays, for a branch that starts from that step."""
    return f"trunk-{step:06d}.pt"


def read_trunk(folder: Path, config: RunConfig, step: int, device: torch.device) -> dict[str, Any] | None:
    """The state that the run `config` left for a branch, None where there is none. DamagedFile, with the remedy."""
    if not (file := folder / trunk_name(step)).exists():
        return None
    checksums.check(folder, file.name, remedy="delete it, and the branch is trained from its first step")
    state = _load(file, config, device)
    return {**state, "rows": state["rows"][:1]}  # the trunk's course is its own; a loss above the first is diverged


def write_state(folder: Path, state: Mapping[str, Any], beside: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes a state and files that belong to it, all or none of them; of earlier states the last one stays."""
    name = f"state-{state['step']:06d}.pt"
    older = [file.name for file in states(folder) if file.name != name][1:]
    checksums.write_files(folder, {**beside, name: lambda path: _write(dict(state), path)}, remove=older)


def _write(state: dict[str, Any], path: Path) -> None:
    """OSError that tells of the room there, where torch says nothing but that a file ended early."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(f"{path} could not be written, with {free:.1f} MB free on its disk ({error})") from None


def read_state(folder: Path, config: RunConfig, device: torch.device) -> dict[str, Any] | None:
    """The newest state that is whole, None where there is none; says which files are not what was written.

    Where the weights of an evaluation are damaged, the state before that evaluation is taken, which makes them again.
    """
    found, whole = states(folder), []
    try:
        checksums.read_sums(folder)
        for file in found:
            try:
                check(folder, file.name)
                whole.append(_load(file, config, device))
            except checksums.DamagedFile as damage:
                print(f"{damage}; going on from the state before it", file=sys.stderr)
    except checksums.DamagedFile as damage:  # of the sums themselves: nothing can be trusted
        print(damage, file=sys.stderr)
        (folder / checksums.SUMS).unlink()
    if not whole:
        if found:
            print(f"{folder} holds no state that is whole: the run begins again", file=sys.stderr)
        return None
    damaged = []
    for step in sorted({row["step"] for row in whole[0]["rows"] if "val_loss" in row} - {0}):
        try:
            check(folder, weights_name(step))
        except checksums.DamagedFile as damage:
            print(damage, file=sys.stderr)
            damaged.append(step)
    return next((state for state in whole if state["step"] < min(damaged)), whole[0]) if damaged else whole[0]


def _load(file: Path, config: RunConfig, device: torch.device) -> dict[str, Any]:
    """DamagedFile for what torch cannot read, or is no state of this run."""
    try:
        state = torch.load(file, map_location=device, weights_only=True)
        step, run_id, *_ = (state[key] for key in KEYS)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise checksums.DamagedFile(f"{file} cannot be read ({type(error).__name__})") from None
    if run_id != config.run_id or step not in range(1, config.steps + 1):
        raise checksums.DamagedFile(
            f"{file} claims step {step} of run {run_id}; valid: 1 to {config.steps} of {config.run_id}"
        )
    return state
