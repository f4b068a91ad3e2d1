"""Numbers are what their names say, whether the model is live or exported, and say how they were made."""
import json
import math
import random

import numpy
import pytest
import torch
from helpers import random_blocks, small_model

from evoprune_nb.candidates import materialize
from evoprune_nb.ui.cli import main
from evoprune_nb.data import TokenPool, documents, load_pools
from evoprune_nb.judge.evaluation import evaluate, evaluation_report, load_tasks, write_task, zero_shot
from evoprune_nb.ship.export import export_hf
from evoprune_nb.judge.latency import measure_latency
from evoprune_nb.models import load_model


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "qwen3", "granite"])
def test_nats_are_transformers_loss(family, tokenizer):
    "Cross-entropy per predicted token and its exponential are transformers' own; blocks have one predicted token less than they have tokens."
    model, blocks = small_model(family), random_blocks(5, 20)
    with torch.no_grad():
        loss = model(blocks, labels=blocks).loss.item()
    found = evaluate(model, TokenPool("heldout", blocks.int()), tokenizer, batch_size=2)
    assert found.nats == pytest.approx(loss, rel=1e-5) and found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.n_tokens == 5 * 19 and found.n_params == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        each = [model(block[None], labels=block[None]).loss.item() for block in blocks]
    assert found.stderr == pytest.approx(numpy.std(each, ddof=1) / math.sqrt(5), rel=1e-4) and found.perplexity_stderr == found.perplexity * found.stderr


def test_bits_per_byte_by_hand(tiny, tokenizer):
    "The bits of all predicted tokens over the bytes of their text: accents count as two, document ends as none."
    text, end = "Zürich, a café, naïve résumés. " * 4, tokenizer.eos_token_id
    tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] + [end]) * 3
    blocks = torch.tensor(tokens).view(3, -1)
    with torch.no_grad():
        log_p = tiny(blocks).logits[:, :-1].double().log_softmax(-1).gather(-1, blocks[:, 1:, None])
    n_bytes = 3 * len(text.removeprefix(tokenizer.decode(blocks[0, :1])).encode())
    found = evaluate(tiny, TokenPool("heldout", blocks.int()), tokenizer)
    assert found.bits_per_byte == pytest.approx(-log_p.sum().item() / math.log(2) / n_bytes, rel=1e-4)


def test_candidate_of_level_0_is_the_dense_model(tiny, tokenizer, database, pools):
    "With nothing removed, every number is exactly the dense model's."
    dense = database.space.genome([0] * len(database.units))
    for trainable in (True, False):
        assert evaluate(materialize(tiny, database, dense, trainable), pools["heldout"], tokenizer) == evaluate(tiny, pools["heldout"], tokenizer)


def test_a_share_of_the_pool(tiny, tokenizer, pools, capsys):
    "n_tokens takes the pool's first blocks; the batch size changes nothing but rounding; too many tokens are refused; no bar is shown unless asked for."
    pool = pools["heldout"]
    some, again = evaluate(tiny, pool, tokenizer, 500), evaluate(tiny, TokenPool("heldout", pool.blocks[:7]), tokenizer, batch_size=3)
    assert some.n_tokens == again.n_tokens == 7 * 63 and some.nats == pytest.approx(again.nats, rel=1e-6)
    assert some.bits_per_byte == pytest.approx(again.bits_per_byte, rel=1e-6)
    with pytest.raises(ValueError, match="asked for 5,000 heldout tokens, but there are 1,024"):
        evaluate(tiny, pool, tokenizer, 5000)
    assert capsys.readouterr().err == ""
    evaluate(tiny, pool, tokenizer, 500, progress="evaluating dense")
    assert "evaluating dense: 100%" in capsys.readouterr().err


@pytest.fixture(scope="module")
def rows(corpus) -> list[dict]:
    "Questions made of text: which of three endings belongs to a sentence."
    rng, texts = random.Random(0), [" ".join(text.split()) for text in documents(corpus)]
    beginnings = [text[:120].rsplit(" ", 4)[0] for text in texts if len(text) > 200][:24]
    endings = [text[len(start) + 1 :][: rng.randint(8, 40)].rstrip() for text, start in zip((text for text in texts if len(text) > 200), beginnings)]
    questions = []
    for i, (start, end) in enumerate(zip(beginnings, endings)):
        choices = [end, endings[i - 1], endings[i - 2]]
        rng.shuffle(choices)
        questions.append({"query": start, "choices": choices, "gold": choices.index(end)})
    return questions


