"""Several workers beside one: how far apart the same run ends, and what sharing the optimizers' work saves of a step.

python tests/benchmarks/test_workers.py deviations   # writes data/results/workers.csv
python tests/benchmarks/test_workers.py times        # writes data/results/sharing.csv; on a machine that is idle
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from beyond_outliers import paths
from beyond_outliers.config import Olmo2Config
from beyond_outliers.model import Olmo2
from beyond_outliers.optimizers import OPTIMIZERS, build_optimizer

STEPS = 50
QUEST = {"scheme": "quest", "weights": "int4", "activations": "int4"}
WIDE = Olmo2Config(vocab_size=2048, width=256, depth=6, n_heads=4)
REPEATS = 20  # steps: a refresh cycle of Shampoo, two of SOAP and of PSGD, whose probability is held at 0.1


def compare_workers(folder: Path, optimizers=tuple(OPTIMIZERS), dtypes=("float64", "float32")) -> pd.DataFrame:
    """One row an optimizer, scheme and dtype: furthest weights after 50 steps, of about one in size.

    `deviation`: two workers from one process, which adds up the gradients of eight sequences at once. `control`: from
    it one process in two micro-batches of four, which adds up the same sums as the two workers. `between`: those two.
    """
    import tiny
    from prose import sentences
    from torchrun import furthest, trained, weights

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prose.txt").write_text("\n\n".join(sentences(3000)))
    base = tiny.run_config(tiny.corpus_config(folder / "prose.txt"))
    base = base.replace(lr=1e-3, tokens_per_parameter=0.57, evaluations=1)
    assert base.steps == STEPS
    runs = {
        (name, scheme): base.replace(optimizer=name, quantization=qat)
        for name in optimizers
        for scheme, qat in (("none", None), ("quest", QUEST))
    }
    halves = {key: config.replace(micro_batch=4) for key, config in runs.items()}
    rows = []
    for dtype in dtypes:
        for workers, configs in ((1, [*runs.values(), *halves.values()]), (2, list(runs.values()))):
            done, _ = trained(configs, folder / f"{dtype}-{workers}", workers, dtype)
            assert done.returncode == 0, done.stderr[-3000:]
        for (name, scheme), config in runs.items():
            one, two = (weights(config, folder / f"{dtype}-{workers}") for workers in (1, 2))
            half = weights(halves[name, scheme], folder / f"{dtype}-1")
            distances = {"deviation": furthest(one, two), "control": furthest(one, half)}
            distances["between"] = furthest(two, half)
            rows.append({"optimizer": name, "scheme": scheme, "dtype": dtype, "steps": STEPS, **distances})
    return pd.DataFrame(rows)


def step_times(shared: bool, names=tuple(OPTIMIZERS)) -> dict[str, float]:
    """Optimizer -> milliseconds of this worker's step on WIDE, the mean over a refresh cycle."""
    found = {}
    for name in names:
        torch.manual_seed(0)
        model = Olmo2(WIDE)
        optimizer = build_optimizer(model, name, 1e-3, **({"update_probability": 0.1} if name == "psgd" else {}))
        if shared and hasattr(optimizer, "share"):
            optimizer.share()
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        times = []
        for _ in range(1 + REPEATS):
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            start = time.perf_counter()
            optimizer.step()
            times.append((time.perf_counter() - start) * 1e3)
        found[name] = statistics.mean(times[1:])
    return found


def compare_sharing(names=tuple(OPTIMIZERS)) -> pd.DataFrame:
    """One row an optimizer: milliseconds of its step by one worker, by two that both do all, and by two that share."""
    measured = {"one": step_times(False, names)}
    for key in ("both", "shared"):
        with tempfile.TemporaryDirectory() as folder:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
            command = [sys.executable, *launcher, "_worker", key, json.dumps(names), folder]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr[-3000:]
            times = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
        measured[key] = {name: max(worker[name] for worker in times) for name in names}
    table = pd.DataFrame({f"{key}_ms": times for key, times in measured.items()}).rename_axis("optimizer").reset_index()
    return table.assign(size="6x256", n_parameters=WIDE.n_parameters, speedup=table.both_ms / table.shared_ms)


def _worker(kind: str, names: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = step_times(kind == "shared", tuple(json.loads(names)))
    Path(folder, f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_deviations_of_two_workers(tmp_path):
    table = compare_workers(tmp_path, ("adamw",), ("float64",))
    assert list(table.scheme) == ["none", "quest"] and table.deviation.max() < 1e-9 and table.between.max() == 0


@pytest.mark.slow
def test_every_way_to_share_is_timed():
    (row,) = compare_sharing(("muon",)).to_dict("records")
    assert min(row[f"{way}_ms"] for way in ("one", "both", "shared")) > 0
    assert row["speedup"] == row["both_ms"] / row["shared_ms"]


if __name__ == "__main__":
    sys.path.insert(0, str(paths.ROOT / "tests" / "support"))
    what, *rest = sys.argv[1:]
    if what == "_worker":
        _worker(*rest)
    else:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            table = compare_workers(Path(folder)) if what == "deviations" else compare_sharing()
        print(table.to_string())
        table.to_csv(paths.RESULTS / {"deviations": "workers.csv", "times": "sharing.csv"}[what], index=False)
