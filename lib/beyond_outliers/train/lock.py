"""One process a run, and what it does when a batch system asks it to stop."""

import contextlib
import fcntl
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

TRY_AGAIN = 75  # exit code (EX_TEMPFAIL) of a run that saved and stopped: the same command goes on


class RunHeld(RuntimeError):
    """Another process holds the lock; the message names it."""


@contextlib.contextmanager
def held(file: Path, wait: bool = True) -> Iterator[TextIO]:
    """Holds a lock file as the only process; it is free again as soon as its holder ends, however that was killed.

    While another process holds it: says which one, and waits for it, or (wait=False) raises RunHeld. PermissionError,
    with the remedy, where nothing can be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise PermissionError(
            f"{file.parent} cannot be written ({error.strerror}): set BEYOND_OUTLIERS_OUTPUT to a folder that can be"
        ) from None
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            message = f"{file.parent} is held by {lock.read().strip() or 'another process'}"
            if not wait:
                raise RunHeld(f"{message}: wait for it, or end it") from None
            print(f"{message}; waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            print(f"{file} cannot be locked ({error}); see to it that no other process works there", file=sys.stderr)
        sign(lock, os.getpid())
        yield lock


def sign(lock: TextIO, process: int) -> None:
    """Writes into a lock that is held who holds it: whom to wait for, or to end."""
    lock.truncate(0)
    lock.write(f"process {process} on {platform.node()} since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n")
    lock.flush()


class Termination:
    """Whether SIGTERM has come, while this is entered; the signal itself then ends nothing."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Termination":
        self._here = threading.current_thread() is threading.main_thread()  # the only one that may handle signals
        if self._here:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._here:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
