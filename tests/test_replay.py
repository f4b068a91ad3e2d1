"""A steered search, whatever was done to it, is repeated to the same genomes: live in a thread, replayed headless, or killed and taken up again."""
import json
import os
import random
from pathlib import Path

import nbformat
import pytest
from helpers import by, events, made_up, random_blocks, short_config, small_model, small_pools
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evoprune_nb.data import load_pools
from evoprune_nb.paper.experiments import notebook_parameters
from evoprune_nb.paper.replays import to_notebook
from evoprune_nb.history import History
from evoprune_nb.mutation import make_offspring
from evoprune_nb.database import build_database
from evoprune_nb.runlog import RunDiverged
from evoprune_nb.search import Search, SearchConfig
from evoprune_nb.source import Source
from evoprune_nb.selection import Stage
from evoprune_nb.target import Target
from evoprune_nb.ui.worker import Worker
from evoprune_nb.replay import commands_of, follow, replay

PATIENCE = 60
UNITS = [f"{kind}.{layer:02d}" for kind in ("attn", "mlp") for layer in range(3)]


def search_in(run_dir, small, evaluator=made_up, config=None) -> Search:
    return Search(run_dir, *small, small_pools(), config or short_config(), by(evaluator))


WHEN = st.sampled_from(("next", "now"))
SETTING = st.one_of(
    st.tuples(st.just("offspring"), st.integers(1, 6)), st.tuples(st.just("max_swaps"), st.integers(1, 4)), st.tuples(st.just("generations"), st.integers(1, 5)),
    st.tuples(st.just("sparsity"), st.sampled_from((0.3, 0.4, 0.5, 0.6))), st.tuples(st.just("params"), st.sampled_from((30_000, 45_000))), st.tuples(st.just("lr"), st.sampled_from((0.1, 0.01))),
    st.tuples(st.just("stages"), st.sampled_from(([[1, 0, 16]], [[2, 0, 32], [1, 64, 48]], [[3, 0, 16], [2, 32, 16], [1, 64, 16]]))), st.tuples(st.just("limits"), st.sampled_from(({"flops": 0.8}, None))),
    st.tuples(st.just("operator"), st.sampled_from(("level_swap", "cost_swap"))))
COMMAND = st.one_of(
    st.builds(lambda pair, when: {"command": "set", "setting": pair[0], "value": pair[1], "when": when}, SETTING, WHEN),
    st.builds(lambda name, units, when: {"command": name, "units": sorted(units), "when": when}, st.sampled_from(("freeze", "thaw")), st.sets(st.sampled_from(UNITS), min_size=1, max_size=3), WHEN),
    st.builds(lambda seed, when: {"command": "inject", "seed": seed, "when": when}, st.integers(0, 99), WHEN),
    st.builds(lambda generation: {"command": "branch", "generation": generation}, st.integers(0, 3)),
    st.builds(lambda what: {"command": "step", "what": what}, st.sampled_from(("evaluation", "generation"))),
    st.sampled_from(({"command": "pause"}, {"command": "resume"}, {"command": "stop"}, {"command": "note", "text": "hm"})))


def steered(run_dir, small, script: dict[int, list[dict]]) -> Search:
    "A live run: while the n-th evaluation is under way in the worker's thread, the n-th commands of the script are sent; whoever pauses, stops or fails is sent on its way again."
    n = [0]

    def send(command: dict) -> None:
        if command["command"] == "inject":  # some genome of about the right size
            around = make_offspring(search.start, search.space, search.budget, 3, random.Random(command["seed"]), "level_swap", 5)
            command = {"command": "inject", "genome": around[-1].code, "when": command["when"]}
        try:
            search.send(command)
        except ValueError:  # the check is tested elsewhere
            pass

    def evaluate(*task):
        n[0] += 1
        for command in script.get(n[0], []) if n[0] < 60 else [{"command": "set", "setting": "generations", "value": 1}]:  # branches may go on for ever
            send(command)
        return made_up(*task)

    search = search_in(run_dir, small, evaluate)
    worker = Worker(search)
    for command in script.get(0, []):
        send(command)
    while not search.finished or search.queue.waiting:
        worker.start()
        while not worker.join(0):
            if worker.wait("paused", "finished", "failed", "stopped", timeout=0.05) and worker.status == "paused" and not search.queue.waiting:
                send({"command": "resume"})
        assert worker.status != "failed" or "MutationError" in worker.error or "fit" in worker.error or "AllDisqualified" in worker.error, worker.error
        if worker.status == "failed" and "AllDisqualified" in worker.error:
            send({"command": "branch", "generation": search.generation})  # other offspring
        elif worker.status == "failed":
            send({"command": "thaw", "units": UNITS})
            send({"command": "set", "setting": "sparsity", "value": 0.5})
            send({"command": "set", "setting": "max_swaps", "value": 3})
            send({"command": "set", "setting": "offspring", "value": 4})
    return search


