"""Step time of every optimizer beside public implementations, paired in one process.

`python tests/benchmarks/test_optimizers.py` measures the study's table and writes it to data/results/benchmarks.csv;
`pytest --benchmark-only tests/benchmarks/test_optimizers.py` times one step of each optimizer.
"""

import time

import pandas as pd
import pytest
import torch

from beyond_outliers.config import Olmo2Config
from beyond_outliers.model import Olmo2
from beyond_outliers.optimizers import OPTIMIZERS, REGISTRY, build_optimizer, parameter_groups
from beyond_outliers.paths import RESULTS

WIDE = {"6x256": Olmo2Config(vocab_size=2048, width=256, depth=6, n_heads=4)}
LAPTOP = {
    "2x64": Olmo2Config(vocab_size=512, width=64, depth=2, n_heads=2),
    "4x96": Olmo2Config(vocab_size=1024, width=96, depth=4, n_heads=3),
    "4x128": Olmo2Config(vocab_size=2048, width=128, depth=4, n_heads=4),
}
# Steps between refreshes; PSGD's update probability is held at 0.1 for both, so that a cycle has both kinds of steps.
PERIOD = {"shampoo": 20, "soap": 10, "psgd": 10}


def implementations(name: str) -> dict:
    """label -> (constructor over a list of matrices, whether it computes the same thing as ours)."""
    import heavyball
    import pytorch_optimizer as public

    heavyball.utils.compile_mode = None  # eager, like all the others
    spectral = 2  # pytorch_optimizer's LMONorm.SPECTRAL
    table = {
        "adamw": {"torch.optim.AdamW fused": (lambda p: torch.optim.AdamW(p, 0.01, fused=True), True)},
        # Theirs iterate in bfloat16, ours in float32 unless told otherwise.
        "muon": {
            "ours, bfloat16": (lambda p: REGISTRY["muon"].optimizer(p, 0.01, ns_dtype=torch.bfloat16), True),
            "torch.optim.Muon": (lambda p: torch.optim.Muon(p, 0.01), True),
            "heavyball Muon": (lambda p: heavyball.Muon(p, 0.01), False),  # leaves its reference by 16 %
        },
        "scion": {
            "ours, bfloat16": (lambda p: REGISTRY["scion"].optimizer(p, 0.01, ns_dtype=torch.bfloat16), True),
            "pytorch_optimizer SCION": (lambda p: public.SCION(p, 0.01, norm_type=spectral), True),
            "heavyball Scion": (lambda p: heavyball.Scion(p, 0.01), False),  # re-initialises the weights
        },
        "psgd": {
            "pytorch_optimizer Kron": (lambda p: public.Kron(p, 0.01, pre_conditioner_update_probability=0.1), True),
            "heavyball PSGDKron": (lambda p: heavyball.PSGDKron(p, 0.01), False),  # its own update schedule
        },
        # Preconditions before averaging and grafts another rule: the nearest public kin, not the same thing.
        "shampoo": {
            "pytorch_optimizer Shampoo": (lambda p: public.Shampoo(p, 0.01, preconditioning_compute_steps=20), False)
        },
        "soap": {
            "pytorch_optimizer SOAP": (lambda p: public.SOAP(p, 0.01, weight_decay=0.0), True),
            "heavyball SOAP": (lambda p: heavyball.SOAP(p, 0.01, precondition_frequency=10), False),  # its own schedule
        },
    }
    hyper = {"update_probability": 0.1} if name == "psgd" else {}
    return {"ours": (lambda p: REGISTRY[name].optimizer(p, lr=0.01, **hyper), True), **table.get(name, {})}


