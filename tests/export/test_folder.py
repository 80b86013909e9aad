"""Exported folders: the model that comes back, its cache and padding, its tokenizer, and the LM Evaluation Harness."""

import json
import os
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from beyond_outliers.cli import main
from beyond_outliers.config import LlamaConfig, RunConfig
from beyond_outliers.corpus import open_corpus
from beyond_outliers.evaluate import zero_shot
from beyond_outliers.evaluate.multiple_choice import score
from beyond_outliers.evaluate.tasks import cloze_questions, wheel_questions
from beyond_outliers.export import NotExported, export, folder, load_exported, open_run
from beyond_outliers.model.build import build_model
from beyond_outliers.propagation import decompose
from beyond_outliers.quantizers import QuantSpec, quantize_model
from beyond_outliers.train.folder import model_of

tf = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SPECS = ["none", "W4A4", "W4g32", "W4A4+rot+head", "mxfp4", "Wnf4Auint4+gptq"]


def checkpoint(config: RunConfig, file, seed=0):
    """A run's model with weights large enough that its predictions are far from uniform, in a checkpoint's form."""
    torch.manual_seed(seed)
    model = build_model(config)
    state = {n: 20 * p.detach() if p.ndim == 2 else p.detach() * 1.3 for n, p in model.named_parameters()}
    save_file(state, file, metadata={"config": config.to_json()})
    return file, model_of(config, state, file)


@pytest.fixture(scope="module")
def base(corpus_config):
    from beyond_outliers.config import Olmo2Config

    shape = Olmo2Config(vocab_size=320, width=32, depth=2, n_heads=4, n_kv_heads=2)
    fixed = {"scale": "test", "size": "tiny", "optimizer": "adamw", "lr": 5e-3, "context": 64}
    return RunConfig(model=shape, corpus=corpus_config, **fixed)


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """Spec -> (folder, the model that it must be)."""
    made = {}

    def of(name):
        if name not in made:
            place = tmp_path_factory.mktemp("exported")
            config = (
                base.replace(model=LlamaConfig(vocab_size=320, width=32, depth=2, n_heads=4))
                if name == "llama"
                else base
            )
            file, model = checkpoint(config, place / "run.safetensors")
            spec = None if name in ("none", "llama") else QuantSpec.named(name)
            target = export(file, place / "model", spec)
            if spec is not None:
                inputs = None
                if spec.method == "gptq":
                    inputs = folder.calibration(open_corpus(config.corpus, config.context), config.context, 16_384)
                model = quantize_model(model, spec, inputs)
            made[name] = target, model
        return made[name]

    return of


@pytest.fixture
def ids():
    return torch.randint(320, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*SPECS, "llama"])
@torch.no_grad()
def test_the_logits_come_back_bit_by_bit(exported, ids, name):
    place, model = exported(name)
    loaded = load_exported(place)
    read = []
    with model.head.register_forward_pre_hook(lambda head, inputs: read.append(inputs[0])):
        assert torch.equal(loaded(ids).logits, model(ids))
    # A product with fewer rows may add up in another order, so the head alone is asked for the last position.
    assert torch.equal(loaded(ids, logits_to_keep=1).logits, model.head(read[0][:, -1:]))
    spec = json.loads((place / "config.json").read_text())["quantization"]
    assert spec is None if name in ("none", "llama") else QuantSpec(**spec) == QuantSpec.named(name)
    loss = loaded(ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["none", "W4A4", "llama"])
