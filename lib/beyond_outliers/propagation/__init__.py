"""How quantization error travels through a model: the ABC decomposition, R_L alone, and all readings at the end."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    decomposition="FUNCTIONAL decompose summarise",
    norms="spectral_norm",
    output_error="RelativeError relative_error rounding_floor",
    readings="output_readings second_order_kl softmax_weighted_error",
)
