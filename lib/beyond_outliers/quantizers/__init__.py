"""Number formats, rotations, quantizers for training, and models under quantization."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    convert="freeze_qat prepare_qat quantize_model weights_held",
    formats="FORMATS QuantSpec quantize_tensor",
    gptq="gptq_weight",
    hadamard="hadamard_block hadamard_matrix hadamard_transform",
    layers="QATLinear QuantizedLinear",
    levels="Format float_rounding microscale nearest_of table",
    opened="open_layers",
    qat="SCHEMES AbsMaxQuantizer LSQQuantizer QuestQuantizer make_quantizer optimal_gaussian_scale staircase",
    record="CoverageWarning Quantization",
    saving="load_quantized save_quantized",
    watching="coverage",
)
