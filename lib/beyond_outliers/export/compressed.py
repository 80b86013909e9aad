"""Quantized models as folders of compressed-tensors, which `transformers` and vLLM load.

The library packs; this module finds scales under which the rounded weights are exact levels of the format.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beyond_outliers.export.folder import export, new_folder, open_run
from beyond_outliers.modules import linear_weight
from beyond_outliers.quantizers.convert import quantize_model
from beyond_outliers.quantizers.formats import FORMATS, absmax_scale, format_named, group_scale, round_e4m3
from beyond_outliers.quantizers.record import record_of
from beyond_outliers.quantizers.spec import QuantSpec

FORMAT = "compressed-tensors"
# fmt: off
WEIGHTS = {  # settings of `QuantizationArgs`; a strategy follows from the blocks
    **{name: {"num_bits": 4, "type": "int"} for name in ("int4", "int4g32", "int4g64", "int4g128")},
    "int8": {"num_bits": 8, "type": "int"}, "fp8": {"num_bits": 8, "type": "float"},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
}
# fmt: on
ACTIVATIONS = ("none", "int8", "fp8")  # rounded token by token as they come


def scheme_of(spec: QuantSpec) -> Any:
    """The `QuantizationScheme` of a spec; ValueError for what the format has no words for."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if (
        spec.weights not in WEIGHTS
        or spec.activations not in ACTIVATIONS
        or spec.rotate
        or spec.granularity == "tensor"
    ):
        raise ValueError(
            f"{FORMAT} has no {spec.name}; valid: weights {', '.join(WEIGHTS)} by rows or blocks, activations "
            f"{', '.join(ACTIVATIONS)}, without rotation"
        )
    size = FORMATS[spec.weights].block or spec.block
    groups = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    weights = QuantizationArgs(**groups | WEIGHTS[spec.weights])
    told = None
    if spec.activations != "none":
        told = QuantizationArgs(**WEIGHTS[spec.activations], strategy="token", dynamic=True)
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=told)


def fitting_scales(rounded: Tensor, original: Tensor, spec: QuantSpec) -> Tensor:
    """Scales (out, groups) of which all entries of `rounded` (out, in) are levels of the format of the weights.

    Those of `original`, where they fit; else, for groups whose scale GPTQ set from moved weights, the largest entry
    over some level. ValueError where none fits.
    """
    size, chosen = FORMATS[spec.weights].block or spec.block or rounded.shape[1], format_named(spec.weights)
    groups, first = (x.float().contiguous().unflatten(1, (-1, size)) for x in (rounded, original))
    top, whole = groups.abs().amax(-1, keepdim=True), original.abs().amax().float()
    scale = group_scale(first, spec.weights, 1, whole)[0]

    def fits(scale: Tensor) -> Tensor:
        units = groups / torch.where(scale == 0, 1.0, scale)
        near = (chosen.round_unit(units) - units).abs() <= 1e-5 * units.abs().clamp(min=1)
        return (near & (units.abs() <= chosen.largest * 1.0001)).all(-1, keepdim=True)

    done = fits(scale)
    for level in chosen.round_unit(torch.linspace(chosen.largest, 1e-3, 2000)).unique().flip(0):
        if bool(done.all()):
            return scale.squeeze(-1)
        other = top / level if level else torch.zeros_like(top)
        scale = torch.where(~done & fits(other), other, scale)
        done = fits(scale)
    raise ValueError(f"no scale makes a weight's groups levels of {spec.weights}; valid: weights that it rounded")


def packed(rounded: Tensor, original: Tensor, spec: QuantSpec, scheme: Any) -> dict[str, Tensor]:
    """What the format stores for a weight (out, in), by the names that it has there."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format

    state = {"weight": rounded, "weight_scale": fitting_scales(rounded, original, spec)}
    if spec.weights == "nvfp4":  # scales of blocks are e4m3 times this of the tensor, which is stored inverted
        top = original.abs().amax().float()
        tensor_scale = absmax_scale(top, FORMATS["nvfp4"].largest * FORMATS["fp8"].largest, top)
        state["weight_global_scale"] = 1 / tensor_scale.reshape(1)
        state["weight_scale"] = round_e4m3(state["weight_scale"] / tensor_scale)
    kind = infer_module_format(nn.Linear, scheme)
    return BaseCompressor.get_value_from_registry(kind.value).compress(state, scheme)


def export_compressed(
    source: str | Path, folder: str | Path, spec: QuantSpec, text: str | Path | None = None, windows: int = 64
) -> Path:
    """Rounds a model as `spec` says and writes it as a compressed-tensors folder; returns the folder.

    source: as `load` takes it, or a run as `open_run` does. With spec.method "gptq", so many windows of 256 tokens of
    `text` (default HELD_OUT) calibrate. The folder is loaded again at the end and its weights compared.
    ValueError for a folder that holds something, a spec that the format cannot hold, and linear layers that are no
    nn.Linear of the model (GPT-2's Conv1D).
    """
    from beyond_outliers.anymodel.loading import load
    from beyond_outliers.anymodel.probe import HELD_OUT, read_windows
    from beyond_outliers.anymodel.sensitivity import linear_layers

    folder, scheme = new_folder(folder), scheme_of(spec)
    with tempfile.TemporaryDirectory() as place:
        try:
            open_run(source)
        except ValueError:
            model, tokenizer = load(source)
        else:
            model, tokenizer = load(export(source, Path(place) / "run"))
    ids = None
    if spec.method == "gptq":
        ids = read_windows(model, tokenizer, Path(text or HELD_OUT), 256, windows).split(8)
    quantized = quantize_model(
        model, spec, ids, strict=True, example=None if ids else torch.zeros(1, 8, dtype=torch.long)
    )
    layers, state = linear_layers(quantized), model.state_dict()
    if wrong := [name for name in layers if not isinstance(model.get_submodule(name), nn.Linear)]:
        raise ValueError(f"{FORMAT} holds nn.Linear alone, not {', '.join(wrong[:4])}; valid: a model without Conv1D")
    for name, layer in layers.items():
        parts = packed(layer.rounded, state.pop(f"{name}.weight"), spec, scheme)
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    left = [weight.name for weight in record_of(quantized).weights if not weight.rounded]
    _write(folder, model, tokenizer, state, left, scheme)
    # the library unpacks nvfp4 in bfloat16
    _check(folder, layers, 5e-3 if spec.weights == "nvfp4" else 2e-5)
    return folder


def _write(folder: Path, model: Any, tokenizer: Any, state: dict, left: list[str], scheme: Any) -> None:
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    kind = infer_module_format(nn.Linear, scheme).value
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=left,
        format=kind,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    model.config.quantization_config = config.model_dump(mode="json")
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def _check(folder: Path, layers: dict[str, Any], tolerance: float) -> None:
    """ValueError where the folder, loaded and unpacked by `transformers`, has other weights than `layers`."""
    from transformers import CompressedTensorsConfig

    from beyond_outliers.anymodel.loading import load

    loaded, _ = load(folder, False, quantization_config=CompressedTensorsConfig(dequantize=True))
    for name, layer in layers.items():
        weight = linear_weight(loaded.get_submodule(name))
        if not torch.allclose(weight.float(), layer.rounded.float(), rtol=tolerance, atol=1e-8):
            raise ValueError(f"{folder}: the weight of {name!r} does not come back as it was rounded")
