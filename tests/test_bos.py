"""Sequences begin as the model's tokenizer begins them: BOS once where it adds one, in every split, in post-training and in evaluation."""
import dataclasses
import json
import math
import random

import pytest
import torch
from helpers import BOS, EOS, TEMPLATES, WORDS, short_config, small_model, word_tokenizer

from evoprune_nb.data import SPLITS, TokenPool, begin_tokens, documents, load_pools, split_of
from evoprune_nb.database import LevelDatabase, build_database
from evoprune_nb.judge.evaluation import evaluate, evaluation_report, write_task, zero_shot
from evoprune_nb.search import Search
from evoprune_nb.ship import export
from evoprune_nb.ship.export import load_winner
from evoprune_nb.ship.posttraining import PostTraining, TokenStream
from evoprune_nb.ui.cli import main

SEQ = 16


@pytest.fixture(params=TEMPLATES)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    "300 documents of random words, of all lengths."
    path, rng = tmp_path_factory.mktemp("text") / "words.jsonl", random.Random(0)
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))}) + "\n" for _ in range(300)))
    return path


def packed(source, split: str, first: int | None, seq_len: int = SEQ) -> list[list[int]]:
    "The documents of a split, each with EOS behind it, in one row, cut into blocks that begin with `first`."
    stream = [token for text in documents(source) if split_of(text) == split for token in [*(int(word[1:]) for word in text.split()), EOS]]
    head = [] if first is None else [first]
    size = seq_len - len(head)
    return [head + stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]


def first_token(kind: str) -> int | None:
    return BOS if "bos" in kind else None


def test_what_a_tokenizer_begins_with(kind, tokenizer):
    "It is read from what the tokenizer does, whatever tokens it has; the tiny model's adds none."
    assert begin_tokens(word_tokenizer(kind)) == ((BOS,) if "bos" in kind else ())
    assert begin_tokens(tokenizer) == ()


def test_all_splits_begin_alike(kind, text):
    "Blocks of all four splits are the packed text, behind BOS where the tokenizer adds it, and never with a second one."
    pools = load_pools(text, word_tokenizer(kind), SEQ)
    for split in SPLITS:
        assert pools[split].blocks.tolist() == packed(text, split, first_token(kind))
        assert ((pools[split].blocks == BOS).sum(1) == ("bos" in kind)).all()
        assert pools[split].begin == ((BOS,) if "bos" in kind else ())
    asked = load_pools(text, word_tokenizer(kind), SEQ, tokens={"tuning": 5 * SEQ - 1})["tuning"]
    assert torch.equal(asked.blocks, pools["tuning"].blocks[:5])


def test_without_bos_nothing_changes(text):
    "For a tokenizer that adds none, blocks, draws and fingerprints are those of version 0.1."
    pool = load_pools(text, word_tokenizer("none"), SEQ)["tuning"]
    blocks = torch.tensor(packed(text, "tuning", None), dtype=torch.int32)
    assert torch.equal(pool.blocks, blocks) and pool.fingerprint() == TokenPool("tuning", blocks).fingerprint() == "d5dc97c7f2c8538e"


def test_cut_blocks_begin_alike(text):
    "Shorter blocks begin with BOS too, and hold at least one token of text."
    pool = load_pools(text, word_tokenizer("bos"), SEQ)["scoring"]
    short = pool.cut(3)
    assert (short.blocks[:, 0] == BOS).all() and short.begin == (BOS,) and torch.equal(short.blocks, pool.blocks[:, :3])
    assert pool.fingerprint() != dataclasses.replace(pool, begin=()).fingerprint()
    with pytest.raises(ValueError, match="have no room for text"):
        load_pools(text, word_tokenizer("bos"), seq_len=1)


@pytest.mark.parametrize("done", [0, 1, 7, 20])
def test_post_training_packs_alike(kind, text, done):
    "The stream of post-training has the blocks of the tuning split, and continues after any of them."
    blocks = packed(text, "tuning", first_token(kind))[:30]
    make = lambda: TokenStream(str(text), word_tokenizer(kind), PostTraining(n_tokens=1, seq_len=SEQ, shuffle_blocks=1), len(blocks))
    first, second = make(), make()
    assert [row["input_ids"].tolist() for row in first] == blocks
    second.continue_from(first.state_after(done))
    assert [row["input_ids"].tolist() for row in second] == blocks[done:]


@pytest.fixture
def bos_search(text, tmp_path):
    "Model, pools and level database of a model whose tokenizer adds BOS."
    model, pools = small_model("llama-gqa"), load_pools(text, word_tokenizer("bos"), SEQ)
    return model, pools, build_database(model, pools["calibration"].blocks.long(), tmp_path / "database", progress=False)


def forget_begin(directory) -> None:
    "Make the manifest that version 0.1 wrote."
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["begin"], manifest["checksum"]
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_old_databases_of_such_models_are_refused(bos_search, tmp_path):
    "A database calibrated without BOS is neither searched in nor continued for a tokenizer that adds it, and the error says why."
    model, pools, database = bos_search
    Search(tmp_path / "run", model, database, pools, short_config())
    forget_begin(database.directory)
    with pytest.raises(ValueError, match=r"calibrated on text without the token \(id 1, BOS\).*build a new database"):
        Search(tmp_path / "old", model, LevelDatabase(database.directory, model), pools, short_config())
    assert not (tmp_path / "old").exists()
    with pytest.raises(ValueError, match="text that begins otherwise.*None, here: 1"):
        build_database(model, pools["calibration"].blocks.long(), database.directory, progress=False)


