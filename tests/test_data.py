"""Text becomes disjoint, repeatable blocks of tokens."""
import copy
import json
import random

import pandas
import pyarrow
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evoprune_nb.data import SPLITS, TokenPool, derive_seed, documents, load_pools, split_of

SEQ = 8


class Numbers:
    "A tokenizer of documents that are lists of numbers."
    eos_token_id, bos_token_id = 0, None

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [int(word) for word in text.split()]}


def write(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


@pytest.fixture
def numbered():
    "200 documents that fill one block each; document n is made of the token n only."
    return [f"{n} " * (SEQ - 1) for n in range(1, 201)]


def documents_in(pool: TokenPool) -> set[int]:
    return {int(token) for token in pool.blocks.flatten()} - {0}


def test_splits_are_disjoint_by_document(numbered, tmp_path):
    "Every document is in exactly one split, all its copies in the same one, and the shares are about those announced."
    pools = load_pools(write(tmp_path / "a.jsonl", numbered * 2), Numbers(), SEQ)
    found = {split: documents_in(pool) for split, pool in pools.items()}
    assert set.union(*found.values()) == set(range(1, 201)) and sum(map(len, found.values())) == 200
    assert all(pools[split].n_tokens == 2 * SEQ * len(found[split]) for split in SPLITS)
    assert all(abs(len(found[split]) / 200 - share) < 0.1 for split, share in SPLITS.items())


def test_splits_do_not_depend_on_order_or_company(numbered, tmp_path):
    "Shuffling the documents, or leaving half of them out, moves no document to another split; another seed does."
    whole = load_pools(write(tmp_path / "a.jsonl", numbered), Numbers(), SEQ)
    shuffled = load_pools(write(tmp_path / "b.jsonl", random.Random(0).sample(numbered, 200)), Numbers(), SEQ)
    half = load_pools(write(tmp_path / "c.jsonl", numbered[::2]), Numbers(), SEQ)
    other = load_pools(tmp_path / "a.jsonl", Numbers(), SEQ, split_seed=1)
    for split in SPLITS:
        assert documents_in(shuffled[split]) == documents_in(whole[split])
        assert documents_in(half[split]) == documents_in(whole[split]) & set(range(1, 201, 2))
        assert documents_in(other[split]) != documents_in(whole[split])


@given(st.text(), st.integers(0, 10))
def test_split_is_a_function_of_text_and_seed(text, seed):
    "Any text has a split, always the same."
    assert split_of(text, seed) in SPLITS and split_of(text, seed) == split_of(text, seed)


def test_pool_is_filled_to_what_was_asked(numbered, tmp_path):
    "A pool with a token budget is the beginning of the full pool, in whole blocks."
    path = write(tmp_path / "a.jsonl", numbered)
    full = load_pools(path, Numbers(), SEQ)["tuning"]
    part = load_pools(path, Numbers(), SEQ, tokens={"tuning": 5 * SEQ - 1})
    assert set(part) == {"tuning"} and torch.equal(part["tuning"].blocks, full.blocks[:5])


@pytest.mark.parametrize("options, message", [
    (dict(tokens={"tuning": 100_000}), r"asked for 100,000 tuning tokens, but .*a.jsonl has {n:,} in that split"),
    (dict(seq_len=5_000), r"the calibration split of .* has \d+ tokens, too few for one block of 5000"),
    (dict(tokens={"test": 8}), "unknown splits .*calibration, tuning, scoring, heldout")])
def test_too_little_text_says_how_much_there_is(numbered, tmp_path, options, message):
    "A split that is too small, or does not exist, is an error with the numbers or names needed to do better."
    path = write(tmp_path / "a.jsonl", numbered)
    n = load_pools(path, Numbers(), SEQ)["tuning"].n_tokens
    with pytest.raises(ValueError, match=message.format(n=n)):
        load_pools(path, Numbers(), **dict(seq_len=SEQ) | options)


def pool_of(n_blocks: int) -> TokenPool:
    return TokenPool("tuning", torch.arange(n_blocks * 4, dtype=torch.int32).view(n_blocks, 4))


@given(st.integers(1, 12), st.integers(0, 2**62), st.data())
def test_draws_repeat_nothing_within_an_epoch(n_blocks, seed, data):
    "A draw of k blocks has each block at most once per pass over the pool, is of the length asked for, and is repeatable."
    epochs = data.draw(st.integers(1, 3))
    n = data.draw(st.integers(1, n_blocks * epochs))
    draw = pool_of(n_blocks).draw(4 * n + data.draw(st.integers(0, 3)) if n < n_blocks * epochs else 4 * n, seed, epochs)
    firsts = draw[:, 0].tolist()
    assert draw.shape == (n, 4) and draw.dtype == torch.int64 and torch.equal(draw, draw[:, :1] + torch.arange(4))
    assert all(len(set(part)) == len(part) for part in (firsts[i : i + n_blocks] for i in range(0, n, n_blocks)))
    assert torch.equal(draw, pool_of(n_blocks).draw(4 * n, seed, epochs))


def test_seeds_matter_and_the_global_generator_does_not():
    "Another seed is another draw; reseeding torch is not, and a draw leaves torch's generator where it was."
    first, state = pool_of(50).draw(80, 1), torch.get_rng_state()
    assert not torch.equal(first, pool_of(50).draw(80, 2))
    torch.manual_seed(99)
    assert torch.equal(first, pool_of(50).draw(80, 1))
    torch.set_rng_state(state)
    pool_of(50).draw(80, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_repeats_must_be_allowed_by_name():
    "More tokens than there are need epochs=2 or more; the error says how many there are."
    with pytest.raises(ValueError, match=r"asked for 60 tuning tokens, but there are 40 \(blocks of 4\); pass epochs=2"):
        pool_of(10).draw(60, 0)
    assert len(pool_of(10).draw(60, 0, epochs=2)) == 15
    with pytest.raises(ValueError, match="80 in 2 epochs"):
        pool_of(10).draw(84, 0, epochs=2)
    with pytest.raises(ValueError, match="3 tuning tokens do not fill one block of 4"):
        pool_of(10).draw(3, 0)


def test_cut_takes_the_beginning_of_every_block():
    "Shorter blocks are drawn in the same order; longer ones, and such that predict nothing, are refused."
    pool = TokenPool("scoring", torch.arange(40, dtype=torch.int32).view(10, 4))
    assert torch.equal(pool.cut(2).draw(10, 3), pool.draw(20, 3)[:, :2])
    for n in (1, 5):
        with pytest.raises(ValueError, match=f"not to {n}"):
            pool.cut(n)


def test_fingerprint_names_the_blocks():
    "Other blocks, or the same in another split, have another fingerprint."
    pools = [pool_of(10), pool_of(11), TokenPool("scoring", pool_of(10).blocks), TokenPool("tuning", pool_of(10).blocks.flip(0))]
    assert len({pool.fingerprint() for pool in pools}) == 4 and pool_of(10).fingerprint() == pools[0].fingerprint()


TEXTS = ["first line\nsecond line", "Zürich, 東京", "third"]


def make_source(path, texts):
    if path.suffix == ".txt":
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pandas.DataFrame({"text": texts, "other": range(len(texts))}).to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
def test_local_files_give_their_documents(tmp_path, ending):
    "Text, JSON-lines and parquet files give the same documents in order; empty ones are left out."
    source = make_source(tmp_path / f"a{ending}", TEXTS if ending == ".txt" else [TEXTS[0], "", *TEXTS[1:], " \n"])
    assert [text.strip() for text in documents(source)] == TEXTS
    assert list(documents(str(source))) == list(documents(source))


@pytest.mark.parametrize("name, content, message", [
    ("missing.jsonl", None, "no such file"),
    ("missing.dat", None, "neither embedded .wikipedia-sample., nor a local file, nor a dataset"),
    ("table.csv", "text\nx\n", r"cannot read \.csv; known formats are \.txt, \.jsonl, \.json, \.parquet"),
    ("noending", "x", "file without ending"),
    ("column.jsonl", '{"body": "x", "title": "y"}\n', "no column 'text'; it has body, title"),
    ("number.jsonl", '{"text": 5}\n', "text"),
    ("empty.txt", "", "0 tokens"),
    ("empty.jsonl", "", "empty"),
    ("broken.jsonl", "no json\n", "broken.jsonl"),
    ("broken.parquet", "no parquet", "broken.parquet"),
])
def test_unusable_sources_are_named(tmp_path, name, content, message):
    "A source that is missing, unreadable or without the column is a ValueError that names it and what is wrong."
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_pools(tmp_path / name, Numbers(), SEQ)
    assert name in str(error.value)


def test_unreachable_dataset_is_named():
    "A hub id that cannot be reached is an error that lists what a source can be."
    with pytest.raises(ValueError, match="'no-such/dataset' is neither embedded"):
        list(documents("no-such/dataset"))


def test_column_can_be_chosen(tmp_path):
    "The text may be in a column of another name."
    assert list(documents(write(tmp_path / "a.jsonl", ["x", "y"], "body"), column="body")) == ["x", "y"]


def test_documents_are_joined_by_end_of_text(tiny, tokenizer, tmp_path):
    "With a real tokenizer, a pool is the tokens of its documents, each followed by the end-of-text token, and nothing else."
    texts = [text for text in (f"Document number {n} is about pruning." for n in range(40)) if split_of(text) == "tuning"]
    pool = load_pools(write(tmp_path / "a.jsonl", texts), tokenizer, 16, tokens={"tuning": 64})["tuning"]
    stream = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    assert pool.blocks.flatten().tolist() == stream[:64]


def test_derived_seeds_differ_by_every_part():
    "Seeds depend on each part and its place, fit torch, and are the same in every process."
    seeds = {derive_seed(*parts) for parts in [(0,), (1,), (0, 1), (1, 0), (0, "1"), (0, 1, "tuning"), (0, 1, "scoring"), ("01",), (0, "01")]}
    assert len(seeds) == 9 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 3, 1, "tuning") == 2585629962365991260, "a change here would break the replay of every run made before"


def test_endless_source_ends(monkeypatch):
    """A split that names no number of tokens is filled up to `at_most`, also from a stream without end."""
    import itertools

    from evoprune_nb import data
    from evoprune_nb.models import load_model

    monkeypatch.setattr(data, "documents", lambda *_, **__: (f"document {i} of very many" for i in itertools.count()))
    _, tokenizer = load_model("tiny")
    pools = data.load_pools("endless", tokenizer, seq_len=16, at_most=64)
    assert {pool.n_tokens >= 64 for pool in pools.values()} == {True} and set(pools) == set(data.SPLITS)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n", "\n \n"])
def test_json_lines_end_at_line_feeds_only(tmp_path, separator, end):
    "Unicode's other line ends may stand in a JSON text as they are (control characters escaped), and blank lines are nothing."
    texts = [f"a{separator}b", "c"]
    rows = [json.dumps({"text": text}, ensure_ascii=ord(separator) < 32) for text in texts]
    (tmp_path / "a.jsonl").write_bytes(("\n".join(rows) + end).encode())
    assert list(documents(tmp_path / "a.jsonl")) == texts


def compressed(path, ending: str):
    "The same file, compressed."
    target = path.with_name(path.name + ending)
    with pyarrow.CompressedOutputStream(str(target), {".gz": "gzip", ".zst": "zstd"}[ending]) as file:
        file.write(path.read_bytes())
    return target


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_compressed_text_gives_the_same_documents(tmp_path, ending, compression):
    "What `datasets` decompresses is read like the file itself."
    source = make_source(tmp_path / f"a{ending}", TEXTS)
    assert list(documents(compressed(source, compression))) == list(documents(source))


def test_a_directory_is_the_documents_of_its_files(tmp_path):
    "Files are read in the order of their names, whatever their formats; other files are left out."
    (tmp_path / "text" / "sub").mkdir(parents=True)
    expected = []
    for name, text in (("a.jsonl", "one"), ("b.txt", "two"), ("sub/c.parquet", "three"), ("sub/d.txt", "four")):
        expected.append(text)
        make_source(tmp_path / "text" / name, [text])
    compressed(make_source(tmp_path / "e.jsonl", ["five"]), ".gz").rename(tmp_path / "text" / "z.jsonl.gz")
    (tmp_path / "text" / "README.md").write_text("no text")
    (tmp_path / "text" / "empty.txt").touch()
    assert [text.strip() for text in documents(tmp_path / "text")] == [*expected, "five"]
    (tmp_path / "text" / "broken.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="broken.jsonl' cannot be read"):
        list(documents(tmp_path / "text"))
    with pytest.raises(ValueError, match="the directory has no text; known formats are .txt, .jsonl"):
        (tmp_path / "nothing").mkdir()
        list(documents(tmp_path / "nothing"))


@pytest.mark.parametrize("tokens", [None, {"tuning": 80, "scoring": 80}])
def test_one_document_is_in_one_split(tmp_path, tokens):
    "A file that is one document lacks three splits; the error says so, and how documents are told apart."
    (tmp_path / "book.txt").write_text("\n".join("1 2 3" for _ in range(200)))
    with pytest.raises(ValueError, match="it has one document, and that is in one split only .in a .txt file, blank lines separate documents"):
        load_pools(tmp_path / "book.txt", Numbers(), SEQ, tokens)


def test_hidden_files_of_a_directory_are_left_out(tmp_path):
    "Editors and file managers leave hidden copies; a directory that is hidden itself is read all the same."
    folder = tmp_path / ".cache" / "text"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt"):
        (folder / name).write_text(f"text of {name}")
    assert list(documents(folder)) == ["text of a.txt"]


@pytest.mark.parametrize("n", [0, -5])
def test_no_tokens_cannot_be_asked_for(tokenizer, tmp_path, n):
    "A number below 1 is refused before the text is read."
    with pytest.raises(ValueError, match=rf"tokens of heldout \(None for all there are\) must be a whole number of at least 1; got {n}"):
        load_pools(tmp_path / "missing.txt", tokenizer, 16, {"heldout": n})


TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}{{ eos_token }}\n"
CONVERSATIONS = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}] for i in range(3)]


