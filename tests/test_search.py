"""A search keeps its budget, survives being killed anywhere, and refuses what it cannot do before it starts."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers import by, events, made_up, random_blocks, short_config, small_model, small_pools
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evoprune_nb import runlog as runlog_module
from evoprune_nb import search as search_module
from evoprune_nb.candidates import materialize
from evoprune_nb.data import load_pools
from evoprune_nb.judge.evaluation import evaluate
from evoprune_nb.genome import Genome
from evoprune_nb.database import build_database
from evoprune_nb.history import History
from evoprune_nb.machine import lock as lock_module
from evoprune_nb.machine.lock import DirectoryLock
from evoprune_nb.replay import replay
from evoprune_nb.runlog import EventLog, RunDiverged, read_state
from evoprune_nb.search import AllDisqualified, Search, SearchConfig
from evoprune_nb.selection import Elimination, Evaluation, Stage
from evoprune_nb.training import Training


def search_in(run_dir, small, config=None, pools=None, evaluator=None) -> Search:
    "A search on a small model, with real evaluations."
    return Search(run_dir, *small, pools or small_pools(), config or short_config(), evaluator)


def fake_search(run_dir, small, config=None, evaluate=made_up) -> Search:
    "The same with evaluations that cost nothing."
    return search_in(run_dir, small, config, evaluator=by(evaluate))


def unexpected(*_):
    raise AssertionError("evaluated again")


@pytest.fixture(scope="module")
def faked(small, tmp_path_factory):
    "A finished run with made-up fitness: directory, winner."
    run_dir = tmp_path_factory.mktemp("faked") / "run"
    return run_dir, fake_search(run_dir, small).run(progress=False)


@pytest.fixture(scope="module")
def real(small, tmp_path_factory):
    "A finished run with real evaluations and held-out tracking: directory, winner."
    run_dir = tmp_path_factory.mktemp("real") / "run"
    return run_dir, search_in(run_dir, small, short_config(heldout_tokens=64)).run(progress=False)


def cut(run: Path, copy: Path, size: int) -> Path:
    "A copy of a run as if the process was killed when its log had `size` bytes."
    copy.mkdir()
    (copy / "config.json").write_bytes((run / "config.json").read_bytes())
    (copy / "events.jsonl").write_bytes((run / "events.jsonl").read_bytes()[:size])
    return copy


def test_a_run_killed_at_any_byte_continues_to_the_same_end(small, faked, tmp_path, monkeypatch):
    "Cut at every end of a line, one byte around it, and every 41 bytes: the reopened run writes the same events and finds the same genome, and repeats no whole evaluation."
    monkeypatch.setattr(os, "fsync", lambda _: None)
    run_dir, winner = faked
    log, expected = (run_dir / "events.jsonl").read_bytes(), events(run_dir)
    ends = [i + 1 for i, byte in enumerate(log) if byte == 10]
    sizes = {size + d for size in ends for d in (-1, 0, 1)} | set(range(0, len(log), 41))
    for size in sorted(size for size in sizes if size <= len(log)):
        copy, evaluated = cut(run_dir, tmp_path / str(size), size), []
        search = fake_search(copy, small, evaluate=lambda *task: evaluated.append(task) or made_up(*task))
        assert search.run(progress=False) == winner and search.finished, size
        assert events(copy) == expected, size
        recorded = sum(line.startswith(b'{"event": "evaluation"') for line in log[:size].split(b"\n")[:-1])
        assert len(evaluated) == sum(row["event"] == "evaluation" for row in expected) - recorded, size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(cuts=st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_killed_again_and_again(small, faked, tmp_path_factory, monkeypatch, cuts):
    "Several kills one after the other, each at some byte of what was there by then, change nothing."
    monkeypatch.setattr(os, "fsync", lambda _: None)
    run_dir, winner = faked
    copy = cut(run_dir, tmp_path_factory.mktemp("cut") / "run", 0)
    for share in cuts:
        search = fake_search(copy, small)
        for _ in range(12):
            search.step()
        os.truncate(copy / "events.jsonl", int(share * (copy / "events.jsonl").stat().st_size))
    assert fake_search(copy, small).run(progress=False) == winner
    assert events(copy) == events(run_dir)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.8, 0.99])
def test_real_evaluations_resume_to_the_same_numbers(small, real, tmp_path, share):
    "With real tuning and scoring, and a held-out loss per generation, the numbers after a resume are bitwise those of the run never killed."
    run_dir, winner = real
    copy = cut(run_dir, tmp_path / "cut", int(share * (run_dir / "events.jsonl").stat().st_size))
    assert search_in(copy, small, short_config(heldout_tokens=64)).run(progress=False) == winner
    assert events(copy) == events(run_dir)


@pytest.mark.parametrize("warm_start", [False, True])
def test_evaluated_side_by_side_the_search_is_the_same(small, tmp_path, warm_start):
    "One candidate at a time or three with a core each, interrupted and resumed in the middle of a stage, with a command in between: the same events."
    command, threads = {"command": "set", "setting": "offspring", "value": 5, "when": "now"}, torch.get_num_threads()

    def steered(run_dir, n_jobs, cut_at=None):
        def begun():
            return search_in(run_dir, small, short_config(warm_start=warm_start, n_jobs=n_jobs))

        search = begun()
        for i in range(7):
            if i == 3:
                search.send(command)
            if i == cut_at:
                search.engine.evaluations.close()
                search = begun()
            search.step()
        return search.run(progress=False)

    try:
        torch.set_num_threads(1)
        winner = steered(tmp_path / "alone", 1)
        for name, n_jobs, cut_at in (("three", 3, None), ("resumed", 3, 6), ("four", 4, None)):
            assert steered(tmp_path / name, n_jobs, cut_at) == winner
            assert events(tmp_path / name) == events(tmp_path / "alone")
    finally:
        torch.set_num_threads(threads)
    assert "abandoned" in {row["event"] for row in events(tmp_path / "alone")}
    with pytest.raises(ValueError, match="n_jobs"):
        search_in(tmp_path / "three", small, short_config(warm_start=warm_start))


def test_an_error_beside_others_stops_the_search_as_one_alone(small, tmp_path, monkeypatch):
    "When an evaluation fails, those beside it are ended, the log keeps what was finished, and the search goes on from there."
    config, real, calls = short_config(n_jobs=2), search_module.Evaluator.evaluate, []

    def failing(self, *task):
        calls.append(task)
        if len(calls) == 4:
            raise RuntimeError("no memory left")
        return real(self, *task)

    monkeypatch.setattr(search_module.Evaluator, "evaluate", failing)
    search = search_in(tmp_path / "run", small, config)
    with pytest.raises(RuntimeError, match="no memory left"):
        search.run(progress=False)
    assert search.status == "failed" and sum(row["event"] == "evaluation" for row in events(tmp_path / "run")) == 3
    winner = search.run(progress=False)
    assert winner == search_in(tmp_path / "plain", small, config).run(progress=False) and events(tmp_path / "run") == events(tmp_path / "plain")


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from helpers import short_config, small_model, small_pools
from evoprune_nb.database import LevelDatabase
from evoprune_nb.search import Search
model = small_model("llama-gqa")
search = Search(sys.argv[3], model, LevelDatabase(sys.argv[2], model), small_pools(), short_config(heldout_tokens=64))
while search.step() is not None:
    time.sleep(0.05)
"""