def test_winners_of_such_databases_are_refused(bos_search, tmp_path, monkeypatch):
    "The winner of an old run is not exported as if it fitted the model's use."
    model, pools, database = bos_search
    Search(tmp_path / "run", model, database, pools, short_config(generations=1)).run(progress=False)
    monkeypatch.setattr(export, "load_model", lambda *_: (model, word_tokenizer("bos")))
    load_winner(tmp_path / "run", "mine", database=database.directory)
    forget_begin(database.directory)
    with pytest.raises(ValueError, match="calibrated on text without"):
        load_winner(tmp_path / "run", "mine", database=database.directory)


def test_old_databases_of_other_models_still_open(text, tmp_path):
    "Where the tokenizer adds no BOS, a database of version 0.1 opens, is continued, and is searched in."
    model, pools = small_model("llama-gqa"), load_pools(text, word_tokenizer("none"), SEQ)
    blocks = pools["calibration"].blocks.long()
    build_database(model, blocks, tmp_path / "database", progress=False)
    forget_begin(tmp_path / "database")
    again = build_database(model, blocks, tmp_path / "database", progress=False)
    Search(tmp_path / "run", model, again, pools, short_config())


def one_document(tmp_path, n_words: int = 40):
    "A file of one document of the held-out split."
    rng = random.Random(0)
    texts = (" ".join(rng.choices(WORDS, k=n_words)) for _ in range(1000))
    document = next(text for text in texts if split_of(text) == "heldout")
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": document}) + "\n")
    return tmp_path / "one.jsonl", document


@pytest.mark.parametrize("kind", ["bos", "bos and eos"])
def test_held_out_loss_is_that_of_the_harness(kind, tmp_path):
    "On a document that fits into one window, the loss is lm-evaluation-harness's rolling log-likelihood: BOS is read once, and not predicted."
    source, document = one_document(tmp_path)
    (tmp_path / "rolling.yaml").write_text(f"""task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {source}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
""")
    model, tokenizer = small_model("llama-gqa"), word_tokenizer(kind)
    n_words = len(document.split())
    pool = load_pools(source, tokenizer, n_words + 1, tokens={"heldout": n_words + 1})["heldout"]
    found = evaluate(model, pool, tokenizer)
    theirs = zero_shot(model, tokenizer, [tmp_path / "rolling.yaml"])["rolling"].metrics["bits_per_byte"]
    assert found.n_tokens == n_words and found.begin == (BOS,)
    assert theirs * len(document.encode()) * math.log(2) == pytest.approx(found.nats * n_words, rel=1e-5)


def test_questions_begin_as_the_tokenizer_begins(kind, tmp_path):
    "Choices are scored behind BOS where the tokenizer adds it, and with no EOS between question and choice."
    rng = random.Random(1)
    rows = [{"query": " ".join(rng.choices(WORDS, k=9)), "choices": [rng.choice(WORDS), rng.choice(WORDS)], "gold": i % 2} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = small_model("llama-gqa"), word_tokenizer(kind)
    found = zero_shot(model, tokenizer, [write_task(tmp_path / "rows.jsonl", tmp_path)])["rows"].metrics["acc"]
    hits = 0
    for row in rows:
        query = torch.tensor([[*([BOS] if "bos" in kind else []), *(int(word[1:]) for word in row["query"].split())]])
        with torch.no_grad():
            logits = model(query).logits[0, -1]
        scores = [logits[int(word[1:])].item() for word in row["choices"]]
        hits += scores.index(max(scores)) == row["gold"]
    assert found == hits / len(rows)


def test_reports_say_whether_bos_was_there(kind, text):
    "The report of an evaluation, and its table, say what blocks begin with."
    model, tokenizer = small_model("llama-gqa"), word_tokenizer(kind)
    pool = load_pools(text, tokenizer, SEQ, tokens={"heldout": 10 * SEQ})["heldout"]
    report = evaluation_report(model, "small", heldout=evaluate(model, pool, tokenizer))
    assert report.to_dict()["heldout"]["begin"] == ((BOS,) if "bos" in kind else ())
    assert {"measure": "held-out tokens", "value": f"150 ({'behind BOS' if 'bos' in kind else 'no BOS: the tokenizer adds none'})"} in report.rows()


def test_the_command_evaluates_behind_bos(text, tmp_path, capsys):
    "`evoprune eval` builds blocks as the tokenizer begins them, and its report says so."
    model, tokenizer = small_model("llama-gqa"), word_tokenizer("bos")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    assert main(["eval", str(tmp_path / "model"), "--text", str(text), "--seq-len", str(SEQ), "--tokens", "160", "--device", "cpu"]) == 0
    row = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    pool = load_pools(text, tokenizer, SEQ, {"heldout": 160})["heldout"]
    assert row["heldout"]["nats"] == pytest.approx(evaluate(model, pool, tokenizer).nats) and row["heldout"]["begin"] == row["conditions"]["begin"] == [BOS]
    assert "150 of " + text.name + " (behind BOS)" in capsys.readouterr().out
