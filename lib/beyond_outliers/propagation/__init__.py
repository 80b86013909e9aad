"""How quantization error travels through a model: the ABC decomposition, R_L alone, and all readings at the end."""

from beyond_outliers.propagation.decomposition import decompose, summarise
from beyond_outliers.propagation.norms import spectral_norm
from beyond_outliers.propagation.output_error import RelativeError, relative_error, rounding_floor
from beyond_outliers.propagation.readings import output_readings, second_order_kl, softmax_weighted_error
from beyond_outliers.propagation.rows import FUNCTIONAL

__all__ = [
    "FUNCTIONAL",
    "RelativeError",
    "decompose",
    "output_readings",
    "relative_error",
    "rounding_floor",
    "second_order_kl",
    "softmax_weighted_error",
    "spectral_norm",
    "summarise",
]
