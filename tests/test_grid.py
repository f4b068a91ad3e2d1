"""A grid's cells are computed once, whoever computes them, and numbers of other settings never get among them."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from evoprune_nb.paper.grid import CellBusy, Cells, GridError, cell_name, compute_all, grid

SETTINGS = {"tokens": 1024, "rows": (1, 2)}


def test_names_are_safe_and_apart():
    "Whatever a key holds, its file lies in the directory; keys that differ have files that differ, in any order of their names."
    keys = [{"arm": value} for value in ("a/b", "a b", "../x", "", "é" * 300, 1, 1.0, "1", None, ["a"])]
    names = [cell_name(key) for key in keys]
    assert len(set(names)) == len(keys) and all("/" not in name and len(name) < 80 and not name.startswith(".") for name in names)
    assert cell_name({"a": 1, "b": 2}) == cell_name({"b": 2, "a": 1})


def compute_slowly(directory, log):
    "In a process of its own: every cell writes a line, then takes a while."
    def work(**key):
        with open(log, "a") as file:
            file.write(json.dumps(key) + "\n")
        time.sleep(0.05)
        return {"sum": key["a"] + key["b"]}

    compute_all(Cells(directory, SETTINGS), grid(a=range(3), b=range(3)), work, progress=False)


def test_processes_share_a_grid(tmp_path):
    "Three processes at once compute each cell once, and all see the whole table."
    log, fork = tmp_path / "log", multiprocessing.get_context("fork")
    processes = [fork.Process(target=compute_slowly, args=(tmp_path / "cells", log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 9
    table = Cells(tmp_path / "cells", SETTINGS).table()
    assert list(table["sum"]) == [0, 1, 2, 1, 2, 3, 2, 3, 4]


def test_a_killed_process_leaves_its_cell_to_others(tmp_path):
    "While it lives the cell is busy; when it is killed another computes the cell, and nothing half-written is left."
    code = ("import sys, time\nfrom evoprune_nb.paper.grid import Cells\n"
            f"Cells({str(tmp_path)!r}, {SETTINGS!r}).compute({{'a': 1}}, lambda a: print('started', flush=True) or time.sleep(600))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    cells = Cells(tmp_path, SETTINGS)
    with pytest.raises(CellBusy, match="another process computes"):
        cells.compute({"a": 1}, lambda a: {"x": a}, wait=0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert cells.compute({"a": 1}, lambda a: {"x": a}) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [cell_name({"a": 1})]
    assert (tmp_path / ".locks" / ".gitignore").read_text() == "*\n"


def test_an_interrupted_grid_continues(tmp_path):
    "Ctrl-C stops at once; cells that were done are kept."
    def work(a):
        if a == 2:
            raise KeyboardInterrupt
        return {"x": a}

    cells, keys = Cells(tmp_path, SETTINGS), grid(a=[1, 2, 3])
    with pytest.raises(KeyboardInterrupt):
        compute_all(cells, keys, work, progress=False)
    done = []
    assert list(compute_all(cells, keys, lambda a: done.append(a) or {"x": 10 * a}, progress=False)["x"]) == [1, 20, 30]
    assert done == [2, 3]


def test_failed_cells_are_tried_once_and_named(tmp_path):
    "The error of a cell comes at the end, with its key; the others are there; the next call tries it again."
    tried = []

    def work(a):
        tried.append(a)
        return {"x": 1 / a}

    cells = Cells(tmp_path, SETTINGS)
    with pytest.raises(GridError, match=r"1 of 3 cells failed; {'a': 0}: ZeroDivisionError"):
        compute_all(cells, grid(a=[0, 1, 2]), work, progress=False)
    assert tried == [0, 1, 2] and list(cells.table()["a"]) == [1, 2]
    with pytest.raises(GridError):
        compute_all(cells, grid(a=[0, 1, 2]), work, progress=False)
    assert tried == [0, 1, 2, 0]


def test_progress_says_what_is_left(tmp_path, capsys):
    "Cells that are there count, and their seconds tell how much work is left."
    cells = Cells(tmp_path, SETTINGS)
    cells.compute({"a": 1}, lambda a: {"x": a})
    path = cells.path({"a": 1})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 7200}))
    compute_all(cells, grid(a=[1, 2, 3]), lambda a: {"x": a})
    assert "1 of 3 cells" in (shown := capsys.readouterr().err) and "about 4.0 h of work left" in shown and "3 of 3 cells" in shown


@pytest.mark.parametrize("change, message", [
    (lambda cell: cell["settings"].update(tokens=2048), "computed under other settings: tokens was 2048, is 1024"),
    (lambda cell: cell["settings"].pop("tokens"), "tokens was not set, is 1024"), (lambda cell: cell["settings"].update(more="x"), 'more was "x", is not set'),
    (lambda cell: cell.pop("value"), "no cell of a grid: it lacks value")])
def test_other_numbers_are_refused(tmp_path, change, message):
    "By name of the file and what differs, whoever reads: one cell, the table, or the grid."
    cells = Cells(tmp_path, SETTINGS)
    cells.compute({"a": 1}, lambda a: {"x": a})
    path = cells.path({"a": 1})
    cell = json.loads(path.read_text())
    change(cell)
    path.write_text(json.dumps(cell))
    for read in (lambda: cells.compute({"a": 1}, lambda a: {}), cells.table, lambda: compute_all(cells, grid(a=[2, 1]), lambda a: {}, progress=False)):
        with pytest.raises((ValueError, GridError), match=message) as error:
            read()
        assert path.name in str(error.value)


def test_a_damaged_cell_is_named(tmp_path):
    "It is neither computed again unsaid nor skipped."
    cells = Cells(tmp_path, SETTINGS)
    cells.compute({"a": 1}, lambda a: {"x": a})
    cells.path({"a": 1}).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        cells.compute({"a": 1}, lambda a: {"x": a})