@torch.no_grad()
def test_a_cache_changes_nothing(exported, ids, name):
    """Token by token, in pieces, in one go; and what greedy search writes with each kind of cache and without."""
    loaded, ids = load_exported(exported(name)[0]), ids + (ids == 0)  # 0 is padding
    whole = loaded(ids).logits
    for sizes in ([1] * 40, [7, 20, 1, 12]):
        for cache in (None, tf.StaticCache(config=loaded.config, max_cache_len=50)):
            pieces = []
            for piece in ids.split(sizes, dim=1):
                out = loaded(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                pieces.append(out.logits)
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    found, mask = ids[:, :10], torch.ones_like(ids[:, :10])
    for _ in range(20):  # greedy search by hand
        found = torch.cat([found, exported(name)[1](found)[:, -1:].argmax(-1)], dim=1)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for kind in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
        assert torch.equal(loaded.generate(ids[:, :10], attention_mask=mask, **kind, **settings), found)


@torch.no_grad()
def test_padding_on_the_left_is_not_seen(exported, ids):
    loaded = load_exported(exported("none")[0])
    short = ids[:1, :15]
    padded = torch.cat([torch.zeros(1, 25, dtype=torch.long), short], dim=1)
    batch, mask = torch.cat([padded, ids[1:2]]), torch.ones(2, 40, dtype=torch.long)
    mask[0, :25] = 0
    found = loaded(batch, attention_mask=mask).logits
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, 25:], loaded(short).logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], loaded(ids[1:2]).logits[0], rtol=1e-4, atol=1e-4)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = loaded.generate(short, attention_mask=torch.ones_like(short), **settings)
    for kind in (None, "static"):
        together = loaded.generate(batch, attention_mask=mask, cache_implementation=kind, **settings)
        assert torch.equal(together[0, 40:], alone[0, 15:])


def test_the_tokenizer_puts_the_boundary_first_and_reads_its_name_as_text(exported, base):
    tokenizer = tf.AutoTokenizer.from_pretrained(exported("none")[0], trust_remote_code=True)
    own = open_corpus(base.corpus).tokenizer
    text = "some text, and <|endoftext|> in it"
    assert tokenizer(text)["input_ids"] == [0, *own.encode(text).ids]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == own.encode(text).ids
    assert tokenizer.decode(own.encode(text).ids) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0 and tokenizer.model_max_length == base.context


def test_the_folder_needs_nothing_of_this_project(exported):
    place, _ = exported("none")
    for file in place.glob("*.py"):
        imports = re.findall(r"^\s*(?:from|import) ([\w.]+)", file.read_text(), re.M)
        assert not [name for name in imports if name.startswith("beyond_outliers")], file.name
        beside = [name[1:] for name in imports if name.startswith(".")]
        assert all((place / f"{name}.py").exists() for name in beside), file.name


def test_what_does_not_give_back_its_model_is_not_called_exported(base, tmp_path, monkeypatch):
    file, _ = checkpoint(base, tmp_path / "run.safetensors")
    wrong = folder._weights
    monkeypatch.setattr(folder, "_weights", lambda *given: {n: 1.001 * t for n, t in wrong(*given).items()})
    with pytest.raises(NotExported, match="logits up to"):
        export(file, tmp_path / "model")


def test_what_cannot_be_exported_is_refused(base, tmp_path, capsys):
    file, _ = checkpoint(base, tmp_path / "run.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    with pytest.raises(ValueError, match="is not empty; valid: a new folder"):
        export(file, tmp_path / "full")
    with pytest.raises(ValueError, match="no run 'nowhere'; valid: a run's folder or name"):
        open_run("nowhere")
    (tmp_path / "begun").mkdir()
    with pytest.raises(ValueError, match="has not ended"):
        open_run(tmp_path / "begun")
    qat = base.replace(quantization={"scheme": "quest", "weights": "int4", "activations": "int4"})
    torch.manual_seed(0)
    save_file(
        {n: p.detach() for n, p in build_model(qat).named_parameters()},
        tmp_path / "qat.safetensors",
        metadata={"config": qat.to_json()},
    )
    with pytest.raises(ValueError, match="trained under quantization"):
        export(tmp_path / "qat.safetensors", tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["export", str(file), "--to", str(tmp_path / "model"), "--spec", "W4A5B"])
    assert "'W4A5B' names no quantization" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


# --------------------------------------------------------------------------------- what models of transformers promise


def trained(place, folder, batch, parts):
    """Loss and length of one step of plain gradient descent by the Trainer, on eight sequences in `parts` parts."""
    model = tf.AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, dtype=torch.float32)
    rows = torch.randint(1, 320, (8, 32), generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in model.parameters()]
    settings = tf.TrainingArguments(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=parts, max_steps=1, optim="sgd",
        learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row.where(row > 20 * i, -100)} for i, row in enumerate(rows)]
    loss = tf.Trainer(model=model, args=settings, train_dataset=data).train().training_loss
    return loss, sum((a - b).square().sum().item() for a, b in zip(before, model.parameters(), strict=True)) ** 0.5