def test_a_killed_process(small, real, tmp_path):
    "SIGKILL to another process in mid-run; the run reopened here ends like the one never killed."
    run_dir, winner = real
    log, arguments = tmp_path / "run" / "events.jsonl", [str(Path(__file__).parent), str(small[1].directory), str(tmp_path / "run")]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    while child.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 15):
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not History(log.parent).finished
    assert search_in(log.parent, small, short_config(heldout_tokens=64)).run(progress=False) == winner
    assert events(log.parent) == events(run_dir)


def test_killed_before_anything_was_written_whole(small, faked, tmp_path):
    "What a kill leaves of the very first write, or of a state's, is no reason to refuse the directory."
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json.tmp").write_text('{"config": {"spar')
    assert fake_search(tmp_path / "first", small).run(progress=False) == faked[1]
    copy = cut(faked[0], tmp_path / "later", 500)
    (copy / "state.json.tmp").write_text('{"sta')
    (copy / "state.json").write_text('{"status": "runn')
    assert fake_search(copy, small).run(progress=False) == faked[1]
    assert json.loads((copy / "state.json").read_text())["status"] == "finished"


def test_a_finished_run_is_not_searched_again(small, real, monkeypatch):
    "Reopened, a finished run gives its winner without an evaluation, and its files stay as they are (but for time and memory in state.json)."
    run_dir, winner = real
    files = lambda: {path.name: path.read_bytes() if path.name != "state.json" else json.loads(path.read_text()) | {"time": 0, "memory_bytes": 0} for path in run_dir.iterdir()}
    before = files()
    search = search_in(run_dir, small, short_config(heldout_tokens=64), evaluator=by(unexpected))
    monkeypatch.setattr(search_module, "heldout_loss", unexpected)
    assert search.run(progress=False) == winner and search.finished and search.step() is None
    assert files() == before


