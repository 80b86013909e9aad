"""The command as a user gives it: from nothing to tables, stopped and taken up again, with rows that count as done."""

import functools
import shutil
import signal
import time

import pytest

from checkouts import Checkout, same_tables, tables, tiny_study

pytestmark = pytest.mark.slow
PLAN = {"full_precision": [0, 1], "branches": [0], "qat": [0]}


def ends(process, code=0):
    """What a command printed, once it has ended as it should."""
    said = process.communicate(timeout=560)[0]
    assert process.returncode == code, said
    return said


@pytest.fixture(scope="module")
def checkout(text_file, tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("study"), tiny_study(text_file, **PLAN))


@pytest.fixture(scope="module")
def undisturbed(checkout):
    said = ends(checkout.start("continue", "--jobs", "2"))
    return said, tables(checkout.results)


def test_a_scale_with_grids_goes_on_past_its_sweep_without_any_tables(undisturbed):
    said, found = undisturbed
    assert "own: 5 of 5 runs done" in said and "\n5 runs finished; all tables are in " in said
    runs = found["runs.csv"]
    assert sorted(runs.purpose) == ["branches", "full_precision", "qat", "sweep", "sweep+full_precision"]
    decayed = found["branches.csv"]
    assert set(decayed.run) == set(runs.run[runs.purpose.str.contains("branches|sweep.full")])
    assert decayed.notna().all().all()
    common = found["ptq.csv"].query("checkpoint == 'common'").run
    assert set(common) == set(runs.run[runs.purpose.str.contains("full")]) == set(found["common_loss.csv"].run)


def test_a_second_call_does_nothing_and_a_deleted_run_is_made_again(checkout, undisturbed):
    folder = checkout.results.parent
    assert "own: 5 of 5 runs done" in ends(checkout.start("reproduce", "--target", "tables", "--jobs", "1"))
    assert "Nothing to be done" in (folder / "reproduce.log").read_text()
    run = undisturbed[1]["runs.csv"].query("purpose == 'qat'").run.item()
    shutil.rmtree(folder / run)
    ends(checkout.start("reproduce", "--target", "tables", "--jobs", "1"))
    log = (folder / "reproduce.log").read_text()
    assert log.count("\nlocalrule train:") == 1 and "localrule choose" not in log
    assert same_tables(tables(checkout.results), undisturbed[1])


def test_rows_count_as_done_where_no_folder_is(checkout, undisturbed, tmp_path):
    """On another machine, which has the tables alone, all but one run's rows."""
    other = Checkout(tmp_path, (checkout.root / "data" / "scales" / "own.toml").read_text())
    shutil.copytree(checkout.results, other.results)
    lost = undisturbed[1]["runs.csv"].query("purpose == 'qat'").run.item()
    for file in other.results.glob("*.csv"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if not line.startswith(f"{lost},")))
    (other.results / "SHA256SUMS").unlink()
    assert "\n1 runs finished" in ends(other.start("continue", "--jobs", "1"))
    assert {file.parent.name for file in other.results.parent.glob("*/result.json")} == {lost}
    assert same_tables(tables(other.results), undisturbed[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_what_was_stopped_goes_on_to_the_same_tables(undisturbed, text_file, tmp_path, number, code):
    other = Checkout(tmp_path, tiny_study(text_file, **PLAN))
    default = functools.partial(signal.signal, number, signal.SIG_DFL)  # a shell's background jobs ignore SIGINT
    process = other.start("reproduce", "--target", "tables", "--jobs", "1", prepare=default)
    until = time.monotonic() + 500
    while not list(other.results.parent.glob("*/config.json")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    assert "To go on: make reproduce SCALE=own" in ends(process, code)
    ends(other.start("reproduce", "--target", "tables", "--jobs", "2"))
    assert same_tables(tables(other.results), undisturbed[1])


def test_a_run_that_fails_is_named_with_its_reason(checkout, undisturbed, tmp_path):
    other = Checkout(tmp_path, (checkout.root / "data" / "scales" / "own.toml").read_text())
    loop = other.root / "lib" / "beyond_outliers" / "train" / "loop.py"
    loop.write_text(loop.read_text() + "\n\ndef train(*_, **__):\n    raise ArithmeticError('no luck')\n")
    said = ends(other.start("reproduce", "--target", "tables", "--jobs", "2"), 1)
    assert "failed: train tiny-adamw-lr0.001-s0 light\nreason: ArithmeticError: no luck\n" in said
    assert said.count("no luck") == 2 and "next:   make reproduce SCALE=own goes on from what is done" in said
