"""The steps of a study under faults: what they write comes out as undisturbed, or damage is named."""

import random
import re
import shutil
import warnings

import pandas as pd
import pytest

import faults
from beyond_outliers import checksums, paths
from beyond_outliers.checksums import DamagedFile
from beyond_outliers.config import EdgeWarning
from beyond_outliers.corpus import tokens
from beyond_outliers.study import Study, measure, verify
from beyond_outliers.train import machine
from checkouts import made, tiny_study

pytestmark = pytest.mark.filterwarnings("ignore::beyond_outliers.config.rates.EdgeWarning")


@pytest.fixture(scope="module")
def scale_file(text_file):
    return tiny_study(text_file, full_precision=[0])


def at(root, patch, scale_file):
    """Everything of a study below one folder."""
    (root / "scales").mkdir(parents=True, exist_ok=True)
    (root / "scales" / "own.toml").write_text(scale_file)
    for name in ("SCALES", "CACHE", "RESULTS", "RUNS"):
        patch.setattr(paths, name, root / name.lower())
    return Study("own")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scale_file):
    """A study that was never disturbed; what is measured is made up, and as written by `measure_run`."""
    root = tmp_path_factory.mktemp("whole")

    def made_up(model, config, level, settings):
        return {name: pd.DataFrame({"value": [config.lr, config.seed]}) for name in ("ptq", "zero_shot")}

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", EdgeWarning)
        patch.setattr(measure, "measure_model", made_up)
        patch.setattr(machine, "git_commit", lambda: "test")
        study = at(root, patch, scale_file)
        made(study)
        yield root


def tables(root, kind="*.csv"):
    files = [f for f in sorted(root.rglob(kind)) if f.is_file() and "scales" not in f.parts and f.suffix != ".lock"]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


OWN = "runs/own/results"  # the study's own tables
STEPS = {
    "measuring": (
        lambda study: [*(study.run(p, progress=False) for p in study.planned()), study.measure_common("tiny")],
        "runs/own/*/measure-*",
    ),
    "choosing": (lambda study: study.choose_learning_rates("tiny"), f"{OWN}/learning_rates.csv"),
    "choosing again": (lambda study: study.choose_learning_rates("tiny"), None),
    "collecting": (lambda study: study.collect(), OWN),
    "collecting again": (lambda study: study.collect(), None),
    "tokenizing": (lambda study: tokens.open_corpus(study.protocol.corpus), "cache"),
}


def sweep(step, kind, every, whole, tmp_path, scale_file):
    work, removed = STEPS[step]
    undisturbed, number, code = tables(whole, "*.*"), 1 + every // 2, 1
    kept = {name: raw for name, raw in undisturbed.items() if name.endswith((".csv", ".bin", "meta.json"))}
    while code != 0:
        root = tmp_path / f"{number}"
        shutil.copytree(whole, root)
        for place in root.glob(removed) if removed else ():
            shutil.rmtree(place) if place.is_dir() else checksums.write_files(place.parent, {}, remove=[place.name])
        if removed == OWN:  # rates are not collected
            (root / removed).mkdir()
            shutil.copy(whole / removed / "learning_rates.csv", root / removed)
        with pytest.MonkeyPatch.context() as patch:
            study = at(root, patch, scale_file)
            tokens._open.cache_clear()
            code = faults.in_child(lambda study=study: work(study), faults.at_change(kind, number, root))
            assert code in (0, 1, faults.DIED, faults.PASSED_BY)
            try:
                work(at(root, patch, scale_file))
            except DamagedFile as damage:
                assert "tears" in kind and " is damaged" in str(damage) and "as they are" in str(damage)
            else:
                found = tables(root, "*.*")
                assert {name: found.get(name) for name in kept} == kept
                if removed != "cache":
                    assert not verify.damages(root)
        shutil.rmtree(root)
        number += every
    assert number > 4


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_step_survives_a_fault_at_changes_of_the_disk(step, kind, every, whole, tmp_path, scale_file):
    sweep(step, kind, every, whole, tmp_path, scale_file)


