"""Files that are written whole and checked when they are read: SHA256SUMS in a folder, as `sha256sum -c` reads it.

Its last line, a comment to that program, is the sum of the lines before it.
While a file is replaced, its folder's SHA256SUMS names both its old and its new sum, so that a crash at any moment
leaves a file that is as it should be: the old one or the new one. A folder without SHA256SUMS, from before there were
any, is not checked; in one that has it, every file that is read must be in it.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from beyond_outliers import paths

SUMS = "SHA256SUMS"
PAGES = "*.[mp]*"  # Markdown, PNG and PDF: what is committed of a study's figures (HTML is not)


class DamagedFile(RuntimeError):
    """A file is not what was written, is missing, or is not among its folder's sums; the message says what to do."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(folder: Path) -> dict[str, set[str]] | None:
    """Name -> the sums that the file may have; None for a folder without sums. DamagedFile for what is no such file."""
    file = folder / SUMS
    if not file.exists():
        return None
    lines, _, last = file.read_bytes().decode(errors="replace").rpartition("# ")
    if last != f"{hashlib.sha256(lines.encode()).hexdigest()}\n":
        raise DamagedFile(f"{file} is damaged (without it the files beside it are taken as they are)")
    found: dict[str, set[str]] = {}
    for line in lines.splitlines():
        digest, _, name = line.partition("  ")
        found.setdefault(name, set()).add(digest)
    return found


def check(folder: Path, *names: str, remedy: str = "") -> None:
    """DamagedFile, with the remedy, unless the files of a folder are as they were written; all of them by default."""
    for last in (False, False, True):
        try:
            _check(folder, names)
            return
        except DamagedFile as damage:
            if last:
                raise DamagedFile(f"{damage}{': ' if remedy else ''}{remedy}") from None
            time.sleep(0.1)  # another process may be in the middle of replacing it


def _check(folder: Path, names: Collection[str]) -> None:
    sums = read_sums(folder)
    if sums is None:
        return
    for name in names or sums:
        if name not in sums:
            raise DamagedFile(f"{folder / name} is not in {SUMS} of its folder")
        try:
            found = sha256(folder / name)
        except FileNotFoundError:
            raise DamagedFile(f"{folder / name} is missing") from None
        if found not in sums[name]:
            raise DamagedFile(f"{folder / name} is damaged: it is not what was written, by its SHA-256")


def write_files(folder: Path, writers: Mapping[str, Callable[[Path], object]], remove: Collection[str] = ()) -> None:
    """Writes files of a folder whole or not at all, in this order, with their sums; then removes others.

    writers: name -> what writes the file to the path that it is given. They reach the disk before they get their names.
    In a folder that has no sums yet, the files that are there get theirs.
    """
    temporary = {name: (folder / name).with_name(f"{Path(name).name}.tmp") for name in writers}
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        try:
            for name, path in temporary.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                for left in path.parent.glob(".tmp*"):  # by safetensors, of a process that was killed
                    left.unlink()
                writers[name](path)
                to_disk(path)
            new = {name: {sha256(path)} for name, path in temporary.items()}
            sums = read_sums(folder)
            if sums is None:
                sums = {name: {sha256(folder / name)} for name in _files(folder, "*")}
            _write_sums(folder, sums | {name: sums.get(name, set()) | found for name, found in new.items()})
            for name, path in temporary.items():
                os.replace(path, folder / name)
            to_disk(folder)
            _write_sums(folder, {name: found for name, found in (sums | new).items() if name not in remove})
            for name in remove:
                (folder / name).unlink(missing_ok=True)
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes one file of a folder with sums."""
    write_files(path.parent, {path.name: lambda temporary: temporary.write_text(text, encoding="utf-8")})


def seal(folder: Path, known: str = "*") -> list[str]:
    """Takes the files of a folder for right as they are; returns those that its sums did not name as they are now."""
    with _held(folder):
        found = {name: {sha256(folder / name)} for name in _files(folder, known)}
        try:
            before = read_sums(folder) or {}
        except DamagedFile:
            before = {}
        if found != before:
            for name in found:
                to_disk(folder / name)
            _write_sums(folder, found)
    return sorted(
        name for name in found.keys() | before.keys() if found.get(name, set()).isdisjoint(before.get(name, ()))
    )


def _files(folder: Path, known: str) -> list[str]:
    """Files of a folder, and weights one folder below: no sums, locks, parts of files."""
    found = [f for pattern in (known, "*/*.safetensors") for f in folder.glob(pattern) if f.is_file()]
    return sorted(
        str(f.relative_to(folder)) for f in found if f.name[0] != "." and f.suffix != ".tmp" and f.name != SUMS
    )


def _write_sums(folder: Path, sums: Mapping[str, Collection[str]]) -> None:
    lines = "".join(f"{found}  {name}\n" for name in sorted(sums) for found in sorted(sums[name]))
    paths.write_whole(folder / SUMS, f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n")


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process. Where a file system has no locks, without one."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
