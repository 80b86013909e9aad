"""Files with sums: what is written is found again, what is changed is named, whatever is cut off in between."""

import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from beyond_outliers import checksums, paths
from beyond_outliers.checksums import SUMS, DamagedFile, check, read_sums, seal, write_files, write_text


def put(folder, **texts):
    write_files(folder, {f"{name}.csv": lambda path, text=text: path.write_text(text) for name, text in texts.items()})


def test_the_sums_are_those_of_sha256sum(tmp_path):
    put(tmp_path, runs="a\n", curves="b\n")
    assert read_sums(tmp_path)["runs.csv"] == {hashlib.sha256(b"a\n").hexdigest()}
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == [SUMS, "curves.csv", "runs.csv"]


@pytest.mark.parametrize("text", ["ybc", "ab", "", "abcd", None])
def test_a_file_that_is_not_what_was_written_is_named_with_the_remedy(tmp_path, text):
    put(tmp_path, runs="abc", curves="whole")
    (tmp_path / "runs.csv").unlink() if text is None else (tmp_path / "runs.csv").write_text(text)
    for names in (["runs.csv"], []):
        with pytest.raises(DamagedFile, match=r"runs\.csv is (missing|damaged.*): fetch it again"):
            check(tmp_path, *names, remedy="fetch it again")
    check(tmp_path, "curves.csv")


def test_every_flipped_bit_of_the_sums_themselves_is_named(tmp_path):
    put(tmp_path, runs="x")
    whole = (tmp_path / SUMS).read_bytes()
    for place in range(len(whole)):
        raw = bytearray(whole)
        raw[place] ^= 1
        (tmp_path / SUMS).write_bytes(raw)
        with pytest.raises(DamagedFile):
            checksums._check(tmp_path, ["runs.csv"])


def test_a_folder_from_before_there_were_sums_is_not_checked(tmp_path):
    (tmp_path / "runs.csv").write_text("old")
    check(tmp_path, "runs.csv")
    put(tmp_path, curves="new")  # takes what is there as it is
    check(tmp_path, "runs.csv", "curves.csv")
    (tmp_path / "runs.csv").write_text("other")
    with pytest.raises(DamagedFile, match=r"runs\.csv is damaged"):
        check(tmp_path)


def test_a_file_that_the_sums_do_not_name_is_refused(tmp_path):
    put(tmp_path, runs="x")
    (tmp_path / "ptq.csv").write_text("y")
    with pytest.raises(DamagedFile, match=r"ptq\.csv is not in SHA256SUMS"):
        check(tmp_path, "ptq.csv")
    assert seal(tmp_path) == ["ptq.csv"] and seal(tmp_path) == []
    check(tmp_path)


@pytest.mark.parametrize("call", range(1, 12))
def test_whatever_call_is_the_last_the_file_is_the_old_or_the_new_one(tmp_path, monkeypatch, call):
    """Dies in the middle of replacing a file, at every call that changes the disk."""
    put(tmp_path, runs="old")
    left = [call]

    def dying(real):
        def one(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return real(*arguments)

        return one

    with monkeypatch.context() as patch:
        patch.setattr(checksums.os, "replace", dying(checksums.os.replace))
        patch.setattr(checksums.os, "fsync", dying(checksums.os.fsync))
        try:
            put(tmp_path, runs="new")
            ended = True
        except KeyboardInterrupt:
            ended = False
    assert ended == (left[0] > 0)
    check(tmp_path)
    assert (tmp_path / "runs.csv").read_text() in ({"new"} if ended else {"old", "new"})
    put(tmp_path, runs="newer")
    check(tmp_path)
    assert read_sums(tmp_path) == {"runs.csv": {hashlib.sha256(b"newer").hexdigest()}}


def test_many_writers_of_one_folder_lose_no_sum(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_text(tmp_path / f"{i % 4}.csv", f"{i}"), range(40)))
    check(tmp_path)
    assert set(read_sums(tmp_path)) == {f"{i}.csv" for i in range(4)}


def test_a_reader_beside_a_writer_sees_no_damage(tmp_path):
    put(tmp_path, runs="0")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [put(tmp_path, runs=str(i)) for i in range(60)])
        while not writing.done():
            check(tmp_path, "runs.csv")
        writing.result()


@pytest.mark.parametrize("scale", sorted(folder.name for folder in paths.RESULTS.iterdir() if folder.is_dir()))
def test_the_committed_tables_are_what_was_written(scale):
    folder = paths.RESULTS / scale
    if scale == "smoke":
        pytest.skip("not committed")
    remedy = f"`beyond-outliers claims --scale {scale}` takes them as they are"
    check(folder, *[file.name for file in folder.glob("*.csv")], remedy=remedy)
    assert read_sums(folder) is not None, remedy