@pytest.mark.parametrize("tries", [6, pytest.param(40, marks=pytest.mark.exhaustive)])
def test_a_flipped_bit_in_a_table_is_never_silent(whole, tmp_path, scale_file, tries):
    rng = random.Random(tries)
    for number in range(tries):
        root = tmp_path / f"{number}"
        shutil.copytree(whole / "runs", root / "runs")
        hit = rng.choice(sorted((root / OWN).iterdir()))
        faults.flip_a_bit(hit, rng)
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(DamagedFile, match="collect --scale own"),
        ):
            study = at(root, patch, scale_file)
            for file in sorted(study.results.glob("*.csv")):
                study.table(file.stem)


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.csv", "ptq.csv", "SHA256SUMS"])
def test_what_has_ended_and_is_damaged_is_named_and_made_again_as_it_is_told(whole, tmp_path, scale_file, name):
    """Of a run or a measurement: collecting goes on with the other runs, and names this one.

    Whoever deletes what the message names gets the same tables by the same steps.
    """
    undisturbed, rng = tables(whole / OWN), random.Random(name)
    for number, hit in enumerate(sorted((whole / "runs").glob(f"*/*/**/{name}"))):
        root = tmp_path / f"{number}"
        hit = root / hit.relative_to(whole)
        if hit.parent == root / OWN:
            continue
        shutil.copytree(whole, root)
        faults.flip_a_bit(hit, rng)
        for file in (root / OWN).iterdir():
            if file.name != "learning_rates.csv":
                file.unlink()
        with pytest.MonkeyPatch.context() as patch:
            study = at(root, patch, scale_file)
            with pytest.raises(
                DamagedFile, match=f"{re.escape(str(hit))} is damaged.*(delete the folder|delete it)"
            ) as said:
                study.collect()
            run = hit.relative_to(root / "runs" / "own").parts[0]
            assert set(study.table("runs").run) == {p.config.name for p in study.planned()} - {run}
            (folder,) = re.findall(r"delete the folder (/\S+)", str(said.value)) or [hit.parent]
            shutil.rmtree(folder)
            for planned in study.planned():
                study.run(planned, progress=False)
            study.measure_common("tiny")
            study.collect()
            found = tables(root / OWN)
            assert found.keys() == undisturbed.keys() and len(found["ptq.csv"]) == len(undisturbed["ptq.csv"])


def test_damaged_rates_are_named_and_chosen_again(whole, tmp_path, scale_file):
    shutil.copytree(whole / "runs", tmp_path / "runs")
    rates = tmp_path / OWN / "learning_rates.csv"
    before = rates.read_bytes()
    faults.flip_a_bit(rates, random.Random(0))
    with pytest.MonkeyPatch.context() as patch:
        study = at(tmp_path, patch, scale_file)
        with pytest.raises(DamagedFile, match=f"{re.escape(str(rates))} is damaged.*choose them again"):
            study.planned()
        rates.unlink()
        study.choose_learning_rates("tiny")
    assert rates.read_bytes() == before


def test_verify_names_what_is_damaged_and_trains_runs_again(whole, tmp_path, scale_file, capsys):
    shutil.copytree(whole, tmp_path / "study")
    with pytest.MonkeyPatch.context() as patch:
        study = at(tmp_path / "study", patch, scale_file)
        patch.setattr(paths, "CHECKPOINTS", tmp_path / "none")
        assert verify.verify(study, 2) == 0
        said = capsys.readouterr().out
        assert "every byte is what was written" in said and said.count(" same\n") == 2 and "0.1 at most" in said
        study.table("runs").assign(val_loss=1.0).to_csv(study.results / "runs.csv", index=False)
        assert verify.verify(study, 0) == 1 and "runs.csv is damaged" in capsys.readouterr().out
        checksums.seal(study.results)
        assert verify.verify(study, 2) == 1 and "differs" in capsys.readouterr().out
