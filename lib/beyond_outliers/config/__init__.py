"""What a run and a scale are: frozen settings, scale files, learning rates, the list of optimizers. No torch here."""

from beyond_outliers.config.learning_rates import (
    EdgeWarning,
    Rates,
    choose_learning_rate,
    read_learning_rates,
    read_rates,
)
from beyond_outliers.config.optimizers import OPTIMIZER_NAMES
from beyond_outliers.config.protocol import Planned, Protocol
from beyond_outliers.config.run import (
    CorpusConfig,
    LlamaConfig,
    ModelConfig,
    Olmo2Config,
    RunConfig,
    Training,
    model_config,
)
from beyond_outliers.config.scale import PURPOSES, Measure, Plan, Scale, Tuning, scales
from beyond_outliers.config.tuning import Pending, auxiliary_rates, line_search, tune, tuned_config

__all__ = [
    "OPTIMIZER_NAMES",
    "PURPOSES",
    "CorpusConfig",
    "EdgeWarning",
    "LlamaConfig",
    "Measure",
    "ModelConfig",
    "Olmo2Config",
    "Pending",
    "Plan",
    "Planned",
    "Protocol",
    "Rates",
    "RunConfig",
    "Scale",
    "Training",
    "Tuning",
    "auxiliary_rates",
    "choose_learning_rate",
    "line_search",
    "model_config",
    "read_learning_rates",
    "read_rates",
    "scales",
    "tune",
    "tuned_config",
]
