"""`make bench`: all benchmarks, or those named, into data/results/benchmarks.csv and the table of docs/speed.md.

python tests/benchmarks/bench.py --only optimizers     on a machine that does nothing else; about 15 minutes for all
python tests/benchmarks/bench.py --only reproduce      `make reproduce` as a whole, 15 minutes more; by name alone

Nothing is written where other processes kept more than a fifth of a core busy, unless --force (make bench FORCE=1).
"""

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
ROOMS = ("training", "optimizers", "quantizers", "propagation", "evaluate", "probe", "figures")
BUSY = 0.2  # cores that other processes may keep busy
COMMANDS = {"figures": "laptop", "reproduce": "pocket"}  # timed as a whole -> at which scale


def busy_elsewhere() -> float:
    """Seconds of CPU time that other processes have had since the start of the machine; 0 where /proc does not tell."""
    if not (stat := Path("/proc/stat")).exists():
        return 0.0
    user, nice, system = map(int, stat.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def main(arguments: list[str] | None = None) -> None:
    import benchmarking

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=[*ROOMS, "reproduce", "cuda"], default=list(ROOMS), help="which benchmarks"
    )
    parser.add_argument("--force", action="store_true", help="write although other processes were at work")
    given = parser.parse_args(arguments)
    for name in given.only:
        start, before = time.perf_counter(), busy_elsewhere()
        room = importlib.import_module("test_commands" if name in COMMANDS else f"test_{name}")
        table = room.measure(name, COMMANDS[name]) if name in COMMANDS else room.measure()
        seconds = time.perf_counter() - start
        others = (busy_elsewhere() - before) / seconds
        print(f"{name}, {seconds:.0f} s; others kept {others:.2f} cores busy, load {os.getloadavg()[0]:.1f}")
        print(benchmarking.with_targets(table).to_string(index=False))
        if others > BUSY and not given.force:
            raise SystemExit(f"not written: {others:.2f} cores were busy; valid: at most {BUSY}, or make bench FORCE=1")
        benchmarking.write(table)


if __name__ == "__main__":
    main()