def matrices(config: Olmo2Config) -> list[torch.Tensor]:
    """Fresh copies of a model's hidden matrices, with gradients."""
    torch.manual_seed(0)
    found = next(g["params"] for g in parameter_groups(Olmo2(config)) if g["role"] == "matrix")
    params = [p.detach().clone().requires_grad_() for _, p in found]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def compare_optimizers(
    model_sizes: dict[str, Olmo2Config], threads: int = 1, cycles: int = 2, names: tuple[str, ...] = tuple(OPTIMIZERS)
) -> pd.DataFrame:
    """Milliseconds a step on the hidden matrices of each size; one row per (size, optimizer, implementation).

    The implementations of an optimizer take turns, step by step, so that all see the same machine. Times are CPU time
    of the process over `threads`: wall-clock on a shared machine measures the neighbours. Columns: q25, median, q75 of
    the steps without refresh, `refresh` (median of the steps with one; absent: NaN), `mean` over a whole cycle, and
    `ratio` (and `ratio_refresh`): ours over the fastest public one that computes the same thing, from the means.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    for size, config in model_sizes.items():
        for name in names:
            period = PERIOD.get(name, 10)
            cases = {label: (matrices(config), make, same) for label, (make, same) in implementations(name).items()}
            cases = {label: (params, make(params), same) for label, (params, make, same) in cases.items()}
            times = {label: [] for label in cases}
            grads = {label: [p.grad for p in params] for label, (params, _, _) in cases.items()}
            for _ in range(1 + period * cycles):
                for label, (params, optimizer, _) in cases.items():
                    for p, grad in zip(params, grads[label], strict=True):
                        p.grad = grad.clone()  # heavyball takes gradients away
                    start = time.process_time()
                    optimizer.step()
                    times[label].append((time.process_time() - start) * 1e3 / threads)
            for label, (_, _, same) in cases.items():
                # The first step allocates, so index i is step i + 2; SOAP does not count its first call.
                measured = pd.Series(times[label][1:])
                offset = 1 if name == "soap" else 2
                is_refresh = pd.Series([name in PERIOD and (i + offset) % period == 0 for i in measured.index])
                regular, refresh = measured[~is_refresh], measured[is_refresh]
                rows.append(
                    {
                        "benchmark": "optimizer step",
                        "size": size,
                        "threads": threads,
                        "optimizer": name,
                        "implementation": label,
                        "same": same,
                        "q25": regular.quantile(0.25),
                        "median": regular.median(),
                        "q75": regular.quantile(0.75),
                        "refresh": refresh.median(),
                        "mean": (regular.median() * (period - 1) + refresh.median()) / period
                        if len(refresh)
                        else regular.median(),
                    }
                )
    torch.set_num_threads(before)
    table = pd.DataFrame(rows)
    public = table[~table.implementation.str.startswith("ours") & table.same]
    for column, ratio in (("median", "ratio_regular"), ("refresh", "ratio_refresh"), ("mean", "ratio")):
        fastest = public.groupby(["size", "optimizer"])[column].min()
        keys = pd.MultiIndex.from_frame(table[["size", "optimizer"]])
        table[ratio] = table[column] / fastest.reindex(keys).to_numpy()
    return table


def share_of_training_step(model_sizes: dict[str, Olmo2Config], threads: int = 1, steps: int = 21) -> pd.DataFrame:
    """The optimizer's share of a training step of 32 x 128 tokens, all parameters; CPU time, a whole cycle and a bit.

    PSGD updates its preconditioner at every step here, as in the first 500 steps of a run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    for size, config in model_sizes.items():
        ids = torch.randint(0, config.vocab_size, (32, 129))
        for name in REGISTRY:
            torch.manual_seed(0)
            model = Olmo2(config)
            optimizer = build_optimizer(model, name, 1e-3)
            spent = []
            for _ in range(1 + steps):
                start = time.process_time()
                loss = model.loss(ids[:, :-1], ids[:, 1:])
                optimizer.zero_grad()
                loss.backward()
                middle = time.process_time()
                optimizer.step()
                spent.append((middle - start, time.process_time() - middle))
            model_ms, optimizer_ms = pd.DataFrame(spent[1:]).mean() * 1e3 / threads
            rows.append(
                {
                    "benchmark": "share of a training step",
                    "size": size,
                    "threads": threads,
                    "optimizer": name,
                    "implementation": "ours",
                    "mean": optimizer_ms,
                    "model": model_ms,
                    "share": optimizer_ms / (model_ms + optimizer_ms),
                }
            )
    torch.set_num_threads(before)
    return pd.DataFrame(rows)


def write_rows(table: pd.DataFrame) -> None:
    """Replace the rows of the same benchmarks in data/results/benchmarks.csv."""
    path = RESULTS / "benchmarks.csv"
    if path.exists():
        old = pd.read_csv(path)
        table = pd.concat([old[~old.benchmark.isin(table.benchmark.unique())], table], ignore_index=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format="%.4g")


@pytest.mark.parametrize("name", REGISTRY)
def test_step_time(benchmark, name):
    params = matrices(LAPTOP["4x128"])
    optimizer = REGISTRY[name].optimizer(params, lr=0.01)
    benchmark.pedantic(optimizer.step, rounds=21, warmup_rounds=1)


def test_comparison_covers_all_sizes_and_kinds_of_steps(benchmark):
    sizes = {"2x64": LAPTOP["2x64"]}
    table = benchmark.pedantic(compare_optimizers, (sizes,), {"names": ("muon", "psgd", "shampoo", "soap")}, rounds=1)
    assert (table.q25 <= table.q75).all() and (table["mean"] > 0).all()
    assert table.refresh.notna().eq(table.optimizer.isin(PERIOD)).all()
    ours = table[table.implementation == "ours"].set_index("optimizer")
    assert ours.ratio.notna().eq(ours.index != "shampoo").all()


if __name__ == "__main__":
    result = pd.concat([compare_optimizers(WIDE | LAPTOP), share_of_training_step(LAPTOP)])
    write_rows(result)
    print(result.to_string())