def test_an_interrupted_search_does_not_pass_for_a_finished_one(small, faked, tmp_path):
    "After Ctrl-C in an evaluation the same object, run again, either goes on to the right end or says that it cannot; it never returns the unfinished parent."
    interrupting = []

    def evaluate(*task):
        if interrupting:
            raise interrupting.pop()
        return made_up(*task)

    search = fake_search(tmp_path / "run", small, evaluate=evaluate)
    for _ in range(5):
        search.step()
    interrupting.append(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        search.run(progress=False)
    try:
        assert search.run(progress=False) == faked[1] and search.finished
    except RuntimeError:
        pass
    assert fake_search(tmp_path / "run", small).run(progress=False) == faked[1]


def tampered(run_dir: Path, copy: Path, change) -> Path:
    "A copy of a run in which `change` was applied to the first event that it accepts."
    cut(run_dir, copy, 0)
    rows = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    next(row for row in rows if change(row))
    (copy / "events.jsonl").write_text("".join(json.dumps(row | {"crc": None}) + "\n" for row in rows))  # no checksums, as in version 0.1
    return copy


@pytest.mark.parametrize("garbage", [b"\0", b"\xff", b"{", b"[]", b"7", b""])
def test_a_damaged_log_is_refused_by_byte(small, faked, tmp_path, garbage):
    "A whole line that is no event is an error that names file and byte, for readers and before any work; cut off there, the run continues to the same end."
    log = (faked[0] / "events.jsonl").read_bytes()
    lines = log.splitlines(keepends=True)
    at = sum(map(len, lines[:7]))
    copy = cut(faked[0], tmp_path / "copy", 0)
    (copy / "events.jsonl").write_bytes(log[:at] + garbage + b"\n" + log[at + len(lines[7]) :])
    for opened in (History, lambda run_dir: fake_search(run_dir, small)):
        with pytest.raises(ValueError, match=rf"events.jsonl is damaged: the line at byte {at:,} is no event .*cut it off at {at} bytes"):
            opened(copy)
    os.truncate(copy / "events.jsonl", at)
    assert fake_search(copy, small).run(progress=False) == faked[1] and events(copy) == events(faked[0])


@pytest.mark.parametrize("event, key, value, message", [
    ("evaluation", "genome", "333/555", "genome"), ("generation", "parent", "000/000", "parent"), ("evaluation", "stage", 1, "stage"),
    ("run_started", "event", "generation", "event"), ("elimination", "survivors", [], "survivors"), ("survivor", "genome", "000/000", "genome"), ("evaluation", "fitness", None, "survivors|eliminated")])
def test_a_log_that_this_search_cannot_have_written(small, faked, tmp_path, event, key, value, message):
    "A record that contradicts what the search would do stops it, and says in what; nothing is appended to it."
    change = lambda row: row["event"] == event and row[key] != value and (row.update({key: value} | ({"disqualified": "x"} if key == "fitness" else {})) or True)
    copy = tampered(faked[0], tmp_path / "copy", change)
    before = (copy / "events.jsonl").read_bytes()
    with pytest.raises(RunDiverged, match=f"another .*({message})"):
        fake_search(copy, small).run(progress=False)
    assert (copy / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize("changes, named", [
    (dict(seed=1), r"config.seed \(0 there, 1 here\)"), (dict(generations=4), r"config.generations \(3 there, 4 here\)"), (dict(training=Training(lr=2e-3, batch_size=2)), "config.training"),
    (dict(stages=(Stage(1, 0, 32),)), "config.stages"), (dict(seed=1, fitness="perplexity"), "config.fitness .*; config.seed")])
def test_other_settings_are_refused(small, faked, changes, named):
    "A run directory opened with other settings names each that differs, with both values, and changes nothing."
    before = {path: path.read_bytes() for path in faked[0].iterdir()}
    with pytest.raises(ValueError, match=f"holds a different search: .*{named}"):
        search_in(faked[0], small, short_config(**changes))
    assert {path: path.read_bytes() for path in faked[0].iterdir()} == before


def test_another_model_or_other_text_is_refused(small, faked, tmp_path):
    "So does one opened with another model, grid or text."
    other = small_model("llama-gqa", seed=1)
    with pytest.raises(ValueError, match="different search: fingerprints.model"):
        search_in(faked[0], (other, build_database(other, random_blocks(), tmp_path / "other", progress=False)))
    with pytest.raises(ValueError, match="different search: fingerprints.space"):
        search_in(faked[0], (small[0], build_database(small[0], random_blocks(), tmp_path / "grid", n_levels=8, progress=False)))
    pools = small_pools()
    with pytest.raises(ValueError, match=r"different search: fingerprints.scoring \('\w{16}' there, '\w{16}' here\)\."):
        search_in(faked[0], small, pools=pools | {"scoring": replace(pools["scoring"], blocks=pools["scoring"].blocks.flip(0))})


def test_unusable_directories_are_refused(small, tmp_path):
    "A directory with other files, and one that cannot be made, are errors that name it; nothing is written."
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(ValueError, match="thesis is not empty .chapter1.tex. and holds no search"):
        search_in(tmp_path / "thesis", small)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file/below/run cannot be written"):
        search_in(tmp_path / "file" / "below" / "run", small)
    with pytest.raises((ValueError, NotADirectoryError), match="file"):
        search_in(tmp_path / "file", small)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chapter1.tex", "file", "thesis"]


@pytest.mark.parametrize("changes, message", [
    (dict(sparsity=1.2), r"sparsity, a share of the structures, must be .*from 0 to 1; got 1.2"), (dict(sparsity=-0.1), "got -0.1"),
    (dict(sparsity=None, params=10), r"10 parameters are outside what the grid can reach: [\d,]+ to [\d,]+"), (dict(sparsity=0.5, params=10), "either sparsity or params"),
    (dict(sparsity=1.0), r"only 0 of 4 distinct offspring"), (dict(operator="crossover"), "'crossover' is unknown"), (dict(fitness="bleu"), "'bleu' is unknown"),
    (dict(stages=(Stage(1, 2048, 32),)), "asked for 2,048 tuning tokens, but there are 1,024"), (dict(heldout_tokens=2048), "asked for 2,048 heldout tokens")])
def test_impossible_settings_are_noticed_before_any_work(small, tmp_path, changes, message):
    "What cannot work is an error with the range or the names that would; no run directory appears."
    with pytest.raises(ValueError, match=message):
        search_in(tmp_path / "run", small, short_config(**changes))
    assert not (tmp_path / "run").exists()


def test_generations_must_be_positive():
    "No generation is no search."
    with pytest.raises(ValueError, match="generations must be a whole number of at least 1; got 0"):
        short_config(generations=0)


def test_seed_determines_the_genomes(small, faked, tmp_path):
    "The same seed gives the same events in another directory, another seed other offspring."
    fake_search(tmp_path / "again", small).run(progress=False)
    fake_search(tmp_path / "other", small, short_config(seed=1)).run(progress=False)
    assert events(tmp_path / "again") == events(faked[0])
    offspring = lambda run_dir: next(row["offspring"] for row in events(run_dir) if row["event"] == "generation")
    assert offspring(tmp_path / "other") != offspring(faked[0])


@pytest.mark.parametrize("changes", [dict(sparsity=0.3), dict(sparsity=None, params=60_000, tolerance=0.05), dict(seed=3, max_swaps=5)])
def test_every_evaluated_genome_keeps_the_budget(small, tmp_path, changes):
    "All candidates have at most the target and at least the tolerated number of parameters, counted on the model itself."
    config = short_config(generations=6, **changes)
    search = fake_search(tmp_path / "run", small, config)
    search.run(progress=False)
    codes, target = set(History(tmp_path / "run").evaluations.genome), search.budget.limits["params"]
    assert target == (config.target.params or search.space.n_params(search.start)) and len(codes) > 10
    for code in codes:
        n_params = sum(p.numel() for p in materialize(*small, Genome.parse(code), trainable=False).parameters())
        assert target * (1 - config.target.tolerance) <= n_params <= target


def test_order_of_events(faked):
    "Offspring differ from each other and their parent; each generation's parent is the survivor before it, elitist on equal tokens."
    rows = events(faked[0])
    assert rows[0]["event"] == "run_started" and rows[-1]["event"] == "finished" and sum(row["event"] == "finished" for row in rows) == 1
    parent = rows[0]["start"]
    for generation in range(3):
        mine = [row for row in rows if row.get("generation") == generation]
        assert [row["event"] for row in mine] == ["generation"] + ["evaluation"] * 4 + ["elimination"] + ["evaluation"] * (len(mine) - 8) + ["elimination", "survivor"]
        assert mine[0]["parent"] == parent and len({parent, *mine[0]["offspring"]}) == 5
        last = [(math.inf if row["fitness"] is None else row["fitness"], row["genome"]) for row in mine if row["event"] == "evaluation" and row["stage"] == 1]
        assert parent in [genome for _, genome in last]
        parent = mine[-1]["genome"]
        assert min(last)[0] == math.inf or (mine[-1]["fitness"], parent) == min(last)
    assert rows[-1]["genome"] == parent


def test_progress_by_step_and_by_run_is_the_same(small, faked, tmp_path, capsys):
    "step() does one evaluation or elimination at a time and then None; run() shows a bar on the error stream that ends full."
    search, seen = fake_search(tmp_path / "steps", small), []
    while (happened := search.step()) is not None:
        seen.append(happened)
    rows = events(faked[0])
    assert events(tmp_path / "steps") == rows and search.parent == faked[1]
    assert [type(e).__name__.lower() for e in seen] == [row["event"] for row in rows if row["event"] in ("evaluation", "elimination")]
    assert {type(e) for e in seen} == {Evaluation, Elimination}
    fake_search(tmp_path / "run", small).run()
    captured = capsys.readouterr()
    assert "generation 3/3, stage 2" in captured.err and captured.out == ""


@pytest.mark.parametrize("lr, stages", [(1e30, (Stage(2, 0, 32), Stage(1, 96, 32))), (1e30, (Stage(2, 96, 32), Stage(1, 96, 32)))])
def test_a_generation_that_disqualifies_everybody_stops_the_search(small, tmp_path, lr, stages):
    "Training that explodes for all ends the first generation with its reason and JSON that is JSON; after a lower learning rate the search goes on to the end, and is replayed."
    config = short_config(stages=stages, training=Training(lr=lr, batch_size=2))
    search = search_in(tmp_path / "run", small, config)
    with pytest.raises(AllDisqualified, match="generation 1: all candidates .* disqualified.*non-finite training loss.*Lower the learning rate.*with a `set` command"):
        search.run(progress=False)
    history = History(tmp_path / "run")
    assert search.status == history.state["status"] == "failed" and "AllDisqualified" in history.state["error"] and not history.finished
    tuned = history.abandoned.query("stage == 1")
    assert set(tuned.disqualified) == {"non-finite training loss"} and tuned.fitness.isna().all() and history.survivors.empty
    for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    resumed = search_in(tmp_path / "run", small, config)
    resumed.send({"command": "set", "setting": "lr", "value": 1e-3})
    winner = resumed.run(progress=False)
    history.refresh()
    assert resumed.finished and history.finished and history.survivors.fitness.notna().all() and len(history.survivors) == 3
    assert history.generations.status.tolist() == ["abandoned"] + 3 * ["finished"]
    assert replay(tmp_path / "run", tmp_path / "again", *small, small_pools(), progress=False) == winner
    assert events(tmp_path / "again") == events(tmp_path / "run")


def test_without_a_change_everybody_is_disqualified_again(small, tmp_path):
    "A new start begins the generation anew, in this process and in another; killed after any event, too."
    config = short_config(stages=(Stage(2, 0, 32), Stage(1, 96, 32)), training=Training(lr=1e30, batch_size=2))
    search = search_in(tmp_path / "run", small, config)
    for n, begun in enumerate((search, search, search_in(tmp_path / "run", small, config)), 1):
        with pytest.raises(AllDisqualified):
            begun.run(progress=False)
        assert [row["event"] for row in events(tmp_path / "run")].count("abandoned") == n
    log = (tmp_path / "run" / "events.jsonl").read_bytes().splitlines(keepends=True)
    for n_lines in range(1, len(log) // 3):
        copy = cut(tmp_path / "run", tmp_path / str(n_lines), len(b"".join(log[:n_lines])))
        with pytest.raises(AllDisqualified):
            search_in(copy, small, config).run(progress=False)


def test_a_run_of_version_0_1_went_on_with_the_parent(small, tmp_path):
    "A log in which generations without a survivor end with the parent is played back to the end that it had."
    config = short_config(stages=(Stage(2, 0, 32), Stage(1, 0, 32)))
    nobody = lambda genome, generation, stage: made_up(genome, generation, stage) if generation else replace(made_up(genome, generation, stage), fitness=math.inf, disqualified="x")
    search = fake_search(tmp_path / "run", small, config, nobody)
    with pytest.raises(AllDisqualified):
        search.run(progress=False)
    log = tmp_path / "run" / "events.jsonl"
    rows = [json.loads(line) | {"crc": None} for line in log.read_text().splitlines()]
    survivor = {"event": "survivor", "generation": 0, "genome": search.start.code, "fitness": None, "n_params": search.space.n_params(search.start), "time": 0}
    log.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:-1], survivor]))
    search = fake_search(tmp_path / "run", small, config, nobody)
    search.run(progress=False)
    history = History(tmp_path / "run")
    assert history.finished and history.survivors.fitness.isna().tolist() == [True, False, False]


