"""The golden gate: what must not move while the house gets thinner, printed as one line a fact.

    python tests/golden.py                     prints the facts that take no training (under two minutes)
    python tests/golden.py --train             also trains two pocket runs and one QAT run (two minutes more)
    python tests/golden.py --against FILE      exit code 1, and the lines that differ, unless FILE holds the same facts

Run it before and after a move, on one machine: the last digits of losses belong to a processor. tests/golden.txt was
printed on an AMD EPYC (family 26, AVX-512) at commit 6c18a4a, before the house was made thinner.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from beyond_outliers import paths
from beyond_outliers.config import CorpusConfig, RunConfig
from beyond_outliers.corpus import open_corpus
from beyond_outliers.evaluate import validation_loss
from beyond_outliers.metrics import activation_metrics
from beyond_outliers.model import Olmo2
from beyond_outliers.propagation import decompose, relative_error
from beyond_outliers.quantizers import QuantSpec, prepare_qat, quantize_model
from beyond_outliers.study import Study
from beyond_outliers.train import train

PUBLIC = {  # of DESIGN.md
    "model": "Olmo2Config Olmo2",
    "optimizers": "build_optimizer Muon Scion Shampoo SOAP PSGD",
    "quantizers": "QuantSpec quantize_tensor quantize_model prepare_qat QuestQuantizer",
    "metrics": "mmr kurtosis activation_metrics",
    "propagation": "decompose",
    "evaluate": "validation_loss zero_shot",
    "scaling": "fit_scaling_law",
    "train": "train",
    "study": "Study",
}
SCALES = ("laptop", "confirm", "llama", "pocket")
REPLAYED = (
    "0.08M-adamw-lr0.04-s208-6ba65eeab4",
    "0.26M-soap-lr0.005-s200-17c0b72397",
    "0.26M-muon-lr0.0025-s200-quest-35397f80e9",
)
REFUSED = {  # a line of smoke.toml -> what takes its place; each is a scale file that must be refused
    'source = "embedded"': "source = 3",
    "context = 64": "context = true",
    "[sizes]": "[size]",
    "[measure]": "[measure]\nquestons = 3",
    "threads = 1": "threads = nan",
    "validation_tokens": "validation_token",
    "[plan]": "[plan]\nbogus = { sizes = [], seeds = [] }",
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def public_names() -> Iterator[str]:
    for module, names in PUBLIC.items():
        for name in names.split():
            there = callable(getattr(importlib.import_module(f"beyond_outliers.{module}"), name))
            yield f"public {module}.{name} {there}"


def tables() -> Iterator[str]:
    for name in ("claims", "verdicts"):
        for file in sorted(paths.RESULTS.glob(f"[!.]*/{name}.csv")):
            yield f"table {file.parent.name}/{name} {digest(file)}"


def config_of(row, settings: dict, corpus: CorpusConfig) -> set[str]:
    """Names that a row's settings give; a table does not say whether the head was quantized in training."""
    shape = {"vocab_size": row.vocab_size, "width": row.width, "depth": row.depth, "n_heads": row.n_heads}
    names = set()
    for head in ({}, {"head": True}):
        scheme = {"scheme": row.scheme, "weights": row.qat_weights, "activations": row.qat_activations} | head
        raw = settings | {
            "scale": row.scale, "size": row.size, "optimizer": row.optimizer, "lr": row.lr, "seed": row.seed,
            "hyper": json.loads(row.hyper), "quantization": None if row.scheme == "none" else scheme,
            "corpus": vars(corpus), "model": shape | settings["model"],
        }  # fmt: skip
        names.add(RunConfig.from_json(json.dumps(raw)).name)
    return names


def run_names() -> Iterator[str]:
    """Every committed run's name, derived again from its settings."""
    for scale in SCALES:
        rows = pd.read_csv(paths.RESULTS / scale / "runs.csv", dtype={"size": str, "run_id": str, "commit": str})
        protocol = Study(scale).protocol
        planned = {}
        for size in protocol.sizes:
            config = protocol.config(
                size, protocol.optimizers[0], lr=0.1, **({"auxiliary": 0.1} if protocol.tuned else {})
            )
            planned[size] = json.loads(config.to_json())
        wrong = []
        for row in rows.itertuples():
            base = planned[row.size]
            shape = {k: v for k, v in base["model"].items() if k not in ("vocab_size", "width", "depth", "n_heads")}
            if row.run not in config_of(
                row, base | {"model": shape, "weight_decay": row.weight_decay}, protocol.corpus
            ):
                wrong.append(row.run)
        yield f"names {scale} {len(rows) - len(wrong)} of {len(rows)} derived again {' '.join(wrong[:3])}"


