"""Measures data/results/guides.csv: which number of a layer tells where bits are needed (see `anymodel.guides`).

.venv/bin/python tests/benchmarks/guides.py [SmolLM2] [confirm]     # half an hour, a few minutes on one core
"""

import sys

import pandas as pd
import torch

from beyond_outliers import paths
from beyond_outliers.anymodel.guides import compare_guides
from beyond_outliers.anymodel.loading import load
from beyond_outliers.anymodel.probe import HELD_OUT, read_windows
from beyond_outliers.corpus.tokens import open_corpus
from beyond_outliers.evaluate.loss import window_starts
from beyond_outliers.quantizers import QuantSpec
from beyond_outliers.study.checkpoints import load_checkpoint

TABLE = paths.RESULTS / "guides.csv"
SMOLLM2 = ("W4", "A4")  # its weights lie on a grid of 16 levels already, in blocks of 32


def smollm2():
    model, tokenizer = load("SmolLM2")
    ids = read_windows(model, tokenizer, HELD_OUT, 48, 20)
    for name in SMOLLM2:
        yield {"model": "SmolLM2-135M", "optimizer": "", "spec": name}, model, QuantSpec.named(name), ids[:8], ids[8:]


def confirm():
    for file in sorted((paths.ROOT / "data" / "checkpoints" / "confirm").glob("*.safetensors")):
        config, model = load_checkpoint(file)
        if config.quantization:
            continue
        tokens = open_corpus(config.corpus, config.context).validation
        starts = window_starts(len(tokens), config.context, 64 * config.context)
        rows = [torch.from_numpy(tokens[start : start + config.context].astype("int64")) for start in starts]
        ids = torch.stack(rows)
        yield (
            {"model": config.size, "optimizer": config.optimizer, "spec": "W4A4"},
            model,
            QuantSpec(),
            ids[::2],
            ids[1::2],
        )


def main(names: list[str]):
    for name, source in {"SmolLM2": smollm2, "confirm": confirm}.items():
        if name not in names:
            continue
        for labels, *what in source():
            table = compare_guides(*what)
            for column, value in reversed(labels.items()):
                table.insert(0, column, value)
            print(table.to_string(), flush=True)
            known = pd.read_csv(TABLE, keep_default_na=False, na_values={"bits": ""}) if TABLE.exists() else table[:0]
            same = (known[list(labels)] == pd.Series(labels)).all(axis=1)
            pd.concat([known[~same], table]).to_csv(TABLE, index=False)


main(sys.argv[1:] or ["SmolLM2", "confirm"])