def cut(run: Path, copy: Path, size: int) -> Path:
    copy.mkdir()
    (copy / "config.json").write_bytes((run / "config.json").read_bytes())
    (copy / "events.jsonl").write_bytes((run / "events.jsonl").read_bytes()[:size])
    return copy


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(script=st.dictionaries(st.integers(0, 30), st.lists(COMMAND, min_size=1, max_size=3), max_size=8), share=st.floats(0, 1))
def test_live_replayed_and_resumed_are_the_same(small, tmp_path_factory, monkeypatch, script, share):
    "Random commands at random places of a live run: its replay writes the same events, commands and refusals included; so does a replay that was killed at some byte; and the reopened run has the same winner without a single evaluation."
    monkeypatch.setattr(os, "fsync", lambda _: None)
    directory = tmp_path_factory.mktemp("steered")
    live = steered(directory / "live", small, script)
    expected, history = events(directory / "live"), History(directory / "live")
    assert history.finished and history.winner == live.parent and history.line[-1:] == [(live.position.branch, live.generation - 1)]
    assert replay(directory / "live", directory / "again", *small, small_pools(), progress=False, evaluator=by(made_up)) == live.parent
    assert events(directory / "again") == expected
    size = int(share * (directory / "live" / "events.jsonl").stat().st_size)
    killed = cut(directory / "live", directory / "killed", size)
    assert follow(search_in(killed, small), commands_of(directory / "live"), progress=False) == live.parent
    assert events(killed) == expected
    reopened = search_in(directory / "live", small, evaluator=lambda *_: pytest.fail("evaluated again"))
    assert reopened.run(progress=False) == live.parent and events(directory / "live") == expected


def test_an_unfinished_run_is_replayed_to_its_end(small, tmp_path):
    "What was left in the middle goes on by the rules that it was left with."
    search = search_in(tmp_path / "run", small)
    for _ in range(3):
        search.step()
    search.send({"command": "set", "setting": "offspring", "value": 6})
    search.step()
    before = events(tmp_path / "run")
    winner = replay(tmp_path / "run", tmp_path / "again", *small, small_pools(), progress=False, evaluator=by(made_up))
    assert events(tmp_path / "again")[: len(before)] == before and History(tmp_path / "again").finished
    assert search.run(progress=False) == winner and events(tmp_path / "again") == events(tmp_path / "run")
    assert History(tmp_path / "again").config == History(tmp_path / "run").config


def test_real_evaluations_are_replayed_to_the_same_numbers(small, tmp_path):
    "With real tuning and scoring, the replay's fitness values are bitwise those of the steered run; the description of the source is passed on."
    search = Search(tmp_path / "run", *small, small_pools(), short_config(heldout_tokens=64), source=Source("made up"))
    for command in ({"command": "set", "setting": "lr", "value": 0.01, "when": "now"}, {"command": "branch", "generation": 0}, {"command": "set", "setting": "sparsity", "value": 0.4}):
        for _ in range(3):
            search.step()
        search.send(command)
    winner = search.run(progress=False)
    assert replay(tmp_path / "run", tmp_path / "again", *small, small_pools(), progress=False) == winner
    assert events(tmp_path / "again") == events(tmp_path / "run") and History(tmp_path / "again").source == Source("made up")


def test_replay_of_an_unsteered_run_is_the_run(small, tmp_path, capsys):
    "No commands, same events; a bar on the error stream."
    search_in(tmp_path / "run", small).run(progress=False)
    replay(tmp_path / "run", tmp_path / "again", *small, small_pools(), evaluator=by(made_up))
    assert events(tmp_path / "again") == events(tmp_path / "run") and "replay" in capsys.readouterr().err


def test_replay_with_other_model_or_text_is_refused(small, tmp_path):
    "Named, with both fingerprints, before anything is written."
    search_in(tmp_path / "run", small).run(progress=False)
    other = small_model("llama-gqa", seed=1)
    with pytest.raises(ValueError, match=r"made with another model \(\w{16} there, \w{16} here\)"):
        replay(tmp_path / "run", tmp_path / "again", other, build_database(other, random_blocks(), tmp_path / "database", progress=False), small_pools())
    pools = small_pools()
    with pytest.raises(ValueError, match="made with another tuning"):
        replay(tmp_path / "run", tmp_path / "again", *small, pools | {"tuning": pools["heldout"]})
    assert not (tmp_path / "again").exists()


def test_a_replay_that_goes_another_way_says_so(small, tmp_path):
    "When the code finds other events, commands no longer have a place; nothing is repeated silently at another one."
    search = search_in(tmp_path / "run", small)
    for _ in range(9):
        search.step()
    search.send({"command": "set", "setting": "offspring", "value": 6})
    search.run(progress=False)
    commands = commands_of(tmp_path / "run")
    with pytest.raises(RunDiverged, match="came after 13 events, but the replay is at 14"):
        follow(search_in(tmp_path / "again", small), [row | {"after": 13} for row in commands], progress=False)
    with pytest.raises(RunDiverged, match="came after 999 events, but the replay is at"):
        follow(search_in(tmp_path / "third", small), [row | {"after": 999} for row in commands], progress=False)