def corpora() -> Iterator[str]:
    for scale in ("smoke", "pocket"):
        corpus = open_corpus(Study(scale).protocol.corpus)
        for name in ("train", "validation"):
            array = getattr(corpus, name)
            yield f"corpus {scale}/{name} {len(array)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def checkpoint(name: str) -> tuple[RunConfig, torch.nn.Module]:
    file = paths.CHECKPOINTS / "confirm" / f"{name}.safetensors"
    with safe_open(file, "pt") as opened:
        config = RunConfig.from_json(opened.metadata()["config"])
    model: torch.nn.Module = Olmo2(config.model)
    if config.quantization:
        spec = {key: value for key, value in config.quantization.items() if key != "scheme"}
        model = prepare_qat(model, QuantSpec(**spec), scheme=config.quantization["scheme"])
    model.load_state_dict({key: value.float() for key, value in load_file(file).items()}, strict=False)
    return config, model.eval()


def replayed() -> Iterator[str]:
    """Losses, R_L, the sums of a decomposition and MMR of committed checkpoints, to the last digit."""
    literal = {"reduction": "global"} if "reduction" in inspect.signature(relative_error).parameters else {}
    for name in REPLAYED:
        config, model = checkpoint(name)
        corpus = open_corpus(config.corpus)
        loss = validation_loss(model, corpus.validation, config.context, max_tokens=4096).loss
        yield f"replay {name} loss {loss!r}"
        if config.quantization:
            continue
        batches = list(torch.from_numpy(corpus.validation[: 16 * 128].astype("int64")).view(2, 8, 128))
        calibration = torch.from_numpy(corpus.train[: 32 * 128].astype("int64")).view(32, 128)
        for spec in ("W4A4+head", "mxfp4+head", "W4A4+rot+gptq+head"):
            copy = quantize_model(model, QuantSpec.named(spec), calibration if "gptq" in spec else None)
            loss = validation_loss(copy, corpus.validation, config.context, max_tokens=4096).loss
            yield f"replay {name} {spec} {loss!r}"
        copy = quantize_model(model, QuantSpec.named("W4A4+head"))
        parts = decompose(model, copy, batches, **literal)[["R", "A", "B", "C"]].sum()
        yield f"replay {name} decompose " + " ".join(f"{key} {float(value)!r}" for key, value in parts.items())
        yield f"replay {name} mmr {float(activation_metrics(model, batches).mmr.mean())!r}"


def refusals() -> Iterator[str]:
    text = (paths.SCALES / "smoke.toml").read_text()
    for line, instead in REFUSED.items():
        assert line in text, f"{line} is no text of smoke.toml any more"
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "bad.toml").write_text(text.replace(line, instead, 1))
            before, paths.SCALES = paths.SCALES, Path(folder)
            try:
                Study("bad")
                yield f"accepted {instead!r}"
            except ValueError:
                yield f"refused {instead!r}"
            finally:
                paths.SCALES = before


def trained() -> Iterator[str]:
    """Two runs of pocket's smallest size and one of quantization-aware training: loss and weights."""
    protocol = Study("pocket").protocol
    for optimizer, scheme in (("adamw", None), ("soap", None), ("muon", "quest")):
        rate = protocol.grid(optimizer)[1]
        config = protocol.config(protocol.sizes[0], optimizer, lr=rate, seed=200, scheme=scheme, head=bool(scheme))
        with tempfile.TemporaryDirectory() as root:
            result = train(config, threads=1, root=Path(root), progress=False)
            weights = b"".join(value.numpy().tobytes() for _, value in sorted(result.weights(config.steps).items()))
        yield f"trained {config.name} {result.row['val_loss']!r} {hashlib.sha256(weights).hexdigest()[:16]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", action="store_true", help="train three runs, too")
    parser.add_argument("--against", type=Path, help="a file of facts to compare with")
    given = parser.parse_args()
    torch.set_num_threads(1)
    facts = []
    for part in (public_names, tables, run_names, corpora, replayed, refusals, *([trained] if given.train else [])):
        for line in part():
            facts.append(line)
            print(line, flush=True)
    if given.against is None:
        return 0
    known = {line for line in given.against.read_text().splitlines() if given.train or not line.startswith("trained")}
    differences = [f"< {line}" for line in sorted(known - set(facts))] + [
        f"> {line}" for line in facts if line not in known
    ]
    print(*differences, f"{len(differences)} differences", sep="\n", file=sys.stderr)
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
