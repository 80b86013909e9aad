"""A run that takes a second, from which tests make theirs."""

from beyond_outliers.config import CorpusConfig, Olmo2Config, RunConfig


def corpus_config(source) -> CorpusConfig:
    return CorpusConfig(source=str(source), vocab_size=320, validation_share=0.1)


def run_config(corpus: CorpusConfig) -> RunConfig:
    """About thirty steps."""
    return RunConfig(
        scale="test",
        size="tiny",
        optimizer="adamw",
        lr=5e-3,
        model=Olmo2Config(vocab_size=320, width=32, depth=1, n_heads=2),
        corpus=corpus,
        context=32,
        batch_size=8,
        micro_batch=8,
        tokens_per_parameter=0.35,
        evaluations=3,
        validation_tokens=1024,
    )
