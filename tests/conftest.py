"""Shared fixtures: a corpus of made-up prose, and a tiny run configuration, so that most tests need no download."""

import os
import random

# before torch is imported anywhere: single-threaded kernels, so that results and timings do not depend on neighbours
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import tiny
from beyond_outliers import paths

torch.set_num_threads(1)


# files that read the one study at scale smoke, which the first of them makes
SMOKE = {file for file in (paths.ROOT / "tests" / "workflow").glob("test_*.py") if "(study" in file.read_text()}


def pytest_collection_modifyitems(items):
    """The study at scale smoke first, then files with slow tests: side by side, short ones fill the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("exhaustive")}
    items.sort(key=lambda item: (item.path not in SMOKE, item.path not in slow))  # a stable sort: files stay whole
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none here"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Side by side (-n), a file stays in one process, and so do the files of SMOKE; in the order above.

    By hand, because pytest-xdist 3.8 overlooks its groups (xdist_group) under pytest 9.2.
    """
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "smoke" if paths.ROOT / file in SMOKE else file

    config.option.loadscopereorder = False
    return Files(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_runs_of_ones_own(tmp_path_factory):
    """Tests read the committed tables, also where somebody has made a study of their own in this checkout.

    Nothing waits for the disk: what tests cut off is a process, never the machine.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("runs"))
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A .jsonl corpus of 40 groups of random sentences over a small vocabulary."""
    import json

    rng = random.Random(0)
    words = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "", "l")]
    path = tmp_path_factory.mktemp("corpus") / "prose.jsonl"
    with path.open("w") as file:
        for group in range(40):
            topic = rng.sample(words, 30)
            for _ in range(30):
                text = " ".join(rng.choices(topic, k=rng.randint(8, 40))) + "."
                file.write(json.dumps({"text": text, "group": f"g{group}"}) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus_config(text_file):
    return tiny.corpus_config(text_file)


@pytest.fixture
def run_config(corpus_config):
    return tiny.run_config(corpus_config)


@pytest.fixture(scope="session")
def tokenizer():
    """Bytes and nothing else: 256 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    return bpe
