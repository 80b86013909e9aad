"""What a run and a scale are: frozen settings, scale files, learning rates, the list of optimizers. No torch here."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    registry="OPTIMIZER_NAMES",
    protocol="Planned Protocol",
    rates="EdgeWarning Rates auxiliary_rates choose_learning_rate line_search read_rates tune",
    run="CorpusConfig LlamaConfig ModelConfig Olmo2Config RunConfig Training model_config",
    scale="PURPOSES Measure Runs Scale Tuning scales",
)
