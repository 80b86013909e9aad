"""Training: one run from its config to its folder; it resumes by itself."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    folder="RunResult flat_config load_result run_folder weights_path",
    loop="Diverged LossModule train",
    machine="git_commit provenance",
    schedule="evaluation_steps rate_factor",
    **{".model.build": "build_model"},
)
