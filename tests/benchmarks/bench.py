"""`make bench`: all benchmarks, or those named, into data/results/benchmarks.csv and the README's table.

python tests/benchmarks/bench.py --only optimizers     on a machine that does nothing else; about 15 minutes for all
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
ROOMS = ("training", "optimizers", "quantizers", "propagation", "evaluate", "together")


def main(arguments: list[str] | None = None) -> None:
    import benchmarking

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ROOMS, default=list(ROOMS), help="which benchmarks")
    for name in parser.parse_args(arguments).only:
        start = time.perf_counter()
        table = importlib.import_module(f"test_{name}").measure()
        print(f"{name}, {time.perf_counter() - start:.0f} s")
        print(benchmarking.with_targets(table).to_string(index=False))
        benchmarking.write(table)


if __name__ == "__main__":
    main()
