"""How quantization error travels through a model: the ABC decomposition, and R_L alone."""

from beyond_outliers.propagation.decomposition import decompose, summarise
from beyond_outliers.propagation.norms import spectral_norm
from beyond_outliers.propagation.output_error import RelativeError, output_errors, relative_error, rounding_floor
from beyond_outliers.propagation.rows import FUNCTIONAL

__all__ = [
    "FUNCTIONAL",
    "RelativeError",
    "decompose",
    "output_errors",
    "relative_error",
    "rounding_floor",
    "spectral_norm",
    "summarise",
]
