"""Number formats, rotations, quantizers for training, and models under quantization."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    convert="QuantizedLinear freeze_qat prepare_qat quantize_model weights_held",
    formats="FORMATS Format float_rounding microscale nearest_of quantize_tensor table",
    gptq="gptq_weight",
    hadamard="hadamard_block hadamard_matrix hadamard_transform",
    qat="SCHEMES AbsMaxQuantizer LSQQuantizer QATLinear QuestQuantizer make_quantizer optimal_gaussian_scale staircase",
    record="CoverageWarning Quantization",
    spec="QuantSpec",
    **{
        ".anymodel.coverage": "coverage",
        ".anymodel.open": "open_layers",
        ".anymodel.save": "load_quantized save_quantized",
    },
)
