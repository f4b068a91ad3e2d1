"""Post-training: the right text in the right order, the right loss, and the same weights whatever happened on the way."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import random_blocks, short_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from evoprune_nb import losses
from evoprune_nb.ship import posttraining
from evoprune_nb.candidates import materialize
from evoprune_nb.ui.cli import main
from evoprune_nb.data import documents, split_of
from evoprune_nb.ship.export import export_hf, load_exported
from evoprune_nb.ship.cards import read_card
from evoprune_nb.machine.lock import DirectoryBusy, contents
from evoprune_nb.models import EMBEDDED_MODELS, load_model
from evoprune_nb.ship.padded import export_padded
from evoprune_nb.ship.checkpoints import damage, last_checkpoint
from evoprune_nb.losses import post_training_loss
from evoprune_nb.ship.posttraining import post_train_checkpoint
from evoprune_nb.ship.stream import PostTraining, TokenStream, require_text
from evoprune_nb.search import Search
from evoprune_nb.source import Source
from evoprune_nb.selection import Stage
from evoprune_nb.losses import next_token_loss

SHORT = PostTraining(n_tokens=12 * 2 * 32, seq_len=32, batch_size=2, lr=1e-3, shuffle_blocks=4, autocast=False)  # 12 steps


def stream_of(corpus, tokenizer, n_blocks=30, **changes) -> TokenStream:
    return TokenStream(str(corpus), tokenizer, PostTraining(**dict(n_tokens=1, seq_len=48, shuffle_blocks=4) | changes), n_blocks)


def blocks_of(stream) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in stream]


@pytest.fixture(scope="module")
def short_corpus(tmp_path_factory) -> Path:
    "Documents of all lengths, from a word to pages."
    path = tmp_path_factory.mktemp("short") / "short.jsonl"
    words = [" ".join(f"word{i * j % 97}" for j in range(i * i % 41 + 1)) + f" {i}" for i in range(60)] + [" ".join(f"page{i}" for i in range(500))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    return path


def packed_by_hand(corpus, tokenizer, seq_len, epochs) -> list[list[int]]:
    "All tuning documents, each with its end-of-text token, in one row, cut into blocks."
    tokens = [token for text in documents(corpus) if split_of(text) == "tuning" for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]] * epochs
    return [tokens[i : i + seq_len] for i in range(0, len(tokens) - seq_len + 1, seq_len)]


@pytest.mark.parametrize("epochs", [1, 3])
def test_packing_by_hand(short_corpus, tokenizer, epochs):
    "Unshuffled, the stream is the packed text of the tuning split, every token once per epoch."
    expected = packed_by_hand(short_corpus, tokenizer, 48, epochs)
    assert blocks_of(stream_of(short_corpus, tokenizer, len(expected), epochs=epochs, shuffle_blocks=1)) == expected


def test_blocks_are_shuffled_within_windows(short_corpus, tokenizer):
    "Every window holds the blocks of its stretch of the text, in an order that depends on the seed alone."
    expected = packed_by_hand(short_corpus, tokenizer, 16, 1)[:50]
    found, other = (blocks_of(stream_of(short_corpus, tokenizer, 50, seq_len=16, shuffle_blocks=12, seed=seed)) for seed in (0, 1))
    for window in range(0, 50 - 50 % 12, 12):
        assert sorted(found[window : window + 12]) == sorted(expected[window : window + 12]) != found[window : window + 12]
    assert found != other and sorted(found[:48]) == sorted(other[:48])
    assert found == blocks_of(stream_of(short_corpus, tokenizer, 50, seq_len=16, shuffle_blocks=12))


def test_the_next_window_is_made_while_one_is_in_use(short_corpus, tokenizer):
    "With the first block in hand, a thread reads on to the end of the next window, and no further."
    read, second, third = [], threading.Event(), threading.Event()
    stream = stream_of(short_corpus, tokenizer, 12)
    packed = stream.packed

    def counted(start):
        for row in packed(start):
            read.append(threading.current_thread())
            (second if len(read) == 8 else third if len(read) > 8 else threading.Event()).set()
            yield row

    stream.packed = counted
    rows = iter(stream)
    next(rows)
    assert second.wait(10) and not third.wait(0.2)
    assert threading.main_thread() not in read
    assert len([*rows]) == 11 and len(read) == 12


@given(st.integers(1, 40), st.integers(0, 60), st.integers(4, 60), st.integers(0, 5))
@settings(max_examples=25)
def test_a_stream_continues_after_any_block(short_corpus, tokenizer, window, done, seq_len, ahead):
    "A stream that was read some blocks further than training went is continued exactly, over windows, documents and epochs."
    make = lambda: stream_of(short_corpus, tokenizer, 60, seq_len=seq_len, shuffle_blocks=window, epochs=9)
    whole, first, second = make(), make(), make()
    list(islice(first, min(60, done + ahead)))
    if done % window == 0 and ahead == 0 and done < 60:
        next(islice(first, done, None))  # a loader always reads one batch ahead
    second.continue_from(json.loads(json.dumps(first.state_after(done))))
    assert blocks_of(second) == blocks_of(whole)[done:]


def test_too_little_text(short_corpus, tokenizer):
    "A file is measured before training, and the error says how much there is; more epochs give more."
    n_blocks = len(packed_by_hand(short_corpus, tokenizer, 48, 1))
    with pytest.raises(ValueError, match=f"asked for {48 * (n_blocks + 1):,} tokens, but the tuning split of .* has {48 * n_blocks:,} in 1 epochs"):
        require_text(stream_of(short_corpus, tokenizer, n_blocks + 1))
    require_text(stream_of(short_corpus, tokenizer, n_blocks))
    require_text(stream_of(short_corpus, tokenizer, n_blocks + 1, epochs=2))
    with pytest.raises(RuntimeError, match="has no more text after"):
        list(stream_of(short_corpus, tokenizer, n_blocks + 1))
    with pytest.raises(ValueError, match="no column 'body'"):
        require_text(TokenStream(str(short_corpus), tokenizer, SHORT, 3, column="body"))


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "qwen2", "mistral"])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_loss_and_gradients_are_the_plain_formula(family, chunk, monkeypatch):
    "With and without distillation, in chunks; no logits exist for more positions than a chunk."
    model, teacher, blocks, alpha, temperature = small_model(family), small_model("llama-mha", seed=1), random_blocks(3, 12), 0.3, 1.7
    parameters, rows, original = list(model.parameters()), [], losses.objective
    monkeypatch.setattr(losses, "objective", lambda logits, *rest: rows.append(len(logits)) or original(logits, *rest))
    log_q = (model(blocks).logits[:, :-1] / temperature).log_softmax(-1)
    with torch.no_grad():
        log_p = (teacher(blocks).logits[:, :-1] / temperature).log_softmax(-1)
    cross_entropy = model(input_ids=blocks, labels=blocks).loss
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2
    for loss, expected in ((post_training_loss(model, blocks, chunk=chunk), cross_entropy),
                           (post_training_loss(model, blocks, teacher, alpha, temperature, chunk), (1 - alpha) * cross_entropy + alpha * divergence)):
        torch.testing.assert_close(loss, expected)
        for a, b in zip(torch.autograd.grad(loss * 3, parameters), torch.autograd.grad(expected * 3, parameters, retain_graph=True)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert max(rows) == min(chunk, 33) and sum(rows) == 66


def test_loss_under_autocast():
    "In bfloat16 matrix products, gradients are float32, and near those of float32."
    model, teacher, blocks = small_model("llama-gqa"), small_model("llama-mha", seed=1), random_blocks(4, 16)
    exact = torch.autograd.grad(post_training_loss(model, blocks, teacher, 0.5), list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = post_training_loss(model, blocks, teacher, 0.5, chunk=20)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), exact):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.05 * b.norm()


@pytest.fixture(scope="module")
def exported(tiny, tokenizer, database, tmp_path_factory):
    "A directory with thin units, uneven heads and a missing sublayer of each kind."
    candidate = materialize(tiny, database, database.space.genome([0, 1, 2, 3, 4, 5, 6, 6] + [0, 3, 10, 5, 7, 9, 1, 10]))
    return export_hf(candidate, tokenizer, tmp_path_factory.mktemp("exported") / "pruned")


def post_train(source, out, text, plan=SHORT, **more) -> Path:
    return post_train_checkpoint(source, out, plan, str(text), use_cpu=True, progress=False, **more)


@pytest.fixture(scope="module")
def whole(exported, corpus, tmp_path_factory):
    "The result of a training without interruption, checkpoints included."
    return post_train(exported, tmp_path_factory.mktemp("whole") / "trained", corpus, checkpoint_tokens=4 * 64)


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


def same_weights(a, b) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_trainer_is_the_obvious_loop(exported, corpus, tokenizer, whole):
    "AdamW, clipping, warm-up and cosine, over the stream in order."
    model, _ = load_exported(exported)
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=1.0, weight_decay=0.0)
    blocks = torch.tensor(blocks_of(TokenStream(str(corpus), tokenizer, SHORT, 24)))
    n_warmup = 1  # a twentieth of 12 steps, rounded up
    for step, batch in enumerate(blocks.split(2)):
        done = (step - n_warmup) / (12 - n_warmup)
        optimizer.param_groups[0]["lr"] = 1e-3 * (step / n_warmup if step < n_warmup else 0.1 + 0.9 * (1 + torch.cos(torch.tensor(torch.pi * done)).item()) / 2)
        next_token_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in load_exported(whole)[0].state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=2e-5)
    assert not same_weights(exported, whole)


def test_accumulation_is_a_larger_batch(exported, corpus, tmp_path):
    "Two forward passes of two blocks are one of four, up to rounding; recomputing activations changes nothing."
    plan = dict(n_tokens=4 * 4 * 32, seq_len=32, lr=1e-3, shuffle_blocks=4, autocast=False)
    large = post_train(exported, tmp_path / "large", corpus, PostTraining(batch_size=4, **plan))
    for name, changes in {"accumulated": dict(batch_size=2, accumulation=2), "recomputed": dict(batch_size=4, checkpoint_activations=True)}.items():
        other = post_train(exported, tmp_path / name, corpus, PostTraining(**plan | changes))
        for a, b in zip(weights(large).values(), weights(other).values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_two_processes_are_a_larger_batch(exported, corpus, tmp_path):
    "Two processes, started by torchrun, train on half of each batch each, and end at the weights of one process, up to rounding."
    plan = dict(n_tokens=4 * 4 * 32, seq_len=32, lr=1e-3, shuffle_blocks=4, autocast=False)
    large, call = post_train(exported, tmp_path / "one", corpus, PostTraining(batch_size=4, **plan)), (str(exported), str(tmp_path / "two"), PostTraining(batch_size=2, **plan), str(corpus))
    script = tmp_path / "script.py"
    script.write_text(f"from evoprune_nb.ship.posttraining import PostTraining, post_train_checkpoint\npost_train_checkpoint(*{call!r}, use_cpu=True, progress=False)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(weights(large).values(), weights(tmp_path / "two").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    record = json.loads((tmp_path / "two" / "posttraining.json").read_text())
    assert record["devices"] == 2 and record["tokens"] == 4 * 4 * 32


def test_result_is_a_checkpoint_like_its_source(exported, whole):
    "Same configuration, code and tokenizer, same shapes; plain transformers loads it; what was done is on record; no checkpoint is left."
    from transformers import AutoModelForCausalLM

    for name in ("config.json", "modeling_pruned.py", "tokenizer.json"):
        assert (whole / name).read_bytes() == (exported / name).read_bytes()
    assert {name: tensor.shape for name, tensor in weights(whole).items()} == {name: tensor.shape for name, tensor in weights(exported).items()}
    blocks = random_blocks(2, 16)
    here, _ = load_exported(whole)
    here.set_attn_implementation("sdpa")  # as plain transformers has it
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(whole, trust_remote_code=True)(blocks).logits, here(blocks).logits)
    record = json.loads((whole / "posttraining.json").read_text())
    assert record["tokens"] == 12 * 64 and len(record["log"]) == 12 and record["settings"]["lr"] == 1e-3 and "torch" in record["provenance"]["packages"]
    assert "| post-training | 768 tokens of" in (whole / "README.md").read_text() and not Path(f"{whole}.training").exists()


def test_card_says_what_was_done(exported, corpus, tmp_path):
    "Scores of before are called so; the card is that of the source, wherever the result is exported to next; a stock checkpoint gets a note."
    source, plan = Path(shutil.copytree(exported, tmp_path / "source")), PostTraining(n_tokens=64, seq_len=32, batch_size=2)
    (source / "evaluation.json").write_text(json.dumps({"heldout": {"perplexity": 123.0}, "tasks": {}}))
    out = post_train(source, tmp_path / "trained", corpus, plan)
    assert read_card(out).scores == {"held-out perplexity, before": 123.0} and read_card(out).provenance["post-training"].startswith("64 tokens of")
    assert not (out / "evaluation.json").exists() and "trust_remote_code=True" in (out / "README.md").read_text()
    stock = post_train(EMBEDDED_MODELS["tiny"](), tmp_path / "dense", corpus, plan)
    assert "## Post-training\n\n64 tokens of" in (stock / "README.md").read_text() and load_exported(stock)[0].config.model_type == "llama"


def test_no_flag_is_needed_where_there_is_no_accelerator(exported, corpus, tmp_path, monkeypatch):
    "With the defaults, bfloat16 products included, training runs on the CPU."
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    out = post_train_checkpoint(exported, tmp_path / "out", PostTraining(n_tokens=64, seq_len=32, batch_size=2), str(corpus), progress=False)
    assert json.loads((out / "posttraining.json").read_text())["tokens"] == 64


def test_half_precision_is_rounded_once(tiny, tokenizer, database, corpus, exported, whole, tmp_path):
    "A bfloat16 checkpoint is trained on float32 weights, and the result is rounded to bfloat16 at the end."
    rounded = export_hf(load_exported(exported)[0].bfloat16(), tokenizer, tmp_path / "bfloat16")
    as_float = export_hf(load_exported(rounded)[0].float(), tokenizer, tmp_path / "float32")
    small, large = (post_train(source, tmp_path / f"{source.name} trained", corpus) for source in (rounded, as_float))
    for name, tensor in weights(small).items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, weights(large)[name].bfloat16())


def test_killed_training_continues_to_the_same_weights(exported, corpus, whole, tmp_path):
    "A process killed between checkpoints; the same call goes on and ends in the same bits as the training never interrupted."
    script = f"""