def test_conversations_read_as_the_model_writes_them(tiny, tokenizer, tmp_path):
    "A column of messages becomes text by the model's chat template; what blocks and documents add is not there twice."
    source = write(tmp_path / "chats.jsonl", CONVERSATIONS, "messages")
    talking = copy.deepcopy(tokenizer)
    talking.chat_template, talking.bos_token = TEMPLATE, "<|begin|>"
    assert list(documents(source, "messages", tokenizer=talking))[0] == "[user] question 0\n[assistant] answer 0\n"
    with pytest.raises(ValueError, match="no chat template"):
        list(documents(source, "messages", tokenizer=tokenizer))
    with pytest.raises(ValueError, match="no chat template"):
        list(documents(source, "messages"))


@pytest.mark.parametrize("value", [["a"], [{"role": "user"}], []])
def test_other_lists_are_no_conversations(tmp_path, value):
    "A list of anything else is refused by name."
    with pytest.raises(ValueError, match="holds list, not text"):
        list(documents(write(tmp_path / "lists.jsonl", [value])))


def mixture(path, parts, **more):
    path.write_text(yaml.safe_dump({"parts": parts} | more))
    return path


def test_mixture_follows_its_weights(tmp_path):
    "Documents come from each part in its order, in the proportion of the weights, until a part ends; the seed decides the turns."
    parts = {name: [f"{name} {i}" for i in range(2000)] for name in ("a", "b", "c")}
    for name, texts in parts.items():
        write(tmp_path / f"{name}.jsonl", texts, "words")
    weights = {"a": 5, "b": 3, "c": 2}
    rows = [{"text": f"{name}.jsonl", "weight": weight, "column": "words"} for name, weight in weights.items()]
    mixed = list(documents(mixture(tmp_path / "mixture.yaml", rows)))
    for name, weight in weights.items():
        own = [text for text in mixed if text[0] == name]
        assert own == parts[name][: len(own)] and len(own) / len(mixed) == pytest.approx(weight / 10, abs=0.03)
    assert max(sum(text[0] == name for text in mixed) for name in parts) == 2000
    assert list(documents(tmp_path / "mixture.yaml")) == mixed
    other = list(documents(mixture(tmp_path / "other.yaml", rows, seed=1)))
    assert [text[0] for text in other[:50]] != [text[0] for text in mixed[:50]]


