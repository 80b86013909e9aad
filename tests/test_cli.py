"""The one command: what it refuses, in one line and soon; its help; what it reads of the machine."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from beyond_outliers import cli, paths
from beyond_outliers.cli import main
from beyond_outliers.study.workflow import processors

REFUSED = {
    "tarin --scale pocket": "did you mean train?",
    "plan --scale pockett": "did you mean pocket?",
    "reproduce --scale pocke": "did you mean pocket?",
    "figures --scale ../pocket": "",
    "verify --scale pockett": "did you mean pocket?",
    "plan --sclae pocket": "did you mean --scale?",
    "reproduce --scale smoke --jobs 0": "must be a whole number in [1, ",
    "reproduce --scale smoke --executor cloud": "'slurm'",
    "continue --scale smoke --jobs -2": "must be a whole number in [1, ",
    "continue --scale smoke --hours 0": "must be a finite number above 0",
    "continue --scale smoke --hours -1": "must be a finite number above 0",
    "continue --scale smoke --hours nan": "not nan",
    "continue --scale smoke --shard 3/2": "(a part of a plan), not ",
    "continue --scale smoke --shard half": "(a part of a plan), not ",
    "notebook --scale pocket --name 03": "did you mean 03_ptq?",
    "run --scale smoke --run tiny-adamw": "did you mean tiny-adamw-",
    "train --scale smoke --size tini --optimizer muon": "did you mean tiny?",
    "train --scale smoke --size tiny --optimizer mun": "did you mean muon?",
    "train --scale smoke --size tiny --optimizer muon --scheme questt": "did you mean quest?",
    "train --scale smoke --size tiny --optimizer muon --lr 0": "must be a finite number above 0",
    "train --scale smoke --size tiny --optimizer muon --device gpu": "'cuda'",
    "claims C99 --scale pocket": "valid: ",
    "probe model --text nowhere.txt": "no file 'nowhere.txt'",
    "compare --scale pocket --optimizer torch.optim:SGD --hyper momentum=": "is not TOML",
}


ALL_OF_THEM = """
import contextlib, io, json, sys
sys.modules["torch"] = None  # whoever imports it now fails
from beyond_outliers.cli import main
from beyond_outliers.study.workflow import processors
found = {}
for words in json.loads(sys.argv[1]):
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main(words.split())
        except SystemExit as stopped:
            code = stopped.code
        except Exception as error:
            said.write(repr(error))
    found[words] = code, said.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refusals():
    """Words -> (exit code, what was said), in one process of their own without torch."""
    command = [sys.executable, "-c", ALL_OF_THEM, json.dumps(list(REFUSED))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_torch_is_imported(words, refusals):
    code, said = refusals[words]
    assert code == 2 and said.count("\n") == 1 and REFUSED[words] in said, said


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_explains_itself_with_an_example_that_can_be_said(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    said = capsys.readouterr().out
    function = cli.COMMANDS[name]
    example = function.__doc__.strip().splitlines()[-1].strip()
    assert stopped.value.code == 0 and example.split()[1] in said and function.__doc__.split("\n")[0][:40] in said
    given = cli.parsed(example.split()[1:])
    assert given.command == name


def test_the_documents_name_subcommands_and_options_that_there_are():
    files = [paths.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "Snakefile", "data/README.md")]
    files += [
        *paths.NOTEBOOKS.glob("*.ipynb"),
        *(paths.ROOT / "lib").rglob("*.py"),
        *(paths.ROOT / "docs").glob("*.md"),
    ]
    text = "\n".join(file.read_text() for file in files)
    said = re.findall(
        r"(?:^|bin/|[`\"])beyond-outliers ([a-z]+)|-m beyond_outliers(?: --traceback)? ([a-z]+)", text, re.M
    )
    said = [name for pair in said for name in pair if name]
    assert len(said) > 20 and set(said) <= set(cli.COMMANDS), set(said) - set(cli.COMMANDS)


def test_an_interrupt_is_one_line_and_its_own_exit_code(monkeypatch, capsys):
    def interrupted(*, scale: str):
        """Waits.

        beyond-outliers plan --scale pocket
        """
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setitem(cli.COMMANDS, "plan", interrupted)
        with pytest.raises(SystemExit) as stopped:
            main(["plan", "--scale", "pocket"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_a_damaged_file_has_an_exit_code_of_its_own(monkeypatch, capsys):
    def damaged(*, scale: str):
        """Reads.

        beyond-outliers plan --scale pocket
        """
        raise cli.DamagedFile("weights/000010.safetensors is damaged")

    monkeypatch.setitem(cli.COMMANDS, "plan", damaged)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--scale", "pocket"])
    assert stopped.value.code == cli.DAMAGED == 65 and "weights/000010" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_as_many_jobs_as_processors_are_allowed(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert processors() == len(allowed)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert processors() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    assert processors() == len(allowed)


def said_by_make(*words):
    """What make would do; as root or not."""
    command = ["make", "--dry-run", "--old-file=.venv/.ready", *words]
    shell = {name: value for name, value in os.environ.items() if "MAKE" not in name}  # of the make that runs the tests
    return subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, env=shell)


@pytest.mark.parametrize("word", ["SCAEL=smoke", "scale=smoke", "HOUR=2"])
def test_a_misspelt_variable_of_make_is_refused_with_the_valid_ones(word):
    done = said_by_make("reproduce", word)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"unknown variable {word.partition('=')[0]}; valid: SCALE " in done.stderr


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["publish", "PARTIAL=0"], "publish --scale pocket"),
        (["publish", "PARTIAL=1"], "publish --scale pocket --partial"),
        (["continue", "HOURS=0"], "continue --scale pocket --hours 0"),  # which the command refuses
        (["reproduce", "CORES=0"], "reproduce --scale pocket --jobs 0"),
        (["reproduce"], "reproduce --scale pocket"),
        (["lab", "OPTIONS=--x"], "--allow-root --x" if os.getuid() == 0 else "config.py --x"),
        (["reproduce", "GPUS=8", "OPTIONS=--quiet all"], 'reproduce --scale pocket --gpus 8 --options="--quiet all"'),
    ],
)
def test_make_hands_over_what_it_is_told(words, wanted):
    done = said_by_make(*words)
    assert done.returncode == 0, done.stderr
    assert f"{wanted} " in re.sub(r"[\s\\]+", " ", f"{done.stdout} ")