@pytest.fixture(scope="module")
def task(rows, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "endings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_task(directory / "endings.jsonl", directory)


@pytest.fixture(scope="module")
def exported(tiny, tokenizer, database, tmp_path_factory):
    "A candidate with thin units, uneven heads and a missing sublayer of each kind, and its checkpoint directory."
    candidate = materialize(tiny, database, database.space.genome([0, 1, 2, 3, 4, 5, 6, 6] + [0, 3, 10, 5, 7, 9, 1, 10]))
    return candidate, export_hf(candidate, tokenizer, tmp_path_factory.mktemp("exported") / "pruned")


def by_hand(model, tokenizer, rows, prompt=lambda query: query) -> dict[str, float]:
    "Accuracies from plain log-probabilities: of each choice with the space before it, as is, and per character."
    hits = {"acc": 0, "acc_norm": 0}
    for row in rows:
        start, scores = tokenizer(prompt(row["query"]), add_special_tokens=False)["input_ids"], []
        for choice in row["choices"]:
            tokens = torch.tensor([tokenizer(f"{prompt(row['query'])} {choice}", add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                log_p = model(tokens).logits[0, :-1].double().log_softmax(-1).gather(-1, tokens[0, 1:, None])
            scores.append(log_p[len(start) - 1 :].sum().item())
        per_character = [score / len(choice) for score, choice in zip(scores, row["choices"])]
        hits["acc"] += scores.index(max(scores)) == row["gold"]
        hits["acc_norm"] += per_character.index(max(per_character)) == row["gold"]
    return {metric: count / len(rows) for metric, count in hits.items()}


def test_zero_shot_by_hand(tiny, tokenizer, rows, task):
    "The harness's accuracies are those of plain log-probabilities; the limit takes the first questions."
    score = zero_shot(tiny, tokenizer, [task])["endings"]
    assert score.metrics == pytest.approx(by_hand(tiny, tokenizer, rows)) and score.n == len(rows) == 24
    assert 0 < score.metrics["acc"] < 1 and score.stderr["acc"] > 0
    some = zero_shot(tiny, tokenizer, [task], limit=7)["endings"]
    assert some.metrics == pytest.approx(by_hand(tiny, tokenizer, rows[:7])) and some.n == 7


def test_prompt_template(tiny, tokenizer, rows, task, tmp_path):
    "The template is what precedes a choice."
    asked = write_task(task.parent / "endings.jsonl", tmp_path, "asked", prompt="Question: {{query}}\nAnswer:")
    score = zero_shot(tiny, tokenizer, [asked], limit=10)["asked"]
    assert score.metrics == pytest.approx(by_hand(tiny, tokenizer, rows[:10], lambda query: f"Question: {query}\nAnswer:"))


def test_exported_directory_scores_as_the_live_model(tokenizer, task, exported, pools):
    "Held-out numbers and the harness's scores of a reloaded checkpoint are exactly the live candidate's, and not the dense model's."
    candidate, directory = exported
    reloaded, own_tokenizer = load_model(directory, trust_remote_code=True)
    assert zero_shot(candidate, tokenizer, [task]) == zero_shot(reloaded, own_tokenizer, [task])
    assert evaluate(candidate, pools["heldout"], tokenizer) == evaluate(reloaded, pools["heldout"], own_tokenizer)


def test_zero_shot_leaves_everything_as_it_was(tokenizer, task):
    "Global random generators, the model's mode, the tokenizer."
    model = load_model("tiny")[0].train()
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state(), tokenizer.pad_token_id
    zero_shot(model, tokenizer, [task], limit=2)
    after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state(), tokenizer.pad_token_id
    assert before[:2] == after[:2] and torch.equal(before[2], after[2]) and before[3] == after[3] and model.training


@pytest.mark.parametrize(("line", "message"), [
    ("no json", "line 2: no JSON"), ("[1]", "line 2: no JSON object"), ('{"query": "a", "gold": 0}', "line 2: lacks choices"),
    ('{"query": "a", "choices": ["b"], "gold": 0}', "choices must be two texts or more; got \\['b'\\]"), ('{"query": "a", "choices": ["b", 3], "gold": 0}', "choices must be two texts"),
    ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold must be the index of one of 2 choices; got 2"), ('{"query": "a", "choices": ["b", "c"], "gold": "0"}', "gold must be .* got '0'"),
    ('{"query": 1, "choices": ["b", "c"], "gold": 0}', "query must be text; got 1"), ("{", "line 2: no JSON")])
def test_files_that_hold_no_questions(line, message, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        write_task(tmp_path / "bad.jsonl", tmp_path)
    assert not (tmp_path / "bad.yaml").exists()


def test_missing_files_and_tasks(tiny, tokenizer, tmp_path, task):
    "All are refused before a model runs."
    with pytest.raises(ValueError, match="no file of questions"):
        write_task(tmp_path / "missing.jsonl", tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="has no questions"):
        write_task(tmp_path / "empty.jsonl", tmp_path)
    with pytest.raises(ValueError, match="no task file"):
        load_tasks([tmp_path / "missing.yaml"])
    with pytest.raises(ValueError, match="no task to evaluate on"):
        load_tasks([])
    with pytest.raises(ValueError, match="limit, questions per task, must be a whole number of at least 1"):
        zero_shot(tiny, tokenizer, [task], limit=0)


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n \r\n"])
def test_questions_with_other_line_ends(tiny, tokenizer, tmp_path, end):
    "A raw U+2028 in a question is text, and blank lines are nothing."
    rows = [{"query": "one\u2028two\u0085three", "choices": ["a", "b"], "gold": 0}, {"query": "x", "choices": ["a", "b"], "gold": 1}]
    (tmp_path / "rows.jsonl").write_bytes(("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + end).encode())
    assert zero_shot(tiny, tokenizer, [write_task(tmp_path / "rows.jsonl", tmp_path)])["rows"].n == 2


def test_report_is_json_with_origin(tiny, tokenizer, pools, task, tmp_path):
    "All numbers, all conditions, the versions of what computed them; the table shows each measure."
    latency = measure_latency(tiny, prompt_tokens=8, new_tokens=2, repeats=2)
    report = evaluation_report(
        tiny, "tiny", {"limit": 3}, heldout=evaluate(tiny, pools["heldout"], tokenizer), tasks=zero_shot(tiny, tokenizer, [task], limit=3), latency=latency, kv_bytes_per_token=4096)
    row = json.loads(report.save(tmp_path / "a" / "evaluation.json").read_text())
    assert row["heldout"]["nats"] == report.heldout.nats and row["tasks"]["endings"]["n"] == 3 and row["latency"]["decode_median"] == latency.decode.median
    assert row["conditions"] == {"limit": 3} and {"torch", "transformers", "lm_eval"} <= set(row["provenance"]["packages"])
    assert [line["measure"] for line in report.rows()] == [
        "parameters", "held-out perplexity", "held-out bits per byte", "held-out tokens", "endings acc", "endings acc_norm", "prefill, median (quartiles)", "decode, median (quartiles)", "key/value cache"]


def test_command(exported, corpus, task, tokenizer, capsys):
    "`evoprune eval` on an exported directory: its numbers are those of the functions; wrong tasks are refused."
    candidate, directory = exported
    command = ["eval", str(directory), "--text", str(corpus), "--seq-len", "64", "--tokens", "1024", "--tasks", str(task.parent / "endings.jsonl"), "--limit", "5", "--latency", "--repeats", "2",
               "--prompt-tokens", "16", "--new-tokens", "2", "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    row = json.loads((directory / "evaluation.json").read_text())
    pool = load_pools(corpus, tokenizer, 64, {"heldout": 1024})["heldout"]
    assert row["heldout"]["perplexity"] == evaluate(candidate, pool, tokenizer).perplexity and row["dtype"] == "float32"
    assert row["tasks"]["endings"]["metrics"] == zero_shot(candidate, tokenizer, [task], limit=5)["endings"].metrics
    assert len(row["latency"]["decode"]["seconds"]) == 2 and row["conditions"]["text_blocks"] == pool.fingerprint()
    assert f"{row['heldout']['perplexity']:,.3f}" in printed and "decode, median" in printed
    assert row["conditions"]["dtype"] == "auto" and "weights in float32, as stored: compare only with models in float32" in printed
    card = (directory / "README.md").read_text()
    assert card.count("## Scores") == 1 and f"| held-out perplexity | {row['heldout']['perplexity']:,.4g} |" in card and "| endings acc |" in card
    assert main([*command, "--tasks", str(task)]) == 0 and (directory / "README.md").read_text() == card  # the same scores again
    assert main(["eval", "tiny", "--text", "none", "--tasks", "missing.yaml"]) == 2
    assert "no task file 'missing.yaml'" in capsys.readouterr().err


def test_blocks_of_one_token_are_refused(tiny, tokenizer):
    "In such blocks nothing is predicted."
    with pytest.raises(ValueError, match="seq_len=1 no token is predicted"):
        evaluate(tiny, TokenPool("heldout", torch.zeros(4, 1, dtype=torch.int32)), tokenizer)
