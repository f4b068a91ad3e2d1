"""A run leaves the house: as a page that opens offline, as a film, as a table, in a tracker; and the page of runs follows what is written."""
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import by, made_up, short_config, small_pools
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from evoprune_nb.history import History
from evoprune_nb.runlog import write_state
from evoprune_nb.search import Search
from evoprune_nb.ui import trackers
from evoprune_nb.ui.bell import Bell
from evoprune_nb.ui.candidate_table import candidate_frame
from evoprune_nb.ui.cli import main
from evoprune_nb.ui.film import write_film
from evoprune_nb.ui.runs_page import RunsPage
from evoprune_nb.ui.trackers import Mirror, entries, mirror
from evoprune_nb.ui.workbench import attach

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()


def healthy(*task):
    return replace(made_up(*task), disqualified="", fitness=1 + made_up(*task).fitness if made_up(*task).fitness < 9 else 2.0, seconds=0.25)


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    "Two finished runs; one has a note that would be markup."
    top = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        search = Search(top / f"seed-{seed}", *small, small_pools(), short_config(seed=seed, heldout_tokens=64), by(healthy))
        search.send({"command": "note", "text": "</script><img src=x onerror=alert(1)>"})
        search.run(progress=False)
    return top


@pytest.fixture(scope="module")
def history(folder):
    return History(folder / "seed-0")


@pytest.fixture(scope="module")
def shared(folder, tmp_path_factory):
    "The page of a run, written by the command."
    path = tmp_path_factory.mktemp("shared") / "new" / "run.html"
    assert main(["share", str(folder / "seed-0"), "--out", str(path)]) == 0
    return path


def test_a_shared_page_opens_offline_and_its_slider_works(shared):
    "In a browser without a network: nothing is asked for, nothing of a note is taken for markup, every moment is there."
    asked, faults = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(offline=True).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(shared.as_uri())
        slider, when = page.get_by_role("slider"), page.locator(".evo-moment output")
        expect(when).to_have_text("now")
        now = page.locator("[data-part=lineage]").inner_html()
        slider.focus()
        page.keyboard.press("Home")
        expect(when).to_have_text("after generation 1 of 3")
        assert page.locator("[data-part=lineage]").inner_html() != now and page.locator("[data-part=fitness] svg").count() == 1
        page.keyboard.press("End")
        expect(when).to_have_text("now")
        assert page.locator("[data-part=lineage]").inner_html() == now
        expect(page.locator("[data-part=log]")).to_contain_text("onerror=alert(1)")
        browser.close()
    assert asked == [shared.as_uri()] and faults == []


def test_a_shared_page_keeps_each_picture_once(shared):
    data = re.search(r'id="moments">(.*?)</script>', shared.read_text(), re.DOTALL)[1]
    data = json.loads(data)
    assert len(data["moments"]) == 4 and len(set(data["pieces"])) == len(data["pieces"])
    assert {place for moment in data["moments"] for place in moment["parts"].values()} == set(range(len(data["pieces"])))


def test_a_film_has_a_frame_per_generation(history, small, tmp_path):
    film = Image.open(write_film(history, tmp_path / "search.gif"))
    assert film.n_frames == len(history.line) + 1 and film.size[0] > 600
    with pytest.raises(ValueError, match=r"search\.mp4 does not end in \.gif"):
        write_film(history, tmp_path / "search.mp4")
    search = Search(tmp_path / "new", *small, small_pools(), short_config(), by(healthy))
    search.step()
    with pytest.raises(ValueError, match="has no complete generation yet"):
        write_film(History(search.run_dir), tmp_path / "new.gif")


def test_tensorboard_holds_what_the_log_says(history, folder, tmp_path):
    "Read back with TensorBoard's own reader, value by value."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert mirror(folder / "seed-0", ["tensorboard"], place=str(tmp_path), name="again") == len(list(entries(history)))
    found = EventAccumulator(str(tmp_path / "again"))
    found.Reload()
    survivors = [round(value.value, 4) for value in found.Scalars("survivor/fitness")]
    assert survivors == [round(value, 4) for value in history.survivors.fitness]
    assert found.Scalars("tokens")[-1].value == sum(history.tokens.values()) and found.Scalars("tokens")[-1].step == len(history.evaluations)
    assert len(found.Scalars("stage_1/fitness")) == (history.evaluations.stage == 0).sum()


