"""A quantized model on disk: one safetensors file of its tensors and one JSON file of what was done to it.

save_quantized(quantized, folder)
quantized = load_quantized(Model(config), folder)      # any weights: all are overwritten
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from beyond_outliers import paths
from beyond_outliers.anymodel.linears import UNCALLED
from beyond_outliers.passes import plain_settings
from beyond_outliers.quantizers.convert import converted, freeze_qat
from beyond_outliers.quantizers.record import Quantization, Weight, record_of
from beyond_outliers.quantizers.spec import QuantSpec

TENSORS, SETTINGS = "quantized.safetensors", "quantization.json"


def _refuse(label: str, *_args, **_kwargs):
    """Stands for `save_pretrained`, whose files would load with random weights in place of the rounded ones."""
    raise ValueError(
        f"save_pretrained of a quantized {label}: what it writes would load as a model with random weights; "
        "valid: save_quantized(model, folder), then load_quantized(model, folder)"
    )


def refuse_save_pretrained(model: nn.Module):
    """Makes `save_pretrained` and `push_to_hub` of every part of `model` an error that says what to do instead."""
    module: Any  # torch types the attributes of modules as Tensor or Module
    for module in model.modules():
        if hasattr(type(module), "save_pretrained"):
            module.save_pretrained = module.push_to_hub = partial(_refuse, type(module).__name__)


def save_quantized(model: nn.Module, folder: str | Path) -> Path:
    """Writes what `quantize_model`, `prepare_qat` or `freeze_qat` returned into `folder`; returns it.

    Raises ValueError for other models, and for modules whose get_extra_state gives no tensor.
    """
    from safetensors.torch import save

    record = record_of(model)
    if extra := [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise ValueError(f"states that are no tensors: {', '.join(extra)}; valid: a get_extra_state that gives tensors")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # a tied tensor is written under each of its names: simple, and it loads into any tying
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    settings = dataclasses.asdict(record) | {"model": type(model).__name__}
    paths.write_whole(folder / TENSORS, save(state))  # bytes: safetensors' own files are their owner's alone
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return folder


@plain_settings()
def load_quantized(model: nn.Module | Callable[[], nn.Module], folder: str | Path) -> nn.Module:
    """The model that `save_quantized` wrote, with identical outputs.

    model: the full-precision model (or a function that makes it) of the same configuration and dtype, whatever its
    weights; it stays as it is. Raises ValueError where there are no such files, and naming the tensors that do not fit.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / SETTINGS).is_file() or not (folder / TENSORS).is_file():
        raise ValueError(f"no quantized model at {str(folder)!r}; valid: a folder that save_quantized wrote")
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    spec, stage, scheme = QuantSpec(**settings["spec"]), settings["stage"], settings["scheme"]
    model = model if isinstance(model, nn.Module) else model()
    weights = [Weight(**weight) for weight in settings["weights"]]
    past = [weight.name for weight in weights if weight.reason == UNCALLED]
    record = Quantization(spec, "ptq" if stage == "ptq" else "qat", scheme)
    loaded = converted(model, record, round_weights=False, past=past)
    loaded = freeze_qat(loaded) if stage == "frozen" else loaded
    tensors, state = load_file(folder / TENSORS), loaded.state_dict()
    wrong = sorted(tensors.keys() ^ state.keys())
    wrong += [n for n, x in tensors.items() if n in state and (x.shape, x.dtype) != (state[n].shape, state[n].dtype)]
    if wrong:
        raise ValueError(f"{type(model).__name__} does not fit {settings['model']}, saved: {', '.join(wrong[:8])}")
    loaded.load_state_dict(tensors)
    record = record_of(loaded)
    record.weights, record.never_ran = weights, settings["never_ran"]
    return loaded.eval() if not model.training else loaded