import dataclasses, sys, time
import transformers
from evoprune_nb.ship.posttraining import PostTraining, post_train_checkpoint
class Slow(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0 if state.global_step < 6 else 60)
transformers.trainer.DEFAULT_CALLBACKS.append(Slow)
settings = {SHORT!r}
post_train_checkpoint({str(exported)!r}, {str(tmp_path / 'trained')!r}, settings, {str(corpus)!r}, checkpoint_tokens=4 * 64, use_cpu=True, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stderr=subprocess.PIPE, text=True)
    work = tmp_path / "trained.training"
    try:
        while not (work / "checkpoint-4" / "stream.json").exists():
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.1)
        time.sleep(0.5)  # a step further, into the fifth or sixth
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "trained").exists() and last_checkpoint(work).name == "checkpoint-4"
    (work / "checkpoint-8").mkdir()  # killed while writing
    (work / "checkpoint-8" / "model.safetensors").write_bytes(b"half")
    assert same_weights(post_train(exported, tmp_path / "trained", corpus, checkpoint_tokens=4 * 64), whole)
    assert len(json.loads((tmp_path / "trained" / "posttraining.json").read_text())["log"]) == 12


def test_stopped_before_the_result_was_written(exported, corpus, whole, tmp_path, monkeypatch):
    "All steps done, but no result yet: the same call goes on from the last checkpoint and writes it."
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(posttraining, "_write_result", stop)
        post_train(exported, tmp_path / "trained", corpus, checkpoint_tokens=4 * 64)
    assert last_checkpoint(tmp_path / "trained.training").name == "checkpoint-8"
    assert same_weights(post_train(exported, tmp_path / "trained", corpus, checkpoint_tokens=4 * 64), whole)


