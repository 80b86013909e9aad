"""How quantization error travels through a model: the ABC decomposition, R_L alone, and all readings at the end."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    decomposition="FUNCTIONAL decompose summarise",
    norms="spectral_norm",
    output_error="RelativeError output_readings relative_error rounding_floor",
)
