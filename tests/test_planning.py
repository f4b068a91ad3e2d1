"""What is planned is what it takes."""
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers import peak_of_tensors

from evoprune_nb import losses
from evoprune_nb.machine.portions import part_size
from evoprune_nb.target import Target, plan_budget
from evoprune_nb.candidates import materialize
from evoprune_nb.data import load_pools
from evoprune_nb.ship.export import export_hf
from evoprune_nb.models import load_model
from evoprune_nb.mutation import make_offspring
from evoprune_nb.losses import head_bytes
from evoprune_nb.paper.planning import Device, meta_model, plan, softmax_bytes
from evoprune_nb.ship.posttraining import post_train_checkpoint
from evoprune_nb.ship.stream import PostTraining
from evoprune_nb.database import LevelDatabase, build_database
from evoprune_nb.search import SearchConfig
from evoprune_nb.selection import PUBLISHED_STAGES, Stage, select
from evoprune_nb.evaluator import Evaluator
from evoprune_nb.training import Training

SEQ = 256
CONFIG = SearchConfig(generations=1, offspring=2, stages=(Stage(1, 4 * SEQ, SEQ),), training=Training(batch_size=2))


def one_generation(model, database, pools, config=CONFIG) -> list:
    "Run one generation from the uniform parent, as a search does."
    budget, parent = plan_budget(database.space, config.target)
    evaluator = Evaluator(model, database, pools, config.stages, config.training, warm_start=config.warm_start)
    return list(select(parent, make_offspring(parent, database.space, budget, config.offspring, random.Random(0)), config.stages, evaluator.evaluate_stage, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_tiny(corpus, tmp_path, dtype):
    "Disk and memory of database and search are predicted within 20 % of what is allocated."
    model, tokenizer = load_model("tiny", dtype=dtype)
    pools = load_pools(corpus, tokenizer, SEQ, {"calibration": 8192, "tuning": 4 * SEQ, "scoring": 2 * SEQ})
    planned = plan("tiny", CONFIG, calibration_tokens=8192, seq_len=SEQ, dtype=dtype, batch_size=2)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    building = weights + peak_of_tensors(lambda: build_database(model, pools["calibration"].blocks.long(), tmp_path / "database", batch_size=2, progress=False))
    database = LevelDatabase(tmp_path / "database", model)
    searching = weights + peak_of_tensors(lambda: one_generation(model, database, pools))
    assert planned.phases[0].disk_bytes == pytest.approx(database.n_bytes, rel=0.2)
    assert planned.phases[0].memory_bytes == pytest.approx(building, rel=0.2)
    assert planned.phases[1].memory_bytes == pytest.approx(searching, rel=0.2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bytes_of_the_head(monkeypatch, device):
    "The loss holds a cache full of logits in float32 at a time on a CPU; elsewhere all rows of a chunk, done that way here."
    if device != "cpu":
        monkeypatch.setattr(losses, "cached_rows", len)
    hidden, weight = (torch.randn(rows, 32, dtype=torch.bfloat16, requires_grad=True) for rows in (512, 32768))
    measured = peak_of_tensors(lambda: losses._HeadLoss.apply(hidden, weight, torch.zeros(512, dtype=torch.long), 1024))
    assert head_bytes(32768, 32, 2, 512, device=device) == pytest.approx(measured, rel=0.1)


def test_plan_for_another_device():
    "What attention keeps, the loss holds and the optimizer copies at a time follows the type of the device."
    here, there = (plan("tiny", CONFIG, dtype="float32", seq_len=SEQ, post_training=PostTraining(10_000, SEQ), device=Device("d", 10**12, 1e9, 1e9, device)) for device in ("cpu", "cuda"))
    assert here.phases[0].memory_bytes == there.phases[0].memory_bytes and all(a.memory_bytes != b.memory_bytes for a, b in zip(here.phases[1:], there.phases[1:]))
    assert softmax_bytes(SEQ, torch.float32, "cuda") == 4 < softmax_bytes(SEQ, torch.float32)
    short = SearchConfig(stages=(Stage(1, 64, 64),), training=Training(batch_size=1))
    here, there = (plan("smollm2-135m", short, dtype="bfloat16", seq_len=64, device=Device("d", 10**12, 1e9, 1e9, device)).phases[1].memory_bytes for device in ("cpu", "cuda"))
    assert there - here == 4 * (part_size("cuda") - part_size("cpu"))  # of so short a batch, the step takes more than the pass


MEASURE = """
import gc, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_planning import *
from evoprune_nb.machine.device import peak_rss
torch.set_num_threads(1)
load_model("tiny")  # so that what Python and transformers take is not counted
Path("/proc/self/clear_refs").write_text("5")
before = peak_rss()
model, tokenizer = load_model("smollm2-135m", dtype="bfloat16")
pools = load_pools(sys.argv[2], tokenizer, SEQ, {"calibration": 2048, "tuning": 4 * SEQ, "scoring": 2 * SEQ})
database = build_database(model, pools["calibration"].blocks.long(), sys.argv[3], batch_size=2, progress=False)
building = peak_rss() - before
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
one_generation(model, database, pools)
print(json.dumps({"disk": database.n_bytes, "building": building, "searching": peak_rss() - before}))
"""


def test_candidates_side_by_side_take_memory_each():
    "Three at once: two more candidates in training than one at a time, and the dense model's logits of a scoring draw that they share."
    one, two, three = (plan("tiny", SearchConfig(generations=1, offspring=2, stages=(Stage(1, 4 * SEQ, SEQ),), training=Training(batch_size=2), n_jobs=n), seq_len=SEQ).phases[1] for n in (1, 2, 3))
    shared, candidate = SEQ * 4096 * 2, three.memory_bytes - two.memory_bytes
    assert two.memory_bytes - one.memory_bytes == candidate + shared and candidate > 10 * one.tokens
    assert (one.flops, one.tokens) == (three.flops, three.tokens)
    with pytest.raises(ValueError, match="n_jobs"):
        SearchConfig(n_jobs=0)


@pytest.mark.parametrize("warm_start, stages", [
    (False, (Stage(2, 0, 8 * SEQ), Stage(1, 0, 16 * SEQ))), (False, (Stage(2, 0, 8 * SEQ), Stage(1, 4 * SEQ, SEQ))), (True, (Stage(3, 2 * SEQ, SEQ), Stage(2, 2 * SEQ, SEQ), Stage(1, 4 * SEQ, SEQ)))])
def test_memory_of_schedules(tiny, corpus, tokenizer, database, warm_start, stages):
    "Stages without tuning keep the reference's states; warm starts keep survivors with their optimizers."
    pools = load_pools(corpus, tokenizer, SEQ, {"calibration": SEQ, "tuning": 4 * SEQ, "scoring": 16 * SEQ})
    config = SearchConfig(generations=1, offspring=4, stages=stages, training=Training(batch_size=2), warm_start=warm_start)
    measured = sum(parameter.nbytes for parameter in tiny.parameters()) + peak_of_tensors(lambda: one_generation(tiny, database, pools, config))
    assert plan("tiny", config, seq_len=SEQ, dtype="float32").phases[1].memory_bytes == pytest.approx(measured, rel=0.2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can restart the count of a process's peak memory")
def test_bytes_of_smollm2(corpus, tmp_path, monkeypatch):
    "The same for a real model; database and search measured as the resident memory of a process of its own beyond what Python and torch take."
    command = [sys.executable, "-c", MEASURE, str(Path(__file__).parent), str(corpus), str(tmp_path / "database")]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    measured = json.loads(answer.stdout.splitlines()[-1])
    settings = PostTraining(n_tokens=4 * SEQ, seq_len=SEQ, batch_size=1, epochs=9)
    database, search, post_training = plan("smollm2-135m", CONFIG, calibration_tokens=2048, seq_len=SEQ, dtype="bfloat16", batch_size=2, post_training=settings).phases
    assert database.disk_bytes == pytest.approx(measured["disk"], rel=0.2)
    assert database.memory_bytes == pytest.approx(measured["building"], rel=0.2)
    assert search.memory_bytes == pytest.approx(measured["searching"], rel=0.2)
    model, tokenizer = load_model("smollm2-135m", dtype="bfloat16")
    levels = LevelDatabase(tmp_path / "database", model)
    candidate = materialize(model, levels, plan_budget(levels.space, CONFIG.target)[1])
    memory, disk = post_trained(candidate, tokenizer, corpus, settings, tmp_path, monkeypatch)
    assert post_training.memory_bytes == pytest.approx(memory, rel=0.2) and post_training.disk_bytes == pytest.approx(disk, rel=0.2)


def post_trained(candidate, tokenizer, corpus, settings, directory, monkeypatch, teacher="") -> tuple[int, int]:
    "Post-train a candidate; returns the largest sizes of its tensors and of its working directory, in bytes."
    export_hf(candidate, tokenizer, directory / "pruned")
    train, rotate, tensors, files = transformers.Trainer.train, transformers.trainer.rotate_checkpoints, [], []

    def measured_train(trainer, **options):
        weights = sum(p.nbytes for p in trainer.model.parameters())
        tensors.append(weights + peak_of_tensors(lambda: train(trainer, **options)))

    def measured_rotate(*args, **options):
        files.append(sum(file.stat().st_size for file in (directory / "work").rglob("*") if file.is_file()))
        rotate(*args, **options)

    monkeypatch.setattr(transformers.Trainer, "train", measured_train)
    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", measured_rotate)
    post_train_checkpoint(directory / "pruned", directory / "out", settings, str(corpus), teacher=teacher, work=directory / "work", checkpoint_tokens=1, use_cpu=True, progress=False)
    return tensors[0], max(files)


@pytest.mark.parametrize("changes", [{}, dict(batch_size=16), dict(autocast=False), dict(batch_size=16, checkpoint_activations=True), dict(accumulation=2), dict(distillation=0.5)], ids=str)
def test_bytes_of_post_training(tiny, corpus, tokenizer, database, tmp_path, monkeypatch, changes):
    "Memory and checkpoints of Trainer are predicted within 20 %, whatever is recomputed, accumulated or distilled."
    settings = PostTraining(**dict(n_tokens=1, seq_len=SEQ, batch_size=4) | changes)
    settings = replace(settings, n_tokens=4 * settings.tokens_per_step(), epochs=9)
    candidate = materialize(tiny, database, plan_budget(database.space, Target(0.5))[1])
    memory, disk = post_trained(candidate, tokenizer, corpus, settings, tmp_path, monkeypatch, "tiny" if settings.distillation else "")
    phase = plan("tiny", CONFIG, seq_len=SEQ, dtype="float32", post_training=settings).phases[2]
    assert phase.memory_bytes == pytest.approx(memory + (sum(p.nbytes for p in tiny.parameters()) if settings.distillation else 0), rel=0.2)
    assert phase.disk_bytes == pytest.approx(disk, rel=0.2) and phase.tokens == settings.n_tokens


def test_memory_of_scoring_long_blocks(tiny, corpus, tokenizer, database):
    "Eight long blocks at a time: the forward pass of scoring counts, tuned or not."
    pools = load_pools(corpus, tokenizer, 1024, {"calibration": 1024, "tuning": 1024, "scoring": 8192})
    for tuning in (0, 1024):
        config = SearchConfig(generations=1, offspring=2, stages=(Stage(1, tuning, 8192),), training=Training(batch_size=1))
        measured = sum(parameter.nbytes for parameter in tiny.parameters()) + peak_of_tensors(lambda: one_generation(tiny, database, pools, config))
        assert plan("tiny", config, seq_len=1024, dtype="float32").phases[1].memory_bytes == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("stage, post_tokens, named", [(Stage(1, 255, SEQ), SEQ, "255 tuning"), (Stage(1, 0, 1), SEQ, "scoring"), (Stage(1, 0, SEQ), 255, "255 tokens")])
def test_what_no_text_could_fill_is_refused(stage, post_tokens, named):
    "A plan of a job that would be refused is refused too; a little scoring is a shorter block."
    with pytest.raises(ValueError, match=named):
        plan("tiny", SearchConfig(stages=(stage,)), seq_len=SEQ, post_training=PostTraining(post_tokens, SEQ, batch_size=1))
    assert plan("tiny", SearchConfig(generations=1, offspring=1, stages=(Stage(1, 0, 100),)), seq_len=SEQ).phases[1].tokens == 300  # the offspring, its parent and the dense model


def test_planned_tokens_are_those_of_a_search(corpus, tokenizer, tiny, database):
    "Tokens of one generation, counted off real evaluations, with and without warm starts; the dense model's own scoring pass is one more per stage."
    stages = (Stage(2, 128, 128), Stage(1, 256, 64))
    pools = load_pools(corpus, tokenizer, 64, {"calibration": 64, "tuning": 512, "scoring": 512})
    for warm_start in (False, True):
        config = SearchConfig(generations=3, offspring=3, stages=stages, warm_start=warm_start)
        evaluations = [event for event in one_generation(tiny, database, pools, config) if hasattr(event, "fitness")]
        if not warm_start:
            tuned = sum(evaluation.tuning_tokens for evaluation in evaluations)
        else:  # what each candidate has seen at the end
            tuned = sum({evaluation.genome: evaluation.tuning_tokens for evaluation in evaluations}.values())
        scored = sum(evaluation.scoring_tokens for evaluation in evaluations) + sum(stage.scoring_tokens for stage in stages)
        assert plan("tiny", config, seq_len=64, dtype="float32").phases[1].tokens == 3 * (tuned + scored)


def test_memory_limit_and_device():
    "A limit on calibration memory costs passes, never more memory; a device gives times, and says what does not fit."
    free, limited = (plan("tiny", CONFIG, memory_bytes=limit) for limit in (None, 3_000_000))
    assert free.passes == 1 < limited.passes and limited.phases[0].memory_bytes < free.phases[0].memory_bytes
    stored = plan("tiny", CONFIG, memory_bytes=3_000_000, offload_bytes=10**9)
    assert stored.passes == 1 < stored.groups and stored.phases[0].memory_bytes <= 1.1 * limited.phases[0].memory_bytes and stored.phases[0].flops < limited.phases[0].flops
    slow, fast = (plan("tiny", CONFIG, post_training=PostTraining(10_000, 512), device=Device("d", 10**6, rate, rate)) for rate in (1e9, 2e9))
    assert [a.seconds for a in slow.phases] == pytest.approx([2 * b.seconds for b in fast.phases])
    assert len(slow.too_large()) == 3 and "search needs" in slow.too_large()[1]
    assert not free.too_large() and list(free.table().index) == ["level database", "search"]


def test_a_memory_limit_bounds_what_is_measured(tiny, pools, tmp_path):
    "One pass, stored states, one pass a group: each takes as much less as its plan says, and is predicted within 20 %."
    blocks, weights, peaks = pools["calibration"].blocks.long(), sum(parameter.nbytes for parameter in tiny.parameters()), []
    for limit in (None, 6_000_000, 3_000_000):
        planned = plan("tiny", CONFIG, calibration_tokens=blocks.numel(), seq_len=blocks.shape[1], dtype="float32", batch_size=2, memory_bytes=limit).phases[0].memory_bytes
        measured = weights + peak_of_tensors(lambda: build_database(tiny, blocks, tmp_path / str(limit), batch_size=2, memory_bytes=limit, progress=False))
        peaks.append((planned, measured))
        assert planned == pytest.approx(measured, rel=0.2)
    for planned, measured in peaks[1:]:
        assert peaks[0][1] - measured == pytest.approx(peaks[0][0] - planned, rel=0.1)


def test_full_size_model_is_planned_without_weights():
    "An 8B configuration is planned on the meta device; parameters are those of the published target within the tolerance."
    config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, dtype="bfloat16")
    assert meta_model(config).device.type == "meta"
    planned = plan(config, SearchConfig(Target(params=4_600_000_000, tolerance=0.02), offspring=16, stages=PUBLISHED_STAGES), calibration_tokens=16_800_000, seq_len=8192)
    assert planned.dense_params == 8_030_261_248 and planned.params == pytest.approx(4.6e9, rel=0.02)
    with pytest.raises(ValueError, match="outside what the grid can reach"):
        plan(config, SearchConfig(Target(params=10**12)))


@pytest.mark.parametrize("wrong", [{"seq_len": 0}, {"calibration_tokens": -5}])
def test_a_plan_needs_tokens(wrong):
    "No token, no plan."
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        plan("tiny", **wrong)
