"""The pictures of the workbench that the README shows: `python -m pytest tests/workbench_pictures.py` makes them anew.

Not among the tests, for it takes minutes: a search on the Wikipedia sample that is steered as a user would."""
import io
from pathlib import Path

import nbformat
import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from test_browser import ROOT, badge, page, paused, press, put, run_cell, say, server, tab, theme  # noqa: F401  fixtures among them

from evoprune_nb.history import History

PICTURES = ROOT / "reports" / "workbench"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    "A folder with the workbench notebook as it is, but for a shorter search."
    root = tmp_path_factory.mktemp("lab")
    notebook = nbformat.read(ROOT / "nbs" / "workbench.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells[0].source += '\nfrom dataclasses import replace\nrun_dir, config = "run", replace(config, generations=6, stages=(Stage(4, 0, 512), Stage(2, 512, 1024), Stage(1, 1024, 2048)))'
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, root / "workbench.ipynb")
    return root


def box(page: Page) -> dict:
    "The area of the panel."
    panel = page.locator(".evo").last.bounding_box()
    return {"x": panel["x"] - 4, "y": panel["y"] - 4, "width": panel["width"] + 8, "height": panel["height"] + 8}


def shoot(page: Page, name: str) -> None:
    "The panel, with the tab that is open."
    page.screenshot(path=PICTURES / f"{name}.png", clip=box(page))
    Image.open(PICTURES / f"{name}.png").convert("RGB").save(PICTURES / f"{name}.png", optimize=True)


def note(page: Page, text: str) -> None:
    tab(page, "Record")
    field = page.get_by_placeholder("a note, kept with the run").last
    field.fill(text)
    field.press("Tab")
    press(page, "Add note")


def change(page: Page, cell: int, button: str, times: int) -> None:
    "Change one unit of the draft."
    page.locator(".evo .evo-cell").nth(cell).click()
    for _ in range(times):
        press(page, button)


def generations(page: Page, place: Path, n: int) -> None:
    "Let the search come to its n-th generation, and wait there."
    for done in range(len(History(place / "run").line), n):
        press(page, "Step: generation")
        paused(page, place, lambda history: len(history.line) > done)


def until(page: Page, place: Path, condition, each=lambda: None) -> None:
    "Let the search run on, doing something every second, until it has come to a state."
    for _ in range(900):
        if condition(History(place / "run")):
            return
        each()
        page.wait_for_timeout(1000)
    raise AssertionError("waited in vain")


def film(screenshots: list[bytes]) -> None:
    "Screenshots as a small animation, all in the colours of the last."
    frames = [Image.open(io.BytesIO(data)).convert("RGB") for data in screenshots]
    frames = [frame.resize((frame.width * 7 // 10, frame.height * 7 // 10), Image.Resampling.LANCZOS) for frame in frames]
    colors = frames[-1].quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1)  # rare colours too: marks, the colour bar
    first, *others = [frame.quantize(palette=colors, dither=Image.Dither.NONE) for frame in frames]
    first.save(PICTURES / "search.gif", save_all=True, append_images=others, duration=[500] * len(others) + [3000], loop=0, optimize=True)


def test_pictures(page, place):
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.set_viewport_size({"width": 1340, "height": 1900})
    run_cell(page, 0, 1)
    run_cell(page, 1, 2)
    say(page, "press Start")
    generations(page, place, 1)
    tab(page, "Settings")
    put(page, "offspring (λ)", "12")
    press(page, "Apply 1 change")
    tab(page, "Edit")
    change(page, 8, "Freeze", 1)
    tab(page, "Progress")
    frames, area = [], box(page)
    press(page, "Resume")
    until(page, place, lambda history: len(history.line) >= 3, lambda: frames.append(page.screenshot(clip=area, scale="css")))
    film(frames)
    press(page, "Pause")
    badge(page, "paused")
    note(page, "MLP 3 looks expendable")
    tab(page, "Edit")
    change(page, 11, "Keep less", 2)
    change(page, 15, "Keep more", 1)
    press(page, "Fit to budget")
    press(page, "Inject")
    tab(page, "Progress")
    press(page, "Resume")
    until(page, place, lambda history: len(history.line) >= 4 and history.state["stage"] == 2)
    page.wait_for_timeout(2500)  # for the picture of the stages
    shoot(page, "running")
    press(page, "Pause")
    badge(page, "paused")
    theme(page, "Dark")
    tab(page, "Candidates")
    press(page, "Continue")
    expect(page.locator(".evo-pair").last).to_be_visible()
    page.wait_for_timeout(5000)
    tab(page, "Edit")
    change(page, 2, "Keep less", 1)
    change(page, 13, "Keep more", 1)
    page.wait_for_timeout(2000)
    shoot(page, "steering-dark")