def test_micro_batches_of_unequal_text_give_the_step_of_the_whole_batch(exported, tmp_path):
    place, _ = exported("none")
    assert trained(place, tmp_path, 2, 4) == pytest.approx(trained(place, tmp_path, 8, 1), rel=1e-4)


@pytest.mark.parametrize("name", ["none", "W4A4", "llama"])
@torch.no_grad()
def test_embeddings_states_and_selected_logits(exported, ids, name):
    place, model = exported(name)
    loaded = load_exported(place)
    embeds, logits = loaded.get_input_embeddings()(ids), loaded(ids).logits
    found = loaded(inputs_embeds=embeds, output_hidden_states=True)
    assert torch.equal(found.logits, logits) and len(found.hidden_states) == 3
    assert torch.equal(found.hidden_states[0], embeds) and torch.equal(found.hidden_states[-1], model.hidden(ids))
    assert loaded(ids).hidden_states is None
    loaded.config.output_hidden_states = True
    assert torch.equal(loaded(ids).hidden_states[1], found.hidden_states[1])
    places = torch.tensor([3, 17])
    torch.testing.assert_close(loaded(ids, logits_to_keep=places).logits, logits[:, places])
    as_tuple = loaded(ids, labels=ids, return_dict=False, output_hidden_states=False)
    assert [x.shape for x in as_tuple] == [(), logits.shape]


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(exported, ids):
    loaded = load_exported(exported("none")[0])
    packed = torch.cat([ids[:1, :8], ids[1:2, :12]], dim=1)
    places = torch.cat([torch.arange(8), torch.arange(12)])[None]
    alone = loaded(ids[1:2, :12]).logits
    torch.testing.assert_close(loaded(packed, position_ids=places).logits[:, 8:], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_resized_embeddings_load_again_or_are_refused(exported, ids, tmp_path):
    for name in ("none", "W4A4"):
        model = load_exported(exported(name)[0])
        model.resize_token_embeddings(323)
        model.save_pretrained(tmp_path / name)
        again = load_exported(tmp_path / name)
        assert again.config.vocab_size == again(ids).logits.shape[-1] == 323
        assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="the head is rounded"):
        load_exported(exported("W4A4+rot+head")[0]).resize_token_embeddings(323)


def test_what_the_model_does_not_take_is_refused_in_words(exported, ids):
    loaded = load_exported(exported("none")[0])
    with pytest.raises(ValueError, match="does not take output_attentions, token_type_ids; valid: num_items_in_batch"):
        loaded(ids, output_attentions=True, token_type_ids=ids, return_dict=True)
    for given in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(3, 40, 32)}):
        with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
            loaded(**given)
    tokenizer = tf.AutoTokenizer.from_pretrained(exported("none")[0], trust_remote_code=True)
    assert loaded(**tokenizer("some text", return_tensors="pt")).logits.isfinite().all()


