"""What a history shows is what the log says: at every byte of it, at every moment, on every branch, whoever writes it."""
import json
import subprocess
import sys

import pandas as pd
import pytest
from evoprune_nb import warm_start as warm_start_module
from helpers import by, events, made_up, short_config, small_pools

from evoprune_nb.history import History
from evoprune_nb.runlog import STATUSES, read_events, read_state, write_state
from evoprune_nb.search import Search
from evoprune_nb.selection import Stage
from evoprune_nb.config import ActiveConfig, forward_tokens, generation_tokens

FRAMES = ("evaluations", "abandoned", "survivors", "generations", "commands", "notes")


def search_in(run_dir, small, config=None, evaluator=made_up) -> Search:
    return Search(run_dir, *small, small_pools(), config or short_config(), by(evaluator))


def steps(search: Search, n: int) -> None:
    for _ in range(n):
        search.step()


@pytest.fixture(scope="module")
def steered(small, tmp_path_factory):
    "A finished run with an abandoned generation, a moved target, an injected genome, two branches, notes, and a refused command."
    run_dir = tmp_path_factory.mktemp("steered") / "run"
    search = search_in(run_dir, small, short_config(generations=4))
    search.send({"command": "note", "text": "begin"})
    steps(search, 6)
    search.send({"command": "set", "setting": "sparsity", "value": 0.4, "when": "now"})
    steps(search, 12)
    with search.driving():
        search.engine.apply({"command": "inject", "genome": search.start.code, "when": "next"})  # of the old size by now
    search.send({"command": "branch", "generation": 1})
    search.send({"command": "set", "setting": "offspring", "value": 5})
    while (search.position.branch, search.generation) != (1, 3):
        search.step()
    steps(search, 2)
    search.send({"command": "branch", "generation": 2})
    search.send({"command": "note", "text": "third way"})
    search.run(progress=False)
    return run_dir


def same(a: History, b: History) -> None:
    "All that two histories show is equal."
    for name in FRAMES:
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name))
    for name in ("events", "line", "branch", "generation", "rules", "rules_in_force", "winner", "finished", "tokens", "seconds", "planned_tokens", "progress"):
        assert getattr(a, name) == getattr(b, name), name


def copied(run_dir, copy, size: int):
    copy.mkdir(exist_ok=True)
    (copy / "config.json").write_bytes((run_dir / "config.json").read_bytes())
    (copy / "events.jsonl").write_bytes((run_dir / "events.jsonl").read_bytes()[:size])
    return copy


def test_read_while_it_grows(steered, tmp_path):
    "Refreshed after every 61 bytes, half lines included, a history shows what a new one shows; refresh tells whether there was anything new."
    log = (steered / "events.jsonl").read_bytes()
    history = History(copied(steered, tmp_path / "run", 0))
    assert not history.refresh() and history.evaluations.empty and history.winner == history.start and history.line == [] and history.progress[2] is None
    for size in [*range(61, len(log), 61), len(log)]:
        before = len(history.events)
        copied(steered, tmp_path / "run", size)
        assert history.refresh() == (log[:size].count(b"\n") > before) and len(history.events) == log[:size].count(b"\n")
        if size % 5 == 0 or size == len(log):
            same(history, History(tmp_path / "run"))
    same(history, History(steered))
    copied(steered, tmp_path / "run", 0)  # begun anew
    assert history.refresh() and history.events == [] and history.evaluations.empty


