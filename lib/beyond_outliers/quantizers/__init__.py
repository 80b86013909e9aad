"""Number formats, rotations, trainable quantizers, and models under quantization."""

from beyond_outliers.quantizers.convert import freeze_qat, prepare_qat, quantize_model, weights_held
from beyond_outliers.quantizers.formats import FORMATS, QuantSpec, quantize_tensor
from beyond_outliers.quantizers.gptq import gptq_weight
from beyond_outliers.quantizers.hadamard import hadamard_block, hadamard_matrix, hadamard_transform
from beyond_outliers.quantizers.layers import QATLinear, QuantizedLinear
from beyond_outliers.quantizers.levels import Format, float_rounding, microscale, nearest_of, table
from beyond_outliers.quantizers.opened import open_layers
from beyond_outliers.quantizers.record import CoverageWarning, Quantization
from beyond_outliers.quantizers.saving import load_quantized, save_quantized
from beyond_outliers.quantizers.trainable import (
    SCHEMES,
    AbsMaxQuantizer,
    LSQQuantizer,
    QuestQuantizer,
    make_quantizer,
    optimal_gaussian_scale,
    staircase,
)
from beyond_outliers.quantizers.watching import coverage

__all__ = [
    "FORMATS",
    "SCHEMES",
    "AbsMaxQuantizer",
    "CoverageWarning",
    "Format",
    "LSQQuantizer",
    "QATLinear",
    "QuantSpec",
    "Quantization",
    "QuantizedLinear",
    "QuestQuantizer",
    "coverage",
    "float_rounding",
    "freeze_qat",
    "gptq_weight",
    "hadamard_block",
    "hadamard_matrix",
    "hadamard_transform",
    "load_quantized",
    "make_quantizer",
    "microscale",
    "nearest_of",
    "open_layers",
    "optimal_gaussian_scale",
    "prepare_qat",
    "quantize_model",
    "quantize_tensor",
    "save_quantized",
    "staircase",
    "table",
    "weights_held",
]