CREATES = """
import sys, time
sys.path.insert(0, sys.argv[1])
from helpers import by, made_up, short_config, small_model, small_pools
from evoprune_nb.database import LevelDatabase
from evoprune_nb.search import Search
model, pools = small_model("llama-gqa"), small_pools()
database = LevelDatabase(sys.argv[2], model)
print("ready", flush=True)
for run_dir in sys.stdin:
    try:
        Search(run_dir.strip(), model, database, pools, short_config(seed=int(sys.argv[3]), generations=1), by(made_up)).run(progress=False)
        print("done", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


def test_two_searches_in_one_new_directory(small, tmp_path):
    "Started at the same moment with different seeds, one makes the run and the other is refused; the run is one search's from its first byte on."
    arguments = [sys.executable, "-c", CREATES, str(Path(__file__).parent), str(small[1].directory)]
    children = [subprocess.Popen([*arguments, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ) for seed in (0, 1)]
    try:
        assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
        for n in range(30):
            for child in children:
                child.stdin.write(f"{tmp_path / str(n)}\n")
            for child in children:
                child.stdin.flush()
            said = [child.stdout.readline() for child in children]
            assert [text == "done\n" for text in said].count(True) == 1, said
            seed = said.index("done\n")
            assert "is being written by" in said[1 - seed] or "holds a different search: config.seed" in said[1 - seed]
            assert search_in(tmp_path / str(n), small, short_config(seed=seed, generations=1)).finished
    finally:
        for child in children:
            child.kill()
            child.wait()


@pytest.mark.parametrize("at", range(1, 40, 3))
def test_a_full_disk(small, faked, tmp_path, monkeypatch, at):
    "From any write on, nothing can be written, half lines apart: the search fails with the disk's error, does not pass for running, frees the lock, and goes on to the same end when there is room."
    monkeypatch.setattr(os, "fsync", lambda _: None)
    search, writes = fake_search(tmp_path / "run", small), []
    append, write = EventLog._append, runlog_module.write_json

    def full() -> bool:
        writes.append(1)
        return at <= len(writes) < 1000

    def appended(log, line):
        if full():
            with open(log.path, "ab") as file:
                file.write(line[:9])
            raise OSError(28, "No space left on device")
        append(log, line)

    def written(path, value):
        if full():
            raise OSError(28, "No space left on device")
        write(path, value)

    monkeypatch.setattr(EventLog, "_append", appended)
    monkeypatch.setattr(runlog_module, "write_json", written)
    for _ in range(2):  # the second start finds the disk as full as the first left it
        with pytest.raises(OSError, match="No space left"):
            search.run(progress=False)
        assert search.status == "failed" and (read_state(tmp_path / "run") or {"status": "stopped"})["status"] in ("stopped", "failed")
        with DirectoryLock(tmp_path / "run"):
            pass
    writes += 1000 * [1]
    assert search.run(progress=False) == faked[1] and search.finished and events(tmp_path / "run") == events(faked[0])
    assert read_state(tmp_path / "run")["status"] == "finished"


def test_a_full_disk_at_the_lock(small, tmp_path, monkeypatch):
    "A lock that cannot leave its note is free again: the run is not busy for ever, and is made when there is room."
    monkeypatch.setattr(lock_module, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="run cannot be written: .*No space left"):
        search_in(tmp_path / "run", small)
    monkeypatch.undo()
    search = fake_search(tmp_path / "run", small)
    monkeypatch.setattr(lock_module, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        search.run(progress=False)
    monkeypatch.undo()
    assert search.run(progress=False) and search.finished


LIMITED = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from helpers import by, made_up, short_config, small_model, small_pools
from evoprune_nb.database import LevelDatabase
from evoprune_nb.search import Search
model = small_model("llama-gqa")
search = Search(sys.argv[3], model, LevelDatabase(sys.argv[2], model), small_pools(), short_config(), by(made_up))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
for n in range(200, 2600, 400):
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, unlimited[1]))
    try:
        search.run(progress=False)
    except OSError as error:
        print(error.strerror, search.status)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
search.run(progress=False)
print("ended", search.status)
"""