def test_a_rounded_export_is_measured_and_not_rounded_again(exported, ids):
    place, quantized = exported("W4A4+rot+head")
    model, rounded = load_exported(exported("none")[0]), load_exported(place)
    found = decompose(model, rounded, ids).set_index("name")
    expected = decompose(exported("none")[1], quantized, ids).set_index("name").add_prefix("decoder.", axis=0)
    numbers = ["R", "A", "B", "gain", "spectral_ratio", "alignment_ratio"]
    rows = ["decoder.blocks.1.mlp.up", "decoder.blocks.1.mlp.down", "decoder.head"]
    np.testing.assert_allclose(found.loc[rows, numbers], expected.loc[rows, numbers], rtol=1e-4)
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_model(rounded, QuantSpec())


def test_others_may_read_the_files(exported):
    mask = os.umask(0o022)
    os.umask(mask)
    modes = {file.name: file.stat().st_mode & 0o777 for file in exported("none")[0].iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


# --------------------------------------------------------------------------------------- the LM Evaluation Harness


@pytest.fixture(scope="module")
def harness(exported):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")

    def of(name, context):
        place, _ = exported(name)
        tokenizer = tf.AutoTokenizer.from_pretrained(place, trust_remote_code=True)
        return huggingface.HFLM(
            pretrained=load_exported(place),
            tokenizer=tokenizer,
            max_length=context,
            batch_size=16,
            add_bos_token=True,
            device="cpu",
            softmax_dtype="float64",  # in float32 the sum over a long continuation alone is 1e-4 nats off
        )

    return of


def likelihoods(harness, requests):
    from lm_eval.api.instance import Instance

    given = [
        Instance(request_type="loglikelihood", doc={}, arguments=request, idx=i, metadata=(None, i, 1))
        for i, request in enumerate(requests)
    ]
    return np.array([value for value, _ in harness.loglikelihood(given, disable_tqdm=True)])


@pytest.mark.parametrize(
    "task, name",
    [("piqa", "none"), ("hellaswag", "none"), ("arc_easy", "none"), ("cloze", "none"), ("arc_easy", "W4A4")],
)
def test_the_harness_scores_as_we_do(exported, harness, base, text_file, task, name):
    """200 questions a task: log-likelihoods within 1e-4 nats, accuracies exactly."""
    n, context = 200, 2048  # no request is longer: the harness takes no continuation that is
    _, model = exported(name)
    corpus = open_corpus(base.corpus)
    texts = [json.loads(line)["text"] for line in text_file.open()]
    questions = cloze_questions(texts) if task == "cloze" else wheel_questions(task)
    questions = [questions[i * len(questions) // n] for i in range(n)]
    assert len(set(questions)) == n
    requests = [(q.context, " " + choice) for q in questions for choice in q.choices]
    theirs = likelihoods(harness(name, context), requests)
    ours = score(model, corpus.tokenizer, requests, context)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    ends = np.cumsum([len(q.choices) for q in questions])
    hits, hits_by_length = [], []
    for question, end in zip(questions, ends, strict=True):
        of = theirs[end - len(question.choices) : end]
        hits.append(np.argmax(of) == question.gold)
        hits_by_length.append(np.argmax(of / [len(choice) for choice in question.choices]) == question.gold)
    row = zero_shot(model, corpus.tokenizer, (task,), n, texts, context, progress=False).iloc[0]
    assert (row.accuracy, row.accuracy_raw) == (np.mean(hits_by_length), np.mean(hits))


def test_the_harness_cuts_long_contexts_as_we_do(exported, harness, base):
    _, model = exported("none")
    tokenizer = open_corpus(base.corpus).tokenizer
    requests = [(q.context, " " + choice) for q in wheel_questions("hellaswag")[:60] for choice in q.choices]
    requests = [request for request in requests if len(tokenizer.encode(request[1]).ids) < base.context]
    assert sum(len(tokenizer.encode("".join(request)).ids) > base.context for request in requests) > 40
    theirs = likelihoods(harness("none", base.context), requests)
    np.testing.assert_allclose(score(model, tokenizer, requests, base.context), theirs, atol=1e-4, rtol=0)
