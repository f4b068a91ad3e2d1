"""Real processes, killed at random moments and on disks that fill up, continue to the end of one that was left alone.

CI kills each job a few times. All of it, 70 kills: EVOPRUNE_KILLS=10 python -m pytest tests/test_killed.py
"""
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, by, events, made_up, random_blocks, short_config, small_model, small_pools, word_tokenizer
from safetensors import safe_open

from evoprune_nb.candidates import materialize
from evoprune_nb.database import LevelDatabase, build_database
from evoprune_nb.machine.fetch import cached
from evoprune_nb.machine.files import write_text, written_whole
from evoprune_nb.paper.grid import Cells, compute_all, grid
from evoprune_nb.replay import commands_of
from evoprune_nb.search import Search
from evoprune_nb.ship.export import export_hf, load_exported
from evoprune_nb.ship.posttraining import post_train_checkpoint
from evoprune_nb.ship.stream import PostTraining
from evoprune_nb.training import Training, train

KILLS = int(os.environ.get("EVOPRUNE_KILLS", "2"))  # of each job
FAMILY = "llama-gqa"


def candidate(place: Path):
    model = small_model(FAMILY)
    levels = LevelDatabase(place.parent / "levels", model)
    return materialize(model, levels, levels.space.genome([2] * len(levels.units)))


def search(place: Path, **changes) -> None:
    model = small_model(FAMILY)
    Search(place / "run", model, LevelDatabase(place.parent / "levels", model), small_pools(), short_config(heldout_tokens=64, **changes)).run(progress=False)


def warm_search(place: Path) -> None:
    search(place, warm_start=True, n_jobs=2)


def database(place: Path) -> None:
    build_database(small_model(FAMILY), random_blocks(), place / "database", progress=False)


def post_training(place: Path) -> None:
    model, blocks = candidate(place), random_blocks(96)
    train(model, blocks, Training(lr=1e-3, batch_size=2), checkpoint=place / "training.safetensors", checkpoint_every=2)
    if not (place / "trained").exists():
        export_hf(model, word_tokenizer("none"), place / "trained")


def trainer(place: Path) -> None:
    settings = PostTraining(n_tokens=12 * 64, seq_len=32, batch_size=2, lr=1e-3, autocast=False)
    try:
        post_train_checkpoint(place.parent / "exported", place / "trained", settings, str(place.parent / "text.jsonl"), checkpoint_tokens=128, use_cpu=True, progress=False)
    except ValueError as error:  # done before
        assert "trained exists" in str(error)


def export(place: Path) -> None:
    for n in range(4):
        if not (place / f"export {n}").exists():
            export_hf(candidate(place), word_tokenizer("none"), place / f"export {n}")


def experiment(place: Path) -> None:
    model = small_model(FAMILY)
    levels = LevelDatabase(place.parent / "levels", model)

    def work(seed: int) -> dict:
        (place / f"seed {seed}").mkdir(exist_ok=True)
        return {"winner": Search(place / f"seed {seed}" / "run", model, levels, small_pools(), short_config(generations=1, seed=seed)).run(progress=False).code}

    compute_all(Cells(place / "cells", {"generations": 1}), grid(seed=range(3)), work, progress=False)


JOBS = (search, warm_search, database, post_training, trainer, export, experiment)


def work(job, place: Path, limit: int | None = None) -> None:
    "The job in a process of its own; with a limit in bytes, no file grows beyond it, as on a disk that is full."
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.stderr = open(os.devnull, "w")
    job(place)