def test_a_disk_that_fills_up_for_real(small, faked, tmp_path):
    "With a limit on file sizes, as the system enforces it, the same process fails again and again, and then ends as if nothing had been."
    pytest.importorskip("resource")
    arguments = [str(Path(__file__).parent), str(small[1].directory), str(tmp_path / "run")]
    said = subprocess.run([sys.executable, "-c", LIMITED, *arguments], check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
    assert said == 6 * ["File too large failed"] + ["ended finished"]
    assert events(tmp_path / "run") == events(faked[0])


def test_wrong_arguments_do_not_claim_the_directory(small, tmp_path):
    "After a call that is refused, whatever is wrong with it, the corrected one is taken."
    for wrong in (dict(source={"text": object()}), dict(config=short_config(sparsity=1.0)), dict(pools={}), dict(config=short_config(heldout_tokens=10**6))):
        with pytest.raises((ValueError, TypeError)):
            Search(tmp_path / "run", *small, **{"pools": small_pools(), "config": short_config(), **wrong})
        assert not (tmp_path / "run").exists()
    assert search_in(tmp_path / "run", small, short_config(seed=1)).generation == 0


def test_the_search_goes_on_without_a_disqualified_candidate(small, tmp_path, monkeypatch):
    "One candidate whose training fails is recorded and falls; the others are untouched by it."
    evaluation_of, calls = search_module.Evaluator.evaluate, []

    def fails_once(self, *task):
        evaluation = evaluation_of(self, *task)
        calls.append(evaluation)
        return replace(evaluation, fitness=math.inf, disqualified="made to fail") if len(calls) == 2 else evaluation

    monkeypatch.setattr(search_module.Evaluator, "evaluate", fails_once)
    search_in(tmp_path / "run", small).run(progress=False)
    frame = History(tmp_path / "run").evaluations
    assert list(frame.index[frame.disqualified != ""]) == [1] and not frame.survived[1]
    assert frame.fitness.drop(1).notna().all() and len(frame) == 3 * (4 + 3)


def test_history_of_an_empty_a_partial_and_a_finished_run(small, real, tmp_path):
    "The frames have the same columns at every moment; what is open is missing, and tokens are those of the stages."
    config = short_config(heldout_tokens=64)
    search = search_in(tmp_path / "run", small, config)
    empty = History(tmp_path / "run")
    assert empty.evaluations.empty and empty.survivors.empty and not empty.finished and empty.winner == empty.start == search.start
    assert empty.tokens == {"tuning": 0, "scoring": 0} and empty.config == config and empty.space == search.space
    for _ in range(4 + 1 + 3):  # all evaluations of the first generation, and its first elimination
        search.step()
    with open(tmp_path / "run" / "events.jsonl", "a") as file:
        file.write('{"event": "evaluation", "gen')  # being written just now
    partial, finished = History(tmp_path / "run"), History(real[0])
    assert list(empty.evaluations.columns) == list(partial.evaluations.columns) == list(finished.evaluations.columns)
    assert list(empty.survivors.columns) == list(finished.survivors.columns)
    assert partial.evaluations.survived.tolist()[4:] == [None] * 3 and sum(partial.evaluations.survived.tolist()[:4]) == 2
    assert partial.winner == search.start and not partial.finished and partial.evaluations.is_parent.tolist() == [False] * 6 + [True]
    assert partial.tokens == {"tuning": 3 * 64, "scoring": 4 * 32 + 3 * 48}
    assert finished.finished and finished.winner == real[1] and len(finished.survivors) == 3 and finished.start == search.start
    assert finished.tokens == {"tuning": 3 * 3 * 64, "scoring": 3 * (4 * 32 + 3 * 48)}
    assert finished.survivors.n_params.tolist() == [finished.space.n_params(Genome.parse(code)) for code in finished.survivors.genome]
    with pytest.raises(ValueError, match="is no run directory"):
        History(tmp_path)


def test_heldout_loss_is_that_of_the_untuned_survivor(small, real):
    "What is tracked is the loss, on the held-out pool, of the survivor as it comes from the database."
    model, database = small
    pools = small_pools()
    blocks = pools["heldout"].draw(64, search_module.derive_seed("heldout"))
    for row in History(real[0]).survivors.itertuples():
        with torch.no_grad():
            loss = materialize(model, database, Genome.parse(row.genome))(blocks, labels=blocks).loss.item()
        assert row.heldout_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("config", [SearchConfig(), short_config(), short_config(sparsity=None, params=60_000, heldout_tokens=64, training=Training(optimizer="SGD", schedule="cosine"))])
def test_settings_survive_json(config):
    "A configuration read back from JSON is the same configuration."
    assert SearchConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_provenance_is_recorded(real):
    "config.json says with what versions, on what machine and from which start the run was made."
    settings = json.loads((real[0] / "config.json").read_text())
    assert settings["provenance"]["packages"]["torch"] == metadata.version("torch") and {"python", "machine", "device", "git_revision"} <= set(settings["provenance"])
    assert Genome.parse(settings["start"]) == History(real[0]).start


def test_log_of_whole_lines_only(tmp_path):
    "Opening a log cuts off an unfinished last line and nothing else, and returns recorded events before it computes."
    log = EventLog(tmp_path / "log")
    for n in range(3):
        log.event("throw", {"n": n}, lambda: {"eyes": "⚅ é\n"})
    whole = log.path.read_bytes()
    for size in range(len(whole) + 1):
        log.path.write_bytes(whole[:size])
        assert len(EventLog(log.path).recorded) == whole[:size].count(b"\n")
        assert log.path.read_bytes() == whole[: whole[:size].rfind(b"\n") + 1]


def test_a_search_on_the_tiny_model_lowers_the_loss(tiny, tokenizer, database, corpus, tmp_path):
    "On real text, a short search finds a model of equal size that is better than the uniform one on text it never saw."
    pools = load_pools(corpus, tokenizer, seq_len=64, tokens={"tuning": 4096, "scoring": 4096, "heldout": 4096})
    config = SearchConfig(generations=4, offspring=4, stages=(Stage(2, 0, 512), Stage(1, 256, 1024)), training=Training(lr=1e-3))
    search = Search(tmp_path / "run", tiny, database, pools, config)
    winner = search.run(progress=False)
    uniform, evolved = (evaluate(materialize(tiny, database, genome), pools["heldout"], tokenizer) for genome in (search.start, winner))
    assert evolved.nats < uniform.nats and uniform.n_params * 0.99 <= evolved.n_params <= uniform.n_params
    interrupted = Search(tmp_path / "cut", tiny, database, pools, config)
    for _ in range(26):
        interrupted.step()
    assert Search(tmp_path / "cut", tiny, database, pools, config).run(progress=False) == winner
    assert events(tmp_path / "cut") == events(tmp_path / "run")


@pytest.mark.parametrize("wrong, message", [
    (dict(sparsity=1.5), "0 to 1"), (dict(stages=(Stage(1, 0, 10**9),)), "scoring tokens"), (dict(stages=(Stage(1, 10**9, 64),)), "tuning tokens"), (dict(offspring=10**6), "distinct offspring")])
def test_check_search_finds_errors_before_the_database(small, wrong, message):
    "What would stop a search is known from model, text and settings alone."
    from evoprune_nb.search import check_search

    if "offspring" in wrong:
        wrong = wrong | dict(tolerance=0.0, max_swaps=1, offspring=40, stages=(Stage(1, 0, 64),))
    with pytest.raises(ValueError, match=message):
        check_search(small[0], small_pools(), short_config(**wrong))
    check_search(small[0], small_pools(), short_config())


def test_other_database_is_refused(small, tmp_path):
    "A run belongs to one database: the same model and grid from other calibration text is another one."
    model, database = small
    search = Search(tmp_path / "run", model, database, small_pools(), short_config())
    search.step()
    other = build_database(model, random_blocks(4, 32, seed=9), tmp_path / "other", n_levels=10, progress=False)
    with pytest.raises(ValueError, match="holds a different search.*fingerprints"):
        Search(tmp_path / "run", model, other, small_pools(), short_config())
