"""A lock file: one process at a time, free as soon as its holder ends, however that was killed."""

import contextlib
import fcntl
import os
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO


class RunHeld(RuntimeError):
    """Another process holds the lock; the message names it."""


@contextlib.contextmanager
def held(file: Path, wait: bool = True) -> Iterator[TextIO]:
    """Holds a lock file as the only process.

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
            message = f"{file} is held by {lock.read().strip() or 'another process'}"
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
