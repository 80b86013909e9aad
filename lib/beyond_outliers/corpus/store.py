"""Documents on disk, split by group, duplicates gone, in constant memory whatever their number and size.

Texts go to one spill file; an SQLite index beside it holds 50 bytes a document (group, hash, place) and sorts outside
of memory. Disk: once the text, and about 200 bytes a document while the split is made.
"""

import hashlib
import itertools
import math
import sqlite3
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CACHE_MB = 32  # memory of the index; its sorts spill to the store's folder beyond it
BATCH = 2048  # documents a write to the index


class Texts:
    """One side of a split, read from disk each time it is iterated: texts in order; `bytes`, `characters`."""

    def __init__(self, folder: Path, index: sqlite3.Connection, held: int):
        self._file, self._index, self._held = folder / "texts", index, held
        totals = "SELECT TOTAL(bytes), TOTAL(characters) FROM kept WHERE held = ?"
        self.bytes, self.characters = map(int, index.execute(totals, (held,)).fetchone())

    def __iter__(self) -> Iterator[str]:
        rows = self._index.execute("SELECT place, bytes FROM kept WHERE held = ? ORDER BY rank", (self._held,))
        with self._file.open("rb") as file:
            for place, size in rows:
                if file.tell() != place:  # a seek throws away what was read ahead
                    file.seek(place)
                yield file.read(size).decode()


@contextmanager
def split(pairs: Iterable[tuple[str, str]], validation_share: float, folder: Path) -> Iterator[tuple[Texts, Texts]]:
    """(training, validation) texts of (group, text) pairs, split by group, exact duplicates dropped, also across sides.

    A text is a str that UTF-8 can write, and not empty. The texts can be iterated as often as needed while this is
    entered; `folder` is an empty one, and the caller's to remove.

    Groups picked by a hash of their name hold `validation_share` of the characters. The groups are visited in the order
    of that hash, and each is held out that still fits. A group larger than the whole share is held out only where
    without it less than half the share would be, and only the smallest such group. Duplicates go where they came first
    in the training side, or else in the validation side; each side is ordered by the first appearance of its groups,
    then by appearance.
    Raises ValueError for fewer than two groups. Warns when validation ends outside half to twice its share.
    """
    # the trainer of `tokenizers` reads its texts in a thread of its own, while this one waits
    index = sqlite3.connect(folder / "index.sqlite", isolation_level=None, check_same_thread=False)
    # sorts spill beside the texts: the system's folder for temporary files may be small, or itself in memory
    directory = "PRAGMA temp_store_directory = '{}'"
    index.execute(directory.format(str(folder.resolve()).replace("'", "''")))
    try:
        index.executescript(f"""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE;
            PRAGMA cache_size = -{CACHE_MB * 1024}; PRAGMA temp_store = FILE;
            CREATE TABLE documents (position INTEGER PRIMARY KEY, team INTEGER, digest BLOB,
                                    place INTEGER, bytes INTEGER, characters INTEGER);
            CREATE TABLE teams (team INTEGER PRIMARY KEY, first INTEGER, characters INTEGER);
            CREATE TABLE held (team INTEGER PRIMARY KEY);
            CREATE TABLE ranked (rank INTEGER PRIMARY KEY, held INTEGER, digest BLOB,
                                 place INTEGER, bytes INTEGER, characters INTEGER);
            CREATE TABLE kept (rank INTEGER PRIMARY KEY, held INTEGER,
                               place INTEGER, bytes INTEGER, characters INTEGER);
        """)
        with (folder / "texts").open("wb") as file:
            _insert(index, "documents VALUES (NULL, ?, ?, ?, ?, ?)", (_spill(file, *pair) for pair in pairs))
        # characters of every group, its duplicates counted once, and the position of its first document
        index.execute("""
            INSERT INTO teams
                SELECT team, MIN(first), SUM(characters)
                FROM (SELECT team, MIN(position) AS first, characters FROM documents GROUP BY team, digest)
                GROUP BY team ORDER BY team
        """)
        _hold_out(index, validation_share)
        index.executescript("""
            INSERT INTO ranked
                SELECT NULL, documents.team IN held, digest, place, bytes, documents.characters
                FROM documents JOIN teams USING (team) ORDER BY 2, teams.first, position;
            DROP TABLE documents;
            INSERT INTO kept
                SELECT MIN(rank), held, place, bytes, characters FROM ranked GROUP BY digest ORDER BY 1;
            DROP TABLE ranked;
        """)
        train, validation = (Texts(folder, index, held) for held in (0, 1))
        share = validation.characters / (train.characters + validation.characters)
        if not validation_share / 2 <= share <= validation_share * 2:
            warnings.warn(
                f"{share:.2%} of the text is held out for validation, not the {validation_share:.2%} asked for: "
                "groups are held out whole, less the texts that training also has",
                stacklevel=4,
            )
        yield train, validation
    finally:
        index.execute(directory.format(""))  # the setting holds for the whole process
        index.close()


def _insert(index: sqlite3.Connection, where: str, rows: Iterable[tuple]) -> None:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, BATCH)):
        index.execute("BEGIN")
        index.executemany(f"INSERT INTO {where}", batch)
        index.execute("COMMIT")


def _spill(file: BinaryIO, group: str, text: str) -> tuple[int, bytes, int, int, int]:
    raw, place = text.encode(), file.tell()
    file.write(raw)
    # the first 64 bits of the group's hash, moved to SQLite's signed integers: their order is that of `uniform`
    team = int.from_bytes(hashlib.sha256(group.encode(errors="surrogatepass")).digest()[:8], "big") - 2**63
    return team, hashlib.sha256(raw).digest()[:16], place, len(raw), len(text)


def _hold_out(index: sqlite3.Connection, share: float) -> None:
    n_groups, total = index.execute("SELECT COUNT(*), TOTAL(characters) FROM teams").fetchone()
    if n_groups < 2:
        raise ValueError(f"a split by group needs at least two groups, this corpus has {n_groups}")
    target = room = share * total

    def fitting() -> Iterator[tuple[int]]:
        nonlocal room
        for team, size in index.execute("SELECT team, characters FROM teams ORDER BY team"):
            if size <= room:
                room -= size
                yield (team,)

    _insert(index, "held VALUES (?)", fitting())
    held = target - room
    if held >= target / 2:
        return
    rest = "SELECT team, characters FROM teams WHERE team NOT IN held ORDER BY characters, team LIMIT 2"
    (team, size), *others = index.execute(rest).fetchall()
    # the next group together with those held so far, in their place, or not at all: what comes nearest
    choices = {"in their place": size, "not at all": held, "together": held + size if others else 0}

    def distance(choice: str) -> tuple[bool, float]:
        got = choices[choice] / total
        odds = math.log(got / (1 - got) / (share / (1 - share)))
        return not share / 2 <= got <= 2 * share, abs(odds)

    nearest = min((choice for choice, characters in choices.items() if characters), key=distance)
    if nearest == "in their place":
        index.execute("DELETE FROM held")
    if nearest != "not at all":
        index.execute("INSERT INTO held VALUES (?)", (team,))
