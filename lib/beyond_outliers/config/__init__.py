"""What a run and a scale are: frozen settings, scale files, learning rates. Nothing here imports torch."""

from beyond_outliers.config.learning_rates import (
    EdgeWarning,
    choose_learning_rate,
    learning_rates_file,
    read_learning_rates,
)
from beyond_outliers.config.protocol import OPTIMIZER_NAMES, PURPOSES, Planned, Protocol, scales
from beyond_outliers.config.run import CorpusConfig, LlamaConfig, ModelConfig, Olmo2Config, RunConfig, model_config
from beyond_outliers.config.tuning import Pending, auxiliary_rates, line_search, tune, tuned_config

__all__ = [
    "OPTIMIZER_NAMES",
    "PURPOSES",
    "CorpusConfig",
    "EdgeWarning",
    "LlamaConfig",
    "ModelConfig",
    "Olmo2Config",
    "Pending",
    "Planned",
    "Protocol",
    "RunConfig",
    "auxiliary_rates",
    "choose_learning_rate",
    "learning_rates_file",
    "line_search",
    "model_config",
    "read_learning_rates",
    "scales",
    "tune",
    "tuned_config",
]
