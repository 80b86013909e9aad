"""`python -m beyond_outliers.train --scale pocket --size 0.08M --optimizer adamw --lr 0.01`: one run from the shell.

The same under torchrun trains with data parallelism.
"""

import argparse
import sys

import torch

from beyond_outliers.checksums import DamagedFile
from beyond_outliers.train.holding import RunHeld
from beyond_outliers.train.loop import train
from beyond_outliers.train.workers import place


def main(arguments: list[str] | None = None) -> int:
    from beyond_outliers.config.protocol import Protocol

    parser = argparse.ArgumentParser(prog="python -m beyond_outliers.train", description=__doc__.split("\n")[0])
    parser.add_argument("--scale", required=True, help="a protocol of data/scales, for instance pocket")
    parser.add_argument("--size", required=True, help="a size of that protocol, for instance 0.04M")
    parser.add_argument("--optimizer", required=True)
    parser.add_argument("--lr", type=float, help="default: the chosen one, or the middle of the protocol's grid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheme", help="quantization-aware training by this scheme, for instance quest")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--compile", default="auto", choices=["auto", "yes", "no"])
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--recompute", action="store_true", help="activation checkpointing: less memory, a third more operations"
    )
    parser.add_argument(
        "--shard", action="store_true", help="under torchrun: every worker keeps a share of the weights"
    )
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory and time, and run nothing")
    given = parser.parse_args(arguments)
    try:
        config = Protocol.load(given.scale).config(
            given.size, given.optimizer, lr=given.lr, seed=given.seed, scheme=given.scheme
        )
    except ValueError as error:
        parser.error(str(error))
    if given.dry_run and given.shard:
        parser.error("--dry-run tells what a worker needs that has the whole model; valid: without --shard")
    if given.dry_run:
        from beyond_outliers.train.forecast import forecast

        workers, rank = place()
        if rank == 0:
            if given.threads:
                torch.set_num_threads(given.threads)
            print(forecast(config, given.device, workers, given.recompute))
        return 0
    compile: dict[str, bool | str] = {"auto": "auto", "yes": True, "no": False}
    try:
        result = train(
            config,
            device=given.device,
            compile=compile[given.compile],
            threads=given.threads,
            recompute=given.recompute,
            shard=given.shard,
        )
    except (DamagedFile, RunHeld, PermissionError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    if result.row:
        print(f"{result.row['status']}: {config.name}, validation loss {result.row['val_loss']:.4f} -> {result.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