def test_a_mixture_is_a_source_like_any_other(tmp_path, tokenizer, corpus):
    "Pools are filled from a mixture, and documents keep their splits."
    rows = [{"text": str(corpus), "weight": 0.5}, {"text": str(write(tmp_path / "b.jsonl", [f"b {i}" for i in range(500)])), "weight": 0.5}]
    pools = load_pools(mixture(tmp_path / "mixture.yaml", rows), tokenizer, 32, {"calibration": 64, "heldout": 64}, progress=False)
    assert {split: pool.n_tokens for split, pool in pools.items()} == {"calibration": 64, "heldout": 64}


@pytest.mark.parametrize("content, message", [
    ("parts: [", "no valid YAML"), ("[]", "must look like"), ("parts: []", "must look like"), ("parts: [{text: a.jsonl}]", "must look like"),
    ("parts: [{text: a.jsonl, weight: 0}]", "weight of a.jsonl"), ("parts: [{text: a.jsonl, weight: x}]", "weight of a.jsonl"), ("parts: [{text: a.jsonl, weight: 1, colum: b}]", "must look like"),
    ("{parts: [{text: a.jsonl, weight: 1}], seed: -1}", "seed"), ("parts: [{text: mixture.yaml, weight: 1}]", "cannot hold another"), ("parts: [{text: missing.jsonl, weight: 1}]", "missing.jsonl")])
def test_a_mixture_that_cannot_be_is_refused(tmp_path, content, message):
    "With what was found, and what would be right."
    (tmp_path / "mixture.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(documents(tmp_path / "mixture.yaml"))