def test_as_it_was(steered, tmp_path):
    "`at` is the history of the log cut after that generation's survivor, on any branch, and stays so; what has not ended has no such moment."
    history, log = History(steered), (steered / "events.jsonl").read_bytes().splitlines(keepends=True)
    ended = [(row.get("branch", 0), row["generation"], index) for index, row in enumerate(history.events) if row["event"] == "survivor"]
    assert len(ended) == len(history.survivors) == 5
    for branch, generation, index in ended:
        past = history.at(generation, branch)
        same(past, History(copied(steered, tmp_path / f"{branch}.{generation}", len(b"".join(log[: index + 1])))))
        assert past.line[-1] == (branch, generation) and past.branch == branch and not past.finished and not past.refresh() and past.state["status"] == "stopped"
    assert history.at(1).line[-1] == history.line[1] and history.at(0).rules.offspring == 4
    assert past.at(0).line == [(0, 0)]
    for wrong in (dict(generation=4), dict(generation=-1), dict(generation=2, branch=0), dict(generation=0, branch=1)):
        with pytest.raises(ValueError, match="has not ended; the line to the present has 0, 1, 2, 3"):
            history.at(**wrong)
    with pytest.raises(ValueError, match="no finished generation yet"):
        History(copied(steered, tmp_path / "new", 0)).at(0)


def test_lines_and_branches(steered):
    "The line leads from the start to the winner: each parent is the survivor before it, or that fitted to a new budget."
    history = History(steered)
    assert history.line == [(0, 0), (1, 1), (2, 2), (2, 3)] and history.branch == 2 and history.finished
    rows = history.generations[history.generations.status == "finished"].set_index(["branch", "generation"])
    parent = history.start.code
    for place in history.line:
        row = rows.loc[place]
        assert row.parent == parent or [change["unit"] for change in row.retarget]
        parent = row.genome
    assert parent == history.winner.code == history.events[-1]["genome"]
    survivors = history.survivors
    assert survivors[survivors.on_line][["branch", "generation"]].apply(tuple, axis=1).tolist() == history.line and (~survivors.on_line).sum() == 1
    assert history.generations.status.value_counts().to_dict() == {"finished": 5, "abandoned": 3}
    assert [rules.target.sparsity for rules in history.generations.rules][:2] == [0.5, 0.4] and history.rules.offspring == 5


def test_ranks_and_fates(steered):
    "In every stage ranks are 1 … n by fitness, the disqualified last; survivors are the best ranks; the parent is marked."
    frame = History(steered).evaluations
    assert frame.disqualified.ne("").any() and frame.survived.notna().all()
    for (branch, generation, stage), group in frame.groupby(["branch", "generation", "stage"]):
        group = group.sort_values("rank")
        assert group["rank"].tolist() == list(range(1, len(group) + 1))
        assert group.fitness.dropna().is_monotonic_increasing and group.fitness.notna().is_monotonic_decreasing
        n = int(group.survived.astype(bool).sum())
        assert group.survived.astype(bool).tolist() == [True] * n + [False] * (len(group) - n)
        assert group.is_parent.sum() == (stage == 1)


def test_commands_and_notes(steered):
    "In words and in full, with place and refusal."
    history = History(steered)
    assert history.commands["name"].tolist() == ["note", "set", "inject", "branch", "set", "branch", "note"] and history.commands.n.tolist() == list(range(7))
    assert history.commands.text.tolist()[1] == "sparsity → 0.4 (now)" and history.commands.text.tolist()[3] == "back to generation 2"
    assert history.commands.refused.notna().tolist() == [False, False, True, False, False, False, False] and "the budget is" in history.commands.refused[2]
    assert history.notes.text.tolist() == ["begin", "third way"] and history.notes.branch.tolist() == [0, 2] and all(history.commands.command.map(lambda row: row["command"]) == history.commands["name"])


