"""A run's model as a folder that `transformers` loads: configuration, weights, tokenizer, and the code of the model."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, processors
from torch import Tensor, nn

from beyond_outliers import paths
from beyond_outliers.config.run import RunConfig
from beyond_outliers.corpus.bpe import BOUNDARY
from beyond_outliers.corpus.tokens import open_corpus
from beyond_outliers.quantizers.convert import QuantizedLinear, quantize_model
from beyond_outliers.quantizers.spec import QuantSpec
from beyond_outliers.study.checkpoints import load_checkpoint
from beyond_outliers.study.measure import calibration
from beyond_outliers.train.folder import load_result

LIBRARY = Path(__file__).resolve().parents[1]
CALIBRATION_TOKENS = 16_384
CODE = "modeling_beyond_outliers"
# what the code in hub.py is made of; every import of this project in these files is of one of them
PARTS = (
    *("config/parsing", "config/loading", "config/run", "passes"),
    *("model/loss", "model/decoder", "model/olmo2", "model/llama"),
    *("quantizers/formats", "quantizers/spec", "quantizers/hadamard"),
)


class NotExported(RuntimeError):
    """The folder does not give back the model that was exported."""


def open_run(run: str | Path) -> tuple[RunConfig, nn.Module]:
    """Config and final model of a run: its folder, a committed checkpoint (.safetensors), or its name below data/runs.

    ValueError where there is none, or where the run has not ended.
    """
    path = Path(run)
    if path.suffix == ".safetensors" and path.is_file():
        return load_checkpoint(path)
    folders = [path] if path.is_dir() else sorted(paths.RUNS.glob(f"*/{path.name}"))
    if not folders:
        raise ValueError(f"no run {str(run)!r}; valid: a run's folder or name below {paths.RUNS}, or a checkpoint file")
    result = load_result(folders[0])
    if result is None:
        raise ValueError(f"the run in {folders[0]} has not ended; valid: one with result.json")
    return result.config, result.load_model()


def new_folder(folder: str | Path) -> Path:
    """The folder; ValueError where it holds something already."""
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise ValueError(f"{folder} is not empty; valid: a new folder")
    return Path(folder)


def export(run: str | Path, folder: str | Path, spec: QuantSpec | None = None) -> Path:
    """Writes a run's model, rounded as `spec` says where there is one, for `AutoModelForCausalLM`; returns the folder.

    With spec.method "gptq", CALIBRATION_TOKENS training tokens of the run's corpus calibrate. The folder is loaded
    again at the end, and its logits are compared with the model's, bit by bit (NotExported where they differ).
    ValueError for a run of quantization-aware training, and a folder that holds something already.
    """
    config, model = open_run(run)
    if config.quantization:
        raise ValueError(
            f"{config.name} was trained under quantization, whose grid travels with no specification; valid: a run in "
            "full precision, rounded with spec where it is to be"
        )
    folder = new_folder(folder)
    corpus = open_corpus(config.corpus, config.context)
    rotations: dict[str, int | None] = {}
    if spec is not None:
        inputs = calibration(corpus, config.context, CALIBRATION_TOKENS) if spec.method == "gptq" else None
        model = quantize_model(model, spec, inputs, strict=True)
        rotations = {n: m.rotation for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder, config, spec, rotations)
    # in bytes: safetensors' own files are readable by their owner alone
    paths.write_whole(folder / "model.safetensors", save(_weights(model), metadata={"format": "pt"}))
    _write_tokenizer(folder, corpus.tokenizer, config.context)
    for source, name in [("export/hub", CODE), *((part, Path(part).name) for part in PARTS)]:
        (folder / f"{name}.py").write_text(_relative((LIBRARY / f"{source}.py").read_text(encoding="utf-8")))
    _check(folder, model, config)
    return folder


def _write_config(folder: Path, config: RunConfig, spec: QuantSpec | None, rotations: dict[str, int | None]) -> None:
    shape = dataclasses.asdict(config.model) | {"architecture": config.model.architecture}
    settings: dict[str, Any] = {
        "architectures": ["BeyondOutliersForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE}.BeyondOutliersConfig",
            "AutoModelForCausalLM": f"{CODE}.BeyondOutliersForCausalLM",
        },
        "model_type": "beyond_outliers",
        "shape": shape,
        "context": config.context,
        "quantization": None if spec is None else dataclasses.asdict(spec),
        "rotations": rotations,
        "tie_word_embeddings": "head" not in rotations,
        "run": config.name,
        "dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    paths.write_whole(folder / "config.json", json.dumps(settings, indent=1) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    paths.write_whole(folder / "generation_config.json", json.dumps(generation, indent=1) + "\n")


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state as the exported code names it; a tied head is stored once."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    return {f"decoder.{name}": tensor.detach().contiguous().clone() for name, tensor in state.items()}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """The corpus's tokenizer, which puts the boundary before a text, as training did; its name in a text is text."""
    boundary, tokenizer = tokenizer.token_to_id(BOUNDARY), Tokenizer.from_str(tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A", special_tokens=[(BOUNDARY, boundary)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), BOUNDARY),
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    paths.write_whole(folder / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")


def _relative(source: str) -> str:
    """Imports of this project as imports of files beside."""
    return re.sub(r"from beyond_outliers\.(?:\w+\.)*(\w+) import", r"from .\1 import", source)


def load_exported(folder: str | Path) -> nn.Module:
    """The model of an exported folder, in evaluation mode; it runs the code in the folder."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def _check(folder: Path, model: nn.Module, config: RunConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.model.vocab_size, (2, config.context), generator=generator)
    expected, found = model(ids), load_exported(folder)(ids).logits
    if not torch.equal(expected, found):
        raise NotExported(f"{folder} gives logits up to {(expected - found).abs().max():.1e} from those of the run")
