"""Training: one run from its config to its folder; it resumes by itself."""

from beyond_outliers.model.build import build_model
from beyond_outliers.train.folder import RunResult, flat_config, load_result, run_folder, weights_path
from beyond_outliers.train.loop import Diverged, LossModule, train
from beyond_outliers.train.machine import git_commit, provenance
from beyond_outliers.train.timetable import evaluation_steps, schedule

__all__ = [
    "Diverged",
    "LossModule",
    "RunResult",
    "build_model",
    "evaluation_steps",
    "flat_config",
    "git_commit",
    "load_result",
    "provenance",
    "run_folder",
    "schedule",
    "train",
    "weights_path",
]