@pytest.mark.parametrize("warm_start", [False, True])
def test_tokens_and_progress_of_real_evaluations(small, tmp_path, monkeypatch, warm_start):
    "With real training: tallies are tokens trained on, not tokens seen; abandoned work is counted; the plan is met at the end, and work only grows while what is left shrinks."
    config = short_config(generations=3, warm_start=warm_start, stages=(Stage(3, 40, 32), Stage(2, 64, 50), Stage(1, 150, 48)))
    search = Search(tmp_path / "run", *small, small_pools(), config)
    trained, real_train = [], warm_start_module.train
    monkeypatch.setattr(warm_start_module, "train", lambda model, blocks, *args, **options: trained.append(blocks.numel()) or real_train(model, blocks, *args, **options))
    history, plan = History(tmp_path / "run"), generation_tokens(ActiveConfig.of(config), 16)
    assert history.planned_tokens == {purpose: 3 * n for purpose, n in plan.items()} and history.progress[:2] == (0, 3 * forward_tokens(**plan))
    done_before, total = 0, history.progress[1]
    while search.step() is not None:
        history.refresh()
        done, now, seconds = history.progress
        assert now == total and done >= done_before and (seconds > 0) == (done < total)
        assert history.tokens["tuning"] == sum(trained)
        done_before = done
    history.refresh()
    assert history.finished and history.progress == (total, total, 0.0) and history.tokens == history.planned_tokens
    assert history.evaluations.groupby("stage").tuning_tokens.max().tolist() == [32, 64, 144]
    search.send({"command": "branch", "generation": 2})
    steps(search, 3)
    search.send({"command": "set", "setting": "offspring", "value": 6, "when": "now"})
    steps(search, 1)
    assert history.refresh() and not history.finished and history.tokens["tuning"] == sum(trained) and len(history.abandoned) == 3
    assert history.seconds == pytest.approx(history.evaluations.seconds.sum() + history.abandoned.seconds.sum())
    planned = history.planned_tokens
    search.run(progress=False)
    assert history.refresh() and history.tokens == planned and history.tokens["tuning"] == sum(trained)


def test_a_candidate_of_an_open_stage_has_no_fate_yet(small, tmp_path):
    "Ranks are those so far."
    search = search_in(tmp_path / "run", small)
    steps(search, 3)
    history = History(tmp_path / "run")
    assert history.evaluations.survived.isna().all() and sorted(history.evaluations["rank"]) == [1, 2, 3] and history.generations.status.tolist() == ["open"] and history.generations.ended.isna().all()


@pytest.mark.parametrize("status", STATUSES)
def test_states(small, tmp_path, status):
    "What state.json says, with defaults for what an earlier version did not write; half a file is none."
    search = search_in(tmp_path / "run", small)
    steps(search, 2)
    write_state(tmp_path / "run", status, generation=0, stage=1, candidate="x", parent="y", branch=0, error="Traceback" if status == "failed" else None)
    history = History(tmp_path / "run")
    assert history.state["status"] == status and history.state["candidate"] == "x" and (history.state["error"] is not None) == (status == "failed")
    row = json.loads((tmp_path / "run" / "state.json").read_text())
    (tmp_path / "run" / "state.json").write_text(json.dumps({"status": status, "generation": 0, "stage": None, "parent": "y", "time": 3.0}))
    assert history.refresh() and not history.refresh() and history.state["candidate"] is None and history.state["branch"] == 0
    (tmp_path / "run" / "state.json").write_text(json.dumps(row)[:20])
    assert read_state(tmp_path / "run") is None and history.refresh() and history.state["status"] == "stopped"
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    (tmp_path / "run" / "state.json").write_text(json.dumps(row | {"pid": int(child.stdout)}))  # that process has ended
    assert read_state(tmp_path / "run")["status"] == ("stopped" if status in ("running", "paused") else status)
    (tmp_path / "run" / "state.json").write_text(json.dumps(row | {"pid": int(child.stdout), "host": "another-machine"}))
    assert read_state(tmp_path / "run")["status"] == status


def test_events_from_a_byte_on(steered):
    "Whole lines only; the byte returned is where to go on; no file is no events."
    path = steered / "events.jsonl"
    rows, size = read_events(path)
    assert size == path.stat().st_size and [row["event"] for row in rows] == [row["event"] for row in events(steered)]
    assert read_events(path, size) == ([], size) and read_events(steered / "none") == ([], 0)


def test_a_reader_changes_nothing(steered):
    "No file appears, none is written."
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in steered.iterdir()}
    history = History(steered)
    history.refresh(), history.at(1), history.evaluations, history.state, history.progress
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in steered.iterdir()} == before