@pytest.fixture(scope="module")
def start():
    "Starts processes; what they import is imported once."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_killed"])

    def begin(*arguments) -> multiprocessing.Process:
        process = context.Process(target=work, args=arguments)
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:  # the server finds this module by it
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        finish(begin(Path.exists, Path()))  # all is imported by now
    return begin


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    "What jobs start from, and for each job what it leaves, and how many seconds it takes."
    root = tmp_path_factory.mktemp("killed")
    build_database(small_model(FAMILY), random_blocks(), root / "levels", progress=False)
    generator = random.Random(0)
    rows = [" ".join(f"w{generator.randrange(3, VOCABULARY)}" for _ in range(300)) for _ in range(40)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    export_hf(candidate(root / "any"), word_tokenizer("none"), root / "exported")
    known = {}

    def left_by(job) -> tuple[dict, float]:
        if job not in known:
            (place := root / f"{job.__name__} undisturbed").mkdir()
            began = time.monotonic()
            finish(start(job, place))
            known[job] = contents_of(place), time.monotonic() - began
        return known[job]

    return root, left_by


def finish(process: multiprocessing.Process) -> None:
    process.join(300)
    assert process.exitcode == 0


def contents_of(place: Path) -> dict[str, object]:
    "Hashes of all files, logs without times; what says who and when is left out."
    found = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = path.relative_to(place).as_posix()
        if path.name == "events.jsonl":
            found[name] = events(path.parent)
        elif path.name == "posttraining.json":
            row = json.loads(path.read_text())
            found[name] = {key: row[key] for key in ("tokens", "settings", "source_model")} | {"losses": [step["loss"] for step in row["log"]]}
        elif path.name == "training.safetensors":  # its notes are in any order
            with safe_open(path, framework="pt") as file:
                found[name] = file.metadata()["sha256"]
        elif path.parent.name == "cells":
            row = json.loads(path.read_text())
            found[name] = row["key"], row["value"], row["settings"]
        elif path.suffix == ".safetensors" or path.name in ("manifest.json", "config.json") and path.parent.name != "run":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name not in ("writer.lock", "queue.lock"):
            found[name] = "there"
    return found


@pytest.mark.parametrize("job", JOBS)
def test_killed_at_random_moments(start, undisturbed, job):
    "SIGKILL, again and again, on the same directory: what the last start leaves is what an undisturbed one does, and nothing else."
    root, left_by = undisturbed
    expected, seconds = left_by(job)
    generator = random.Random(f"{job.__name__} {KILLS}")
    (place := root / f"{job.__name__} killed").mkdir()
    killed = 0
    while killed < KILLS:
        process = start(job, place)
        process.join(generator.uniform(0.05, 0.6) * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        else:  # done: once more, from the beginning
            assert process.exitcode == 0 and contents_of(place) == expected
            shutil.rmtree(place)
            place.mkdir()
    finish(start(job, place))
    assert contents_of(place) == expected
    shutil.rmtree(place)


@pytest.mark.parametrize("job", JOBS)
def test_a_disk_that_fills_up(start, undisturbed, job):
    "Files stop growing at some size, in the middle of a write: the job fails; with room, it goes on to the same end."
    root, left_by = undisturbed
    expected, _ = left_by(job)
    (place := root / f"{job.__name__} full").mkdir()
    generator = random.Random(job.__name__)
    largest = max(path.stat().st_size for path in (root / f"{job.__name__} undisturbed").rglob("*") if path.is_file())
    for limit in [largest // 3, *(generator.randrange(largest) for _ in range(KILLS - 2))]:
        process = start(job, place, limit)
        process.join(300)
        assert process.exitcode == 1
    finish(start(job, place))
    assert contents_of(place) == expected
    shutil.rmtree(place)


# Commands that were acknowledged.

def sends(run_dir: Path) -> Search:
    search = Search(run_dir, (model := small_model(FAMILY)), LevelDatabase(run_dir.parent / "levels", model), small_pools(), short_config(), by(made_up))
    for _ in range(3):
        search.step()
    search.send({"command": "note", "text": "remember"})
    search.send({"command": "set", "setting": "offspring", "value": 5})
    search.send({"command": "pause"})
    return search


def dies(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def queued(run_dir: Path) -> None:
    sends(run_dir), dies()


def logged(run_dir: Path) -> None:
    search, Path.unlink = sends(run_dir), dies  # the queue is emptied last
    search.step()


@pytest.mark.parametrize("when", [queued, logged])
def test_acknowledged_commands_outlive_the_process(start, small, tmp_path, when):
    "What `send` has returned is in the log in the end, once, in order, and in force; a pause for the dead process holds nobody up."
    shutil.copytree(small[1].directory, tmp_path / "levels")
    (child := start(when, tmp_path / "run")).join()
    assert child.exitcode == -signal.SIGKILL and (tmp_path / "run" / "queue.json").exists()
    search = Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up))
    search.run(progress=False)
    assert [row["command"]["command"] for row in commands_of(tmp_path / "run")] == ["note", "set", "pause"]
    assert search.finished and search.rules.offspring == 5 and not search.queue.waiting


def test_commands_from_another_search_object(small, tmp_path):
    "Whoever opens the run can send: the one that drives it applies the command, at its next step."
    driving, other = (Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up)) for _ in range(2))
    with driving.driving():
        driving.stepper.drain(), driving.stepper.advance()
        other.send({"command": "set", "setting": "offspring", "value": 5})
        with pytest.raises(ValueError, match="narrow 1 offspring"):
            driving.send({"command": "set", "setting": "offspring", "value": 1})
        assert [row["command"]["value"] for row in driving.stepper.drain()] == [5]
    assert driving.rules.offspring == 5 and driving.run(progress=False) and other.run(progress=False) == driving.parent


# What a killed process leaves behind.


def half(path: Path) -> None:
    path.mkdir()
    (path / "half").write_text("half")
    with written_whole(path.parent.parent / "export") as scratch:
        (scratch / "half").write_text("half")
        dies()


def fetches_half(place: Path) -> None:
    os.environ["EVOPRUNE_CACHE"] = str(place / "cache")
    cached("thing", half)


def test_killed_exports_and_fetches_clean_up(start, tmp_path, monkeypatch):
    "The next call to the same place removes what the killed one left, and leaves alone what a living process writes."
    (child := start(fetches_half, tmp_path)).join()
    assert child.exitcode == -signal.SIGKILL
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".export.")]
    assert len(left) == 1 and (tmp_path / "cache" / ".thing.tmp" / "half").exists()
    (living := tmp_path / re.sub(r"\d+@", f"{os.getpid()}@", left[0])).mkdir()
    export_hf(small_model(FAMILY), word_tokenizer("none"), tmp_path / "export")
    assert load_exported(tmp_path / "export") and sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "cache", "export"])
    assert cached("thing", lambda path: write_text(path, "whole")).read_text() == "whole"
    assert not (tmp_path / "cache" / ".thing.tmp").exists()


def says(place: Path) -> None:
    "Write what is said of a file that cannot grow beyond 100 bytes."
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 1000))
    try:
        write_text(place / "state.json", 200 * "x")
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        (place / "said.txt").write_text(str(error))


def test_a_full_disk_names_the_file(start, tmp_path):
    "The system's error alone would say 'No space left on device', and not where."
    (child := start(says, tmp_path)).join()
    assert child.exitcode == 0 and "state.json" in (tmp_path / "said.txt").read_text() and len(list(tmp_path.iterdir())) == 1