# --- as a notebook


@pytest.fixture(scope="module")
def afternoon(tiny, tokenizer, corpus, tmp_path_factory):
    "A steered run on the tiny model and a text file, left unfinished after two generations; its source is recorded."
    directory = tmp_path_factory.mktemp("afternoon")
    pools = load_pools(corpus, tokenizer, 32, {"calibration": 2048, "tuning": 2048, "scoring": 1024})
    database = build_database(tiny, pools["calibration"].draw(1024, seed=0), directory / "database", heads="group", n_levels=5, progress=False)
    source = Source("tiny", text=str(corpus), seq_len=32, calibration_tokens=1024, heads="group", n_levels=5)
    config = SearchConfig(generations=3, offspring=3, stages=(Stage(2, 0, 64), Stage(1, 64, 128)), target=Target(0.5, tolerance=0.05))
    search = Search(directory / "run", tiny, database, pools, config, source=source)
    search.step()
    search.send({"command": "set", "setting": "sparsity", "value": 0.4, "when": "now"})
    search.send({"command": "note", "text": "it's “quoted”\n\\ and more"})
    while search.generation < 2:
        search.step()
    search.send({"command": "branch", "generation": 1})
    while search.generation < 2:
        search.step()
    return directory / "run"


def executed(notebook: Path, **parameters) -> dict:
    "What the notebook's cells leave, run in this process with these parameters."
    names = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
    return names


def test_a_run_as_a_notebook(afternoon, tmp_path):
    "Typed parameters from the recorded source; executed without the run directory, it writes the same events, finishes what was unfinished, and leaves a report."
    notebook = to_notebook(afternoon, tmp_path / "notebooks" / "replay.ipynb")
    known = notebook_parameters(notebook)
    assert known["model_name"]["default"] == "'tiny'" and known["heads"]["default"] == "'group'" and known["n_levels"] == {"type": "int", "default": "5", "help": "steps from dense to gone"} and all(row["help"] for row in known.values())
    assert str(afternoon) not in notebook.read_text()
    names = executed(notebook, run_dir=str(tmp_path / "again"), report_dir=str(tmp_path / "report"))
    before, again = events(afternoon), events(tmp_path / "again")
    assert again[: len(before)] == before and again[-1]["event"] == "finished" and names["history"].notes.text.tolist() == ["it's “quoted”\n\\ and more"]
    assert json.loads((tmp_path / "report" / "results.json").read_text())["results"]["winner"] == names["winner"].code
    assert replay(tmp_path / "again", tmp_path / "third", names["model"], names["database"], names["pools"], progress=False) == names["winner"]


def test_a_notebook_that_finds_something_else_fails(afternoon, tmp_path):
    "Another database, or other survivors, are errors that name both."
    notebook = to_notebook(afternoon, tmp_path / "replay.ipynb")
    with pytest.raises(ValueError, match=r"not what was searched in then: space \(\w{16} there, \w{16} here\), database"):
        executed(notebook, run_dir=str(tmp_path / "again"), report_dir=str(tmp_path / "report"), n_levels=4)
    node = nbformat.read(notebook, as_version=4)
    code = History(afternoon).survivors.genome[0]
    for cell in node.cells:
        before, word, after = cell.source.partition("survivors = ")
        cell.source = before + word + after.replace(code, "0" * (len(code) // 2) + "/" + "0" * (len(code) // 2), 1)
    nbformat.write(node, notebook)
    with pytest.raises(ValueError, match=rf"other genomes than then, first in .*0000/0000.*here.*{code}"):
        executed(notebook, run_dir=str(tmp_path / "more"), report_dir=str(tmp_path / "report"))


def test_a_run_that_does_not_say_how_it_was_made(small, tmp_path):
    "Which facts are missing is named; they can be given."
    search_in(tmp_path / "run", small).run(progress=False)
    with pytest.raises(ValueError, match="does not say how its model and text were made; pass source= with model_name, text, seq_len, calibration_tokens"):
        to_notebook(tmp_path / "run", tmp_path / "replay.ipynb")
    assert not (tmp_path / "replay.ipynb").exists()
    source = Source("made up", text="nowhere.txt", seq_len=16, calibration_tokens=512, calibration_seed=None)
    text = to_notebook(tmp_path / "run", tmp_path / "replay.ipynb", source).read_text()
    assert "calibration_seed = None" in text
    with pytest.raises(ValueError, match="is no run directory"):
        to_notebook(tmp_path / "none", tmp_path / "replay.ipynb")
