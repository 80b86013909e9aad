"""The study's decoders, their loss, and how a run's model is built."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    build="MODELS build_model",
    decoder="Decoder ResidualAdd RMSNorm Rotary",
    llama="Llama LlamaConfig",
    loss="cross_entropy linear_cross_entropy",
    olmo2="Olmo2 Olmo2Config QKNorm ReluSquared",
)
