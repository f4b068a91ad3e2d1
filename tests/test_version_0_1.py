"""Runs of version 0.1 are read, resumed and replayed, although settings have other names now."""
import json
import shutil
from pathlib import Path

import pytest
from helpers import events

from evoprune_nb.config import SearchConfig
from evoprune_nb.data import load_pools
from evoprune_nb.database import build_database
from evoprune_nb.history import History
from evoprune_nb.replay import replay
from evoprune_nb.search import Search
from evoprune_nb.selection import Stage

RECORDED = Path(__file__).parent / "data" / "run-0.1"  # written by revision 6165408: warm starts, two side by side, seven commands


@pytest.fixture(scope="module")
def made(tiny, tokenizer, tmp_path_factory):
    "What the run was made with, rebuilt: the model, its level database, the text."
    pools = load_pools("wikipedia-sample", tokenizer, seq_len=64, tokens={"calibration": 2048, "tuning": 8192, "scoring": 4096})
    database = build_database(tiny, pools["calibration"].blocks.long(), tmp_path_factory.mktemp("old") / "database", progress=False)
    return tiny, database, pools


@pytest.fixture
def run_dir(made, tmp_path):
    "A copy of the run, whose database is the rebuilt one: its last bits depend on the processor."
    shutil.copytree(RECORDED, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    row = json.loads(path.read_text())
    row["fingerprints"]["database"] = made[1].fingerprint
    path.write_text(json.dumps(row))
    return tmp_path / "run"


def story(run_dir):
    "Events without numbers that depend on the processor's rounding, and without the machine, which 0.1 did not say."
    numbers = {"fitness", "tuning_loss", "host", "device"}
    return [{key: value for key, value in row.items() if key not in numbers} for row in events(run_dir)]


def test_history_reads_settings_and_commands(made):
    "Old names mean what they meant; model, space and text have the fingerprints that they had."
    history, (_, database, pools) = History(RECORDED), made
    assert history.config.warm_start and history.config.max_swaps == 2 and history.config.n_jobs == 2
    assert history.rules.max_swaps == 3 and history.rules.stages == (Stage(3, 256, 256), Stage(1, 512, 256))
    assert history.finished and history.branch == 1 and history.winner.code == "20101101/47464556"
    assert history.commands.text[0] == "max_swaps → 3" and len(history.commands) == 7
    theirs = history.settings["fingerprints"]
    assert theirs["model"] == database.space.model and theirs["space"] == database.space.fingerprint
    assert all(theirs[split] == pools[split].fingerprint() for split in ("tuning", "scoring"))


def test_search_plays_the_record_back(made, run_dir):
    "A `Search` with the settings of today goes through the old record, event by event, and adds nothing."
    before = (run_dir / "events.jsonl").read_bytes()
    assert Search(run_dir, *made, History(run_dir).config).run(progress=False) == History(RECORDED).winner
    assert (run_dir / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize("n_left, until", [(9, 14), (30, 55)])
def test_killed_search_is_resumed(made, run_dir, n_left, until):
    "Cut off in the middle, an old run goes on to the recorded events, as far as no further command came."
    lines = (run_dir / "events.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "events.jsonl").write_text("".join(lines[:n_left]))
    search = Search(run_dir, *made, History(run_dir).config)
    while search.n_events < until:
        search.step()
    assert story(run_dir)[:until] == story(RECORDED)[:until]


def test_replay_gives_the_same_genomes(made, run_dir, tmp_path):
    "All evaluations anew, under the names of today."
    assert replay(run_dir, tmp_path / "replay", *made, progress=False) == History(RECORDED).winner
    old = [row for row in story(RECORDED) if row["event"] != "command"]
    assert [row for row in story(tmp_path / "replay") if row["event"] != "command"] == old


def test_unknown_settings_are_still_refused(run_dir, made):
    path = run_dir / "config.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"config": row["config"] | {"colour": "red"}}))
    with pytest.raises(ValueError, match="does not know.*colour"):
        Search(run_dir, *made, SearchConfig())
