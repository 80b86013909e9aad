"""Faults on purpose: a forked process whose n-th change of a folder fails, tears a file, or is its last; flipped bits.

Every change that Python code makes (opening for writing, renaming, removing, making folders) is seen by an audit hook,
so that a new place that writes is in the sweep by itself.
"""

import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

KINDS = ("raises", "full from then on", "dies", "tears the file, then dies")
DIED, PASSED_BY = 9, 8  # exit codes: of a fault that kills, and of work that ended well in spite of one
_HIT: list[bool] = []


def in_child(work: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> int:
    """Runs `work` in a forked process after `prepare`; its exit code, 1 for an exception, negative for a signal."""
    return ended(start(work, prepare))


def start(work: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        # pools of threads do not come along: whoever asked theirs for work would wait for ever
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)
        try:
            prepare()
            work()
            code = PASSED_BY if _HIT else 0
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_change(kind: str, number: int, folder: Path) -> Callable[[], None]:
    """Prepares a child so that its change `number` (from 1) below `folder` is hit by a fault of KINDS."""

    def prepare() -> None:
        count, torn = 0, False

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count, torn
            if not _changes(event, arguments, str(folder)):
                return
            count += 1
            if count < number:
                return
            _HIT.append(True)
            if kind == "full from then on" or (kind == "raises" and count == number):
                raise OSError(28, "No space left on device")
            if kind == "dies" or torn:
                os._exit(DIED)
            if kind == "tears the file, then dies" and event == "os.rename" and os.path.isfile(arguments[0]):
                torn = True
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)

        sys.addaudithook(hook)

    return prepare


def _changes(event: str, arguments: tuple, folder: str) -> bool:
    if event == "open":
        path, mode, flags = arguments
        writing = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+")
        return bool(writing) and isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(folder)
    return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(arguments[0]).startswith(folder)


def smallest_file_that_does_not_fit(size: int) -> Callable[[], None]:
    """Prepares a child so that no file may grow beyond `size` bytes, as on a disk that is full."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


def signalled(work: Callable[[], object], number: signal.Signals, after: float) -> int:
    """Runs `work` in a forked process that gets a signal after so many seconds; its exit code as of `in_child`."""
    child = start(work)
    time.sleep(after)
    os.kill(child, number)
    return ended(child)


def flip_a_bit(file: Path, rng: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)
