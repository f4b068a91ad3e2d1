"""A run of thousands of generations: a small log, read once, and figures that draw what can be seen."""
import json

import pytest
from helpers import by, made_up, short_config, small_pools

from evoprune_nb.history import History
from evoprune_nb.paper.figures import fitness_figure, lineage_figure, tokens_figure
from evoprune_nb.runlog import encode_event, read_settings, write_settings
from evoprune_nb.search import Search
from evoprune_nb.selection import Stage

GENERATIONS = 2000


@pytest.fixture(scope="module")
def long(small, tmp_path_factory):
    "A run of 40 generations with a made-up evaluator, and one in which they come again and again."
    root = tmp_path_factory.mktemp("long")
    config = short_config(generations=40, offspring=16, stages=(Stage(4, 0, 32), Stage(1, 64, 48)))
    Search(root / "run", *small, small_pools(), config, by(made_up)).run(progress=False)
    rows, generations = [json.loads(line) for line in (root / "run" / "events.jsonl").read_text().splitlines()], []
    for row in rows[1:-1]:
        if row["event"] == "generation":
            generations.append([])
        generations[-1].append({key: value for key, value in row.items() if key != "crc"})
    (root / "long").mkdir()
    settings = read_settings(root / "run")
    write_settings(root / "long", settings | {"config": settings["config"] | {"generations": GENERATIONS}})
    with open(root / "long" / "events.jsonl", "wb") as file:
        for n in range(GENERATIONS):
            file.writelines(encode_event(row | {"generation": n}) for row in generations[n % len(generations)])
    return root


def test_the_log_grows_by_little(long):
    "Some hundred bytes an event; what a search keeps on disk besides does not grow at all."
    lines = (long / "run" / "events.jsonl").read_bytes().splitlines()
    assert max(map(len, lines)) < 1000 and sum(map(len, lines)) / len(lines) < 300
    assert {path.name for path in (long / "run").iterdir()} <= {"config.json", "events.jsonl", "state.json", "writer.lock", "queue.lock"}


def test_a_history_reads_each_event_once(long, monkeypatch):
    "All that there is, and afterwards only what is new."
    history = History(long / "long")
    assert len(history.survivors) == GENERATIONS and not history.refresh()
    with open(long / "long" / "events.jsonl", "ab") as file:
        file.write(encode_event({"event": "finished", "genome": history.position.parent, "time": 0.0}))
    import evoprune_nb.runlog as runlog

    decoded, decode = [], runlog.decode_event
    monkeypatch.setattr(runlog, "decode_event", lambda line: decoded.append(line) or decode(line))
    assert history.refresh() and len(decoded) == 1 and history.finished


@pytest.mark.parametrize("draw", [fitness_figure, lambda history: fitness_figure(history, "log"), lineage_figure, tokens_figure], ids=["relative", "raw", "lineage", "tokens"])
def test_figures_draw_what_can_be_seen(long, draw):
    "A few hundred words and shapes; marks on top of each other once."
    figure = draw(History(long / "long"))
    shapes = sum(len(axes.patches) + len(axes.texts) + len(axes.lines) + len(axes.collections) for axes in figure.axes)
    assert shapes < 100
    if draw is fitness_figure:
        assert sum(len(marks.get_offsets()) for axes in figure.axes for marks in axes.collections) < GENERATIONS * 8