@pytest.fixture(scope="module")
def stopped(exported, corpus, tmp_path_factory):
    "The working directory of a training that was stopped before its result was written, with two checkpoints."
    out = tmp_path_factory.mktemp("stopped") / "trained"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(posttraining, "_write_result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        post_train(exported, out, corpus, checkpoint_tokens=4 * 64)
    return Path(f"{out}.training")


def flip(path: Path) -> None:
    "Flip a bit in the middle of a file."
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("action, name", [
    *((Path.unlink, name) for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors")),
    *((flip, name) for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors", "rng_state.pth", "config.json", "stream.json"))])
def test_a_damaged_checkpoint_is_not_used(exported, corpus, whole, stopped, tmp_path, action, name):
    "Whatever is missing or flipped in the last checkpoint: the one before is used, the file is named, and the weights are those of the training never interrupted."
    work = Path(shutil.copytree(stopped, tmp_path / "trained.training"))
    action(work / "checkpoint-8" / name)
    with pytest.warns(UserWarning, match=f"checkpoint-8/{name} is (missing|damaged).*continues from the checkpoint before"):
        out = post_train(exported, tmp_path / "trained", corpus, checkpoint_tokens=4 * 64)
    assert same_weights(out, whole)


def test_every_bit_of_a_seal_counts(stopped, tmp_path):
    "The position in the text is as protected as the weights."
    checkpoint = Path(shutil.copytree(stopped / "checkpoint-4", tmp_path / "checkpoint-4"))
    content = (checkpoint / "stream.json").read_bytes()
    assert not damage(checkpoint)
    for index in range(len(content)):
        (checkpoint / "stream.json").write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        assert damage(checkpoint), content[: index + 1]


def test_without_a_good_checkpoint_it_begins_anew(exported, corpus, whole, stopped, tmp_path):
    "Both checkpoints damaged: said of each, and the training begins again, to the same weights."
    work = Path(shutil.copytree(stopped, tmp_path / "trained.training"))
    for checkpoint in work.glob("checkpoint-*"):
        flip(checkpoint / "optimizer.pt")
    with pytest.warns(UserWarning, match="or begins anew") as said:
        assert same_weights(post_train(exported, tmp_path / "trained", corpus, checkpoint_tokens=4 * 64), whole)
    assert sum("optimizer.pt is damaged" in str(row.message) for row in said) == 2


def test_checkpoints_of_version_0_1_are_continued(exported, corpus, whole, stopped, tmp_path):
    "They have the position, but no hashes."
    work = Path(shutil.copytree(stopped, tmp_path / "trained.training"))
    for path in work.glob("checkpoint-*/stream.json"):
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key in ("blocks", "window", "start")}))
    assert last_checkpoint(work).name == "checkpoint-8"
    assert same_weights(post_train(exported, tmp_path / "trained", corpus, checkpoint_tokens=4 * 64), whole)


def test_two_trainings_do_not_share_a_directory(exported, corpus, whole, stopped, tmp_path):
    "While one process trains, another is refused by name, and disturbs nothing; afterwards it may."
    work = Path(shutil.copytree(stopped, tmp_path / "trained.training"))
    holder = subprocess.Popen([sys.executable, "-c", f"""
import sys
from evoprune_nb.machine.lock import DirectoryLock
with DirectoryLock({str(work)!r}):
    print("held", flush=True)
    sys.stdin.read()
"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DirectoryBusy, match=f"trained.training is being written by process {holder.pid}"):
            post_train(exported, tmp_path / "trained", corpus, checkpoint_tokens=4 * 64)
        assert {path.name for path in work.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"} and not (tmp_path / "trained").exists()
    finally:
        holder.communicate("")
    assert same_weights(post_train(exported, tmp_path / "trained", corpus, checkpoint_tokens=4 * 64), whole)
    assert not work.exists()


def test_a_result_that_appears_meanwhile_is_noticed_before_training(exported, corpus, tmp_path, monkeypatch):
    "Another process may finish the same training while this one loads its model: nothing is trained for an end that fails."
    out = tmp_path / "trained"

    def finish_elsewhere(stream):
        out.mkdir()
        (out / "model.safetensors").touch()

    monkeypatch.setattr(posttraining, "require_text", finish_elsewhere)
    monkeypatch.setattr(posttraining, "_train", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ValueError, match="trained exists and is not an empty directory"):
        post_train(exported, out, corpus)
    assert contents(tmp_path / "trained.training") == []


@pytest.mark.parametrize("wrong", ["missing", "no column", "too short"])
def test_a_wrong_text_claims_nothing(exported, corpus, short_corpus, whole, tmp_path, wrong):
    "The call fails, and the corrected call works."
    source, column = {"missing": (tmp_path / "nowhere.jsonl", "text"), "no column": (corpus, "body"), "too short": (tmp_path / "short.jsonl", "text")}[wrong]
    (tmp_path / "short.jsonl").write_text("".join(short_corpus.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises((ValueError, OSError)):
        post_train(exported, tmp_path / "trained", source, column=column, checkpoint_tokens=4 * 64)
    assert not (tmp_path / "trained.training").exists()
    assert same_weights(post_train(exported, tmp_path / "trained", corpus, checkpoint_tokens=4 * 64), whole)


def test_links_out_of_a_checkpoint_are_not_followed(exported, corpus, tmp_path):
    "A LICENSE that is a link to somewhere else stays out of the result."
    source = Path(shutil.copytree(exported, tmp_path / "source"))
    (tmp_path / "secret").write_text("the private key")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match="LICENSE is a link out"):
        out = post_train(source, tmp_path / "trained", corpus, PostTraining(n_tokens=64, seq_len=32, batch_size=2))
    assert not (out / "LICENSE").exists() and "private key" not in "".join(path.read_text() for path in out.glob("*.[mj]*"))


def test_distillation_from_the_dense_model(exported, corpus, tmp_path):
    "With all weight on the divergence, it falls; the record names the teacher."
    plan = PostTraining(n_tokens=20 * 4 * 32, seq_len=32, batch_size=4, lr=1e-3, distillation=1.0)
    out = post_train(exported, tmp_path / "trained", corpus, plan, teacher="tiny")
    record = json.loads((out / "posttraining.json").read_text())
    losses = [row["loss"] for row in record["log"]]
    assert sum(losses[-5:]) < sum(losses[:5]) and record["teacher"] == "tiny" and "distilled from tiny" in (out / "README.md").read_text()
    blocks = torch.tensor(blocks_of(TokenStream(str(corpus), load_model("tiny")[1], plan, 4)))
    with torch.no_grad():
        first = post_training_loss(load_exported(exported)[0].requires_grad_(True), blocks, load_model("tiny")[0], 1.0)
    assert losses[0] == pytest.approx(first.item(), rel=0.02)


def test_a_loss_that_is_not_finite_ends_the_training(exported, corpus, tmp_path):
    "At once, with the value; no result is written, and no checkpoint after it."
    plan = PostTraining(n_tokens=12 * 2 * 32, seq_len=32, batch_size=2, lr=1e30, warmup=0.0, autocast=False)
    with pytest.raises(RuntimeError, match=r"the loss became nan by step 3; lower lr \(1e\+30\)"):
        post_train(exported, tmp_path / "trained", corpus, plan, checkpoint_tokens=64)
    assert not (tmp_path / "trained").exists() and last_checkpoint(tmp_path / "trained.training").name == "checkpoint-2"


def test_other_settings_do_not_continue(exported, corpus, tmp_path, monkeypatch):
    "A working directory belongs to one post-training: another is refused, by the difference."
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(posttraining, "last_checkpoint", lambda work: (_ for _ in ()).throw(KeyboardInterrupt))
        post_train(exported, tmp_path / "trained", corpus)
    with pytest.raises(ValueError, match="holds another post-training: settings .*0.001.*0.002"):
        post_train(exported, tmp_path / "trained", corpus, PostTraining(**SHORT.__dict__ | {"lr": 2e-3}))
    (tmp_path / "mine.training").mkdir()
    (tmp_path / "mine.training" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not empty and holds no post-training"):
        post_train(exported, tmp_path / "mine", corpus)
    assert (tmp_path / "mine.training" / "thesis.tex").exists()


def test_wrong_use_is_refused_before_training(exported, corpus, short_corpus, tokenizer, whole, tmp_path):
    with pytest.raises(ValueError, match="exists and is not an empty directory; choose another place"):
        post_train(exported, whole, corpus)
    with pytest.raises(ValueError, match="is no checkpoint"):
        post_train(tmp_path, tmp_path / "out", corpus)
    with pytest.raises(ValueError, match="2 tokens do not fill one optimizer step of 64"):
        post_train(exported, tmp_path / "out", corpus, PostTraining(**SHORT.__dict__ | {"n_tokens": 2}))
    for more in ({"teacher": "tiny"}, {"plan": PostTraining(**SHORT.__dict__ | {"distillation": 0.5})}):
        with pytest.raises(ValueError, match="distillation needs both a teacher and a weight"):
            post_train(exported, tmp_path / "out", corpus, **more)
    model, _ = load_exported(exported)
    export_padded(model, tokenizer, tmp_path / "padded", pad_heads=True)
    with pytest.raises(ValueError, match="is padded, and training would fill its zero heads; post-train the run or its hf export"):
        post_train(tmp_path / "padded", tmp_path / "out", corpus)
    other = small_model("llama-gqa")
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has a vocabulary of 100 tokens, the pruned model one of 4,096"):
        post_train(exported, tmp_path / "out", corpus, PostTraining(**SHORT.__dict__ | {"distillation": 0.5}), teacher=str(tmp_path / "other"))
    small_model("granite").save_pretrained(tmp_path / "granite")
    tokenizer.save_pretrained(tmp_path / "granite")
    with pytest.raises(ValueError, match="scales or caps its logits"):
        post_train(tmp_path / "granite", tmp_path / "out", corpus)
    with pytest.raises(ValueError, match="allow more epochs or lower n_tokens"):
        post_train(exported, tmp_path / "out", short_corpus, PostTraining(n_tokens=10**6, seq_len=32))
    assert not (tmp_path / "out").exists()
    for wrong in ({"lr": 0.0}, {"batch_size": 0}, {"seq_len": 1}, {"distillation": 1.5}, {"warmup": 1.0}):
        with pytest.raises(ValueError, match="must be a (whole|finite) number"):
            PostTraining(**dict(n_tokens=1000) | wrong)


def test_command_on_the_winner_of_a_run(tiny, tokenizer, database, pools, corpus, tmp_path, capsys):
    "`evoprune post-train` and `evoprune eval` take a run directory: its winner is exported, trained, evaluated; what the run does not say has to be said."
    run = tmp_path / "run"
    config = short_config(generations=1, offspring=2, stages=(Stage(1, 0, 64),))
    source = Source("tiny")
    winner = Search(run, tiny, database, {"tuning": pools["tuning"], "scoring": pools["heldout"]}, config, source=source).run(progress=False)
    command = ["post-train", str(run), str(tmp_path / "trained"), "--tokens", "300", "--seq-len", "32", "--batch-size", "2", "--text", str(corpus), "--cpu", "--no-autocast"]
    assert main(command) == 2 and "holds no level database" in capsys.readouterr().err
    assert main([*command, "--database", str(database.directory)]) == 0
    start = export_hf(materialize(tiny, database, winner), tokenizer, tmp_path / "winner")
    expected = post_train(start, tmp_path / "expected", corpus, PostTraining(n_tokens=300, seq_len=32, batch_size=2, autocast=False))
    assert same_weights(tmp_path / "trained", expected) and json.loads((expected / "posttraining.json").read_text())["tokens"] == 256
    evaluate_it = ["--text", str(corpus), "--seq-len", "64", "--tokens", "512", "--device", "cpu"]
    assert main(["eval", str(run), "--database", str(database.directory), *evaluate_it]) == main(["eval", str(start), *evaluate_it]) == 0
    of_run, of_export = (json.loads((directory / "evaluation.json").read_text()) for directory in (run, start))
    assert of_run["heldout"] == of_export["heldout"] and of_run["conditions"] == of_export["conditions"] | {"genome": winner.code}
    assert main(["post-train", str(start), str(tmp_path / "trained"), "--tokens", "300"]) == 2 and "choose another place" in capsys.readouterr().err