def test_trackio_holds_it_too(folder, tmp_path):
    "In trackio's database, in a directory of our own; its bell has rung."
    script = f"from evoprune_nb.ui.trackers import mirror; print(mirror({str(folder / 'seed-1')!r}, ['trackio'], place='ours'))"
    environment = {"TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    database = sqlite3.connect(tmp_path / "ours.db")
    said = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
    assert [row["survivor/fitness"] for row in said if "survivor/fitness" in row] == History(folder / "seed-1").survivors.fitness.tolist()
    assert "seed-1 has finished" in done.stdout


class Heard:
    "A tracker that keeps what it hears."

    def __init__(self, name, settings, place):
        self.entries, self.rung, self.closed = [], [], False

    def log(self, entry):
        self.entries.append(entry)

    def ring(self, *words):
        self.rung.append(words)

    def close(self):
        self.closed = True


def test_a_run_is_mirrored_while_it_goes_on(small, tmp_path, monkeypatch):
    "Each look says what is new, once, in order; live and afterwards the same is said; the bell rings once, for a failure with its error."
    monkeypatch.setitem(trackers.TRACKERS, "json", Heard)  # a package of this name is there
    search = Search(tmp_path / "run", *small, small_pools(), short_config(), by(healthy))
    search.step()
    listener = Mirror(tmp_path / "run", ["json"])
    while not search.finished:
        listener.refresh()
        search.step()
    write_state(tmp_path / "run", "failed", error="Traceback\nRuntimeError: no memory")
    listener.refresh(), listener.refresh()
    heard = listener.trackers[0]
    assert heard.entries == [entry for entry in entries(History(tmp_path / "run")) if entry.values]
    assert heard.rung == [("run has failed", "RuntimeError: no memory", True)] and listener.over
    assert all(a.step <= b.step for a, b in zip(heard.entries, heard.entries[1:]))


def test_wrong_trackers_are_refused(folder, monkeypatch):
    with pytest.raises(ValueError, match="tracker 'tensorbord' is unknown.*tensorboard"):
        mirror(folder / "seed-0", ["tensorbord"])
    monkeypatch.setitem(trackers.TRACKERS, "absent", Heard)
    with pytest.raises(ValueError, match="tracker 'absent' is not installed here: pip install absent"):
        mirror(folder / "seed-0", ["absent"])


def test_commands(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["runs", str(folder)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [["seed-0", "finished"], ["seed-1", "finished"]]
    assert main(["runs", str(folder), "--json", "--sort", "heldout"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["heldout"] <= rows[1]["heldout"] and rows[0]["note"].startswith("</script>")
    assert main(["runs", str(folder), "--csv"]) == 0 and capsys.readouterr().out.startswith("run,status,")
    assert main(["candidates", str(folder), "--out", "c.json"]) == 0 and len(json.loads((tmp_path / "c.json").read_text())) > 8
    for wrong, words in {("runs", "nowhere"): "no folder 'nowhere'", ("runs", str(tmp_path)): "no run directory in", ("runs", str(folder), "--sort", "x"): "column 'x' is unknown", ("share", str(folder / "seed-0"), "--out", "a.pdf"): "a.pdf has no known ending"}.items():
        capsys.readouterr()
        assert main(list(wrong)) == 2 and words in capsys.readouterr().err


def test_the_page_of_runs(folder, small, tmp_path):
    "Rows, chosen runs, tabs, the selected candidate, the bell: each follows what is pressed and what is written."
    shutil.copytree(folder, tmp_path / "runs")
    page = RunsPage(tmp_path / "runs", refresh_seconds=None)
    assert list(page.chosen) == ["seed-0", "seed-1"] and page.open.disabled and "2 finished" in page.head.value
    assert "<svg" in page.compare.slots["curves"].view.value and "seed" in page.compare.slots["settings"].view.value
    page.grid.selected = ["seed-1"]
    page.tabs.selected_index = 1
    page.refresh()
    table = page.candidates.table
    assert list(page.chosen) == ["seed-1"] and not page.open.disabled and "Press a row" in page.candidates.slot.view.value
    table.grid.selected = [table.grid.rows[3][0]]
    page.refresh()
    assert table.row["genome"] in table.grid.rows[3] and "<svg" in page.candidates.slot.view.value
    table.path.value = str(tmp_path / "all.parquet")
    table.export.click()
    assert (tmp_path / "all.parquet").exists() and "written" in table.say.value
    table.path.value = "all.xls"
    table.export.click()
    assert "no known ending" in table.say.value
    for place, slot in ((2, page.pareto.slot), (3, page.importance.slot)):
        page.tabs.selected_index = place
        page.refresh()
        assert "<svg" in slot.view.value
    assert page.bell.rung == []
    search = Search(tmp_path / "runs" / "new", *small, small_pools(), short_config(), by(healthy))
    search.step()
    page.refresh()
    assert "new" in [row[0] for row in page.grid.rows] and page.grid.selected == ["seed-1"]
    search.run(progress=False)
    page.refresh()
    assert [title for title, _ in page.bell.rung] == ["new has finished"]
    page.open.click()
    assert page.opened is not None and page.panel.children == (page.opened.widget,)
    page.close()


def test_the_explorer_of_the_panel(folder):
    "A press on a candidate shows it in every card; the map chooses a unit and takes it to the editor; Share writes the page."
    panel = attach(folder / "seed-0")
    panel.close()  # it is refreshed by hand here
    tabs = panel.widget.children[-1]
    tabs.selected_index = tabs.titles.index("All candidates")
    panel.refresh()
    grid = panel.explorer.table.grid
    assert len(grid.rows) == len(candidate_frame(panel.history))
    key = next(row[0] for row in grid.rows if row[1] == 2)
    grid.selected = [key]
    panel.refresh()
    assert panel.shown == panel.explorer.table.row["genome"] and panel.moment.slider.value == 2 and not panel.moment.live.value
    tabs.selected_index = tabs.titles.index("Importance")
    panel.refresh()
    panel.explorer.map.cells[3].click()
    assert panel.history.space.units[3].name in panel.explorer.map.what.value
    panel.explorer.map.edit.click()
    assert panel.steering.editor.selected == 3 and tabs.titles[tabs.selected_index] == "Edit"
    panel.explorer.share.path.value = "run.pdf"
    panel.explorer.share.write.click()
    panel.explorer.share.thread.join(60)
    assert "no known ending" in panel.explorer.share.say.value and not panel.explorer.share.write.disabled


def test_a_page_before_the_first_run(tmp_path):
    page = RunsPage(tmp_path, refresh_seconds=None)
    assert "none yet" in page.head.value and page.grid.rows == []
    page.close()
    assert Bell().rung == []
