"""The workbench in a real JupyterLab, in a real browser: steered by mouse and keyboard, reloaded, restarted, replayed.

The tests of this file are one story, told in order. Screenshots of the main states are kept in `tests/screenshots`."""
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from evoprune_nb.history import History

ROOT = Path(__file__).parent.parent
SHOTS = Path(__file__).parent / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
WAIT = 240_000  # milliseconds, after which a wait fails
KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext"

SMALL = """
source = Source(text={corpus!r}, seq_len=64, calibration_tokens=2048)
config = SearchConfig(generations=4, offspring=5, stages=(Stage(3, 0, 256), Stage(1, 256, 512)), training=Training(lr=1e-3), heldout_tokens=512)
run_dir = {run_dir!r}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus) -> Path:
    "A folder with the workbench notebook, made small: another cell after the settings changes them."
    root = tmp_path_factory.mktemp("lab")
    notebook = nbformat.read(ROOT / "nbs" / "workbench.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells[0].source += SMALL.format(corpus=str(corpus), run_dir=str(root / "run"))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, root / "workbench.ipynb")
    quiet = root / ".settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    return root


@pytest.fixture(scope="module")
def server(place) -> str:
    "The address of a JupyterLab of our own, as Galata sets one up: no token, the application exposed, nothing of the user's settings."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"JUPYTER_CONFIG_DIR": ".config", "JUPYTER_RUNTIME_DIR": ".runtime", "IPYTHONDIR": ".ipython", "JUPYTERLAB_SETTINGS_DIR": ".settings", "JUPYTERLAB_WORKSPACES_DIR": ".workspaces"}
    environment = os.environ | {name: str(place / folder) for name, folder in own.items()} | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={place}",
               "--LabApp.expose_app_in_browser=True", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(place / "server.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status")
                break
            except OSError:
                assert process.poll() is None, (place / "server.log").read_text()[-2000:]
                threading.Event().wait(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def page(server) -> Page:
    "The notebook, open, with its kernel ready."
    assert CHROMIUM, "no chromium found; `make test` installs it"
    SHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 2350})
        page.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)
        page.goto(f"{server}/doc/tree/workbench.ipynb")
        ready(page)
        yield page
        browser.close()


def ready(page: Page) -> None:
    "Wait for the notebook and its kernel."
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(f"window.jupyterapp && {KERNEL}?.session?.kernel?.status === 'idle'")


def run_cell(page: Page, index: int, prompt: int) -> None:
    "Run one cell; a run right after the first sign of an idle kernel may be lost, so it is asked for until its number appears."
    done = f"document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')[{index}]?.textContent.trim() === '[{prompt}]:'"
    for _ in range(30):
        page.evaluate(f"async () => {{ const panel = window.jupyterapp.shell.currentWidget; panel.content.activeCellIndex = {index}; await window.jupyterapp.commands.execute('notebook:run-cell'); }}")
        try:
            page.wait_for_function(done, timeout=3000)
            return
        except Exception:  # not run, or still running
            if page.evaluate(done.replace(f"[{prompt}]:", "[*]:")):
                page.wait_for_function(done)
                return
    raise AssertionError(f"cell {index} was not run")


def press(page: Page, label: str) -> None:
    page.locator(".evo button", has_text=re.compile(rf"^\s*{label}\s*$")).last.click()


def say(page: Page, words: str, place: str = "run") -> None:
    "What is said beside the buttons of a place."
    expect(page.locator(f".evo-say-{place}").last).to_contain_text(words)


def tab(page: Page, name: str) -> None:
    page.locator(".evo .lm-TabBar-tabLabel", has_text=re.compile(f"^{name}$")).last.click()


def put(page: Page, label: str, value: str) -> None:
    "Type into a field of the panel."
    field = page.get_by_label(label, exact=True).last
    field.fill(value)
    field.press("Enter")


def paused(page: Page, place: Path, condition) -> History:
    "Wait until the run is paused and has come to a state."
    for _ in range(WAIT // 100):
        history = History(place / "run")
        if history.state["status"] == "paused" and condition(history):
            badge(page, "paused")
            return history
        page.wait_for_timeout(100)
    raise AssertionError(f"waited in vain; the run is at {history.state}")


def badge(page: Page, status: str) -> None:
    expect(page.locator(".evo-title .evo-badge").last).to_have_text(status)


def shoot(page: Page, name: str) -> None:
    expect(page.get_by_text("Click to show javascript error")).to_have_count(0)
    page.screenshot(path=SHOTS / f"{name}.png")


def theme(page: Page, name: str) -> None:
    page.evaluate(f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {name}'}})")
    page.wait_for_function(f"document.body.dataset.jpThemeLight === '{str(name == 'Light').lower()}'")
    expect(page.locator("#jupyterlab-splash")).to_have_count(0)


def test_cells_return_at_once_and_the_panel_gets_ready(page):
    "Both cells are done before the level database is; then the panel says that one can start."
    run_cell(page, 0, 1)
    run_cell(page, 1, 2)
    expect(page.locator(".evo-title")).to_be_visible()
    shoot(page, "preparing")
    say(page, "press Start")
    expect(page.locator(".evo .evo-cell")).to_have_count(16)
    shoot(page, "ready")


def test_every_control_says_what_it_does(page):
    "Buttons, fields and sliders have a tooltip, of their own or of what holds them, and fields a label."
    silent = page.evaluate("() => [...document.querySelectorAll('.evo button, .evo input, .evo select, .evo .noUi-handle')].filter(control => !control.closest('.evo [title]')).map(control => control.outerHTML)")
    assert silent == []
    unnamed = page.evaluate("() => [...document.querySelectorAll('.evo input, .evo select')].filter(field => !field.labels.length && !field.placeholder).map(field => field.outerHTML)")
    assert unnamed == []


def test_start_pause_step(page, place):
    "Start, pause, and one more evaluation."
    press(page, "Start")
    badge(page, "running")
    expect(page.locator(".evo-figure[aria-label^=fitness] svg g#axes_1")).to_be_attached()
    shoot(page, "running")
    press(page, "Pause")
    badge(page, "paused")
    say(page, "applied: pause")
    before = len(History(place / "run").evaluations)
    press(page, "Step: evaluation")
    say(page, "applied: step")
    paused(page, place, lambda history: len(history.evaluations) > before)
    assert len(History(place / "run").evaluations) == before + 1


def test_edit_a_cell_and_inject(page):
    "By keyboard: a cell is focused and pressed, its level changed, the draft fitted to the budget and injected."
    tab(page, "Edit")
    cell = page.locator(".evo .evo-cell").nth(10)
    cell.focus()
    page.keyboard.press("Enter")
    expect(cell).to_have_class(re.compile("evo-selected"))
    more = page.locator(".evo button", has_text="Keep more")
    more.focus()
    page.keyboard.press("Enter")
    expect(cell).to_have_class(re.compile("evo-changed"))
    page.keyboard.press("Space")
    expect(page.locator(".evo", has_text="too many").last).to_be_visible()
    press(page, "Fit to budget")
    shoot(page, "draft")
    press(page, "Inject")
    say(page, "inject", "editor")


def test_change_the_settings(page, place):
    "λ from 5 to 7, from the next generation on; a note; then to the end of the second generation."
    tab(page, "Settings")
    put(page, "offspring (λ)", "7")
    press(page, "Apply 1 change")
    say(page, "offspring → 7; in force from generation", "settings")
    expect(page.locator(".evo-waiting").last).to_contain_text("offspring → 7")
    tab(page, "Record")
    note = page.get_by_placeholder("a note, kept with the run")
    note.fill("λ raised, one genome by hand")
    note.press("Tab")
    press(page, "Add note")
    say(page, "λ raised", "note")
    done = len(History(place / "run").line)
    press(page, "Step: generation")
    paused(page, place, lambda history: len(history.line) == done + 1)
    press(page, "Step: generation")
    generations = paused(page, place, lambda history: len(history.line) == done + 2).generations
    assert len(generations.injected[done + 1]) == 1 and len(generations.offspring[done + 1]) == 8


def test_a_wrong_setting_is_refused_at_once(page):
    "Beside the button, with the field marked; what no field of the browser would keep is kept as it was typed."
    tab(page, "Settings")
    field = page.get_by_label("offspring (λ)", exact=True).last
    put(page, "offspring (λ)", "2")
    press(page, "Apply 1 change")
    say(page, "refused", "settings")
    box, button = page.locator(".evo-refused").last, page.locator(".evo button", has_text=re.compile(r"^\s*Apply")).last
    expect(box).to_be_visible()
    assert "rgb(213, 94, 0)" in box.locator("input").evaluate("field => getComputedStyle(field).boxShadow")
    below = page.locator(".evo-say-settings").last.bounding_box()["y"] - button.bounding_box()["y"]
    assert 0 < below < 80, "the refusal stands beside Apply"
    shoot(page, "refused")
    put(page, "offspring (λ)", "3.7")
    say(page, "whole number", "settings")
    expect(field).to_have_value("3.7")
    press(page, "Reset")
    expect(page.locator(".evo-refused")).to_have_count(0)
    expect(field).to_have_value("7")
    tab(page, "Progress")


def test_the_run_bar_stays_in_sight(page):
    "In a window as JupyterLab gives it, the first screen says how good the model is and has a picture; the bar stays while one scrolls."
    page.set_viewport_size({"width": 960, "height": 950})
    page.locator(".evo-bar").last.evaluate("bar => bar.closest('.evo').scrollIntoView()")
    expect(page.locator(".evo-quality").first).to_contain_text("uniform")
    top = page.locator(".evo-quality").first.bounding_box()["y"]
    picture = page.locator(".evo-figure[aria-label^=fitness]").last.bounding_box()
    assert top < 300 and picture["y"] < 700
    shoot(page, "first-screen")
    page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollBy(0, 300)")
    page.wait_for_timeout(300)
    assert 0 <= page.locator(".evo-bar").last.bounding_box()["y"] < 130
    shoot(page, "scrolled")
    wide = page.evaluate("document.querySelector('.evo').scrollWidth - document.querySelector('.evo').clientWidth")
    assert wide <= 1, "nothing is wider than the panel"
    page.set_viewport_size({"width": 1400, "height": 2350})


def test_values_on_hover(page):
    "Marks of the pictures carry titles that the pointer reaches."
    mark = page.locator(".evo-figure[aria-label^=fitness] g[id^=hint] title").first
    expect(mark).to_be_attached()
    hit = page.evaluate("""() => { const use = document.querySelector('.evo-figure g[id^=hint] title').parentElement, box = use.getBoundingClientRect();
        const found = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2); return found && !!found.closest('g[id^=hint]'); }""")
    assert hit


def test_reload_keeps_everything(page, place):
    "After a reload of the page the panel is there, says the same, and still steers."
    stats = page.locator(".evo-stats").last.inner_text()
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.reload()
    ready(page)
    expect(page.locator(".evo-title .evo-badge").last).to_be_visible()
    assert page.locator(".evo-stats").last.inner_text().splitlines()[0] == stats.splitlines()[0]
    before = len(History(place / "run").evaluations)
    press(page, "Step: evaluation")
    say(page, "applied: step")
    paused(page, place, lambda history: len(history.evaluations) == before + 1)
    shoot(page, "paused-light")
    theme(page, "Dark")
    shoot(page, "paused-dark")
    page.set_viewport_size({"width": 640, "height": 5200})
    shoot(page, "narrow-dark")
    theme(page, "Light")
    page.set_viewport_size({"width": 1920, "height": 2350})
    shoot(page, "wide-light")
    page.set_viewport_size({"width": 1400, "height": 2350})


def test_restart_and_attach(page, place):
    "After a kernel restart, `attach` needs only the directory; Start goes on with the run to its end; the slider looks back."
    page.evaluate(f"{KERNEL}.session.kernel.restart()")
    page.wait_for_function(f"{KERNEL}.session.kernel.status === 'idle'")
    run_cell(page, 0, 1)
    page.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    run_cell(page, 2, 2)
    expect(page.locator(".evo-title").last).to_contain_text("nobody drives it now")
    shoot(page, "attached")
    press(page, "Start")
    badge(page, "finished")
    expect(page.locator(".evo-title").last).to_contain_text("look around with the slider")
    expect(page.locator(f".evo-figure[aria-label$=': {len(History(place / 'run').evaluations)} evaluations in all']").last).to_be_visible()
    shoot(page, "finished")
    slider = page.locator(".evo .jupyter-widget-slider .noUi-handle, .evo .slider-container .noUi-handle").first
    slider.focus()
    slider.press("Home")
    expect(page.locator(".evo-figure[aria-label*='of generation 1,']").last).to_be_visible()
    tab(page, "Candidates")
    expect(page.locator(".evo-figure[aria-label$='generations 0 to 1']").last).to_be_visible()
    shoot(page, "moment")


def test_replay_equals_the_steered_run(place):
    "What was steered by hand ends, replayed without hands, with the same genomes."
    from evoprune_nb.replay import replay
    from evoprune_nb.ui.session import prepare_search

    history = History(place / "run")
    assert history.finished and {"pause", "inject", "set", "note", "step"} <= set(history.commands.name)
    search, _ = prepare_search(history.source, place / "again", history.config, lambda _: None)
    winner = replay(place / "run", place / "replayed", search.model, search.database, search.pools, progress=False)
    again = History(place / "replayed")
    assert winner == history.winner and again.survivors.genome.tolist() == history.survivors.genome.tolist()
    assert again.evaluations.fitness.tolist() == history.evaluations.fitness.tolist()


def show(page: Page, code: str, prompt: int) -> None:
    "Let a panel made by other code take the place of the panels before."
    page.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    page.evaluate("code => window.jupyterapp.shell.currentWidget.content.widgets[1].model.sharedModel.setSource(code)", code)
    run_cell(page, 1, prompt)


def test_a_run_that_another_process_drives(page, place, corpus):
    "One can watch it, and look back; every control that would steer is off, and the panel says why."
    script = f"""
from evoprune_nb.selection import Stage
from evoprune_nb.config import SearchConfig
from evoprune_nb.source import Source
from evoprune_nb.ui.session import prepare_search
config = SearchConfig(generations=1000, offspring=5, stages=(Stage(3, 0, 256), Stage(1, 256, 512)))
source = Source(text={str(corpus)!r}, seq_len=64, calibration_tokens=2048)
prepare_search(source, "elsewhere", config)[0].run(progress=False)
"""
    with open(place / "elsewhere.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-c", script], cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)
    try:
        for _ in range(WAIT // 100):
            if (place / "elsewhere" / "config.json").exists() and History(place / "elsewhere").line:
                break
            assert process.poll() is None, (place / "elsewhere.log").read_text()
            page.wait_for_timeout(100)
        show(page, "attach('elsewhere')", 3)
        badge(page, "running")
        expect(page.locator(".evo-title").last).to_contain_text(f"view only: driven by process {process.pid}")
        for label in ("Start", "Pause", "Stop", "Step: evaluation", "Inject", "Apply"):
            expect(page.locator(".evo button", has_text=re.compile(rf"^\s*{label}\s*$")).last).to_be_disabled()
        expect(page.locator(".evo-figure[aria-label^='ranks'] svg").last).to_be_visible()
        shoot(page, "elsewhere")
    finally:
        process.kill()
        process.wait()
    expect(page.locator(".evo-title").last).to_contain_text("the process that drove it has ended; nobody drives it now; Start goes on")


def test_an_error_is_shown_with_its_traceback_folded(page):
    "What was wrong stands in the panel; the traceback opens by keyboard."
    show(page, "open_run('no-text', Source(text='missing.jsonl'), config)", 4)
    badge(page, "failed")
    expect(page.locator(".evo-error").last).to_contain_text("missing.jsonl")
    traceback = page.locator(".evo-error pre").last
    expect(traceback).to_be_hidden()
    shoot(page, "failed")
    page.locator(".evo-error summary").last.focus()
    page.keyboard.press("Enter")
    expect(traceback).to_be_visible()
    shoot(page, "failed-open")


def chosen_tab(page: Page, name: str) -> None:
    expect(page.locator(".evo .lm-TabBar-tab.lm-mod-current").last).to_have_text(name)


def test_candidates_and_units_are_pressed(page):
    "A row of the table of all candidates is chosen everywhere; a unit pressed in the map of importance goes to the editor."
    show(page, "attach('run')", 5)
    badge(page, "finished")
    tab(page, "All candidates")
    row = page.locator(".evo-grid:visible tbody tr").nth(2)
    row.click()
    expect(row).to_have_class(re.compile("selected"))
    name = row.locator("td").nth(3).inner_text()
    expect(page.locator(".evo-figure[aria-label='fitness against parameters'] svg").last).to_be_visible()
    shoot(page, "all-candidates")
    tab(page, "Candidates")
    expect(page.get_by_label("candidate", exact=True).last.locator("option:checked")).to_have_text(re.compile(rf"^{name}\b"))
    expect(page.locator(".evo-figure[aria-label*='of generation 1,']").last).to_be_attached()
    tab(page, "Importance")
    page.locator(".evo .evo-cell:visible").nth(5).click()
    expect(page.locator(".evo", has_text="attn.05: level").last).to_be_visible()
    expect(page.locator(".evo-figure[aria-label^='expected change of loss'] svg").last).to_be_visible()
    shoot(page, "importance")
    press(page, "Edit")
    chosen_tab(page, "Edit")
    expect(page.locator(".evo .evo-cell:visible").nth(5)).to_have_class(re.compile("evo-selected"))


def test_the_page_of_runs(page):
    "Rows are filtered and chosen, two runs compared, and one is opened below."
    show(page, "from evoprune_nb.ui.runs_page import open_runs\nopen_runs('.')", 6)
    grid = page.locator(".evo-grid").first
    rows = grid.locator("tbody tr")
    expect(rows).to_have_count(3)
    grid.get_by_placeholder("search all columns").fill("finished")
    expect(rows).to_have_count(2)
    rows.nth(0).click()
    expect(rows.nth(0)).to_have_class(re.compile("selected"))
    expect(page.locator(".evo-figure[aria-label='curves of the chosen runs'] svg").last).to_be_visible()
    shoot(page, "runs-compared")
    tab(page, "Pareto")
    expect(page.locator(".evo-figure[aria-label='heldout against params'] svg").last).to_be_visible()
    press(page, "Open")
    badge(page, "finished")
    expect(page.locator(".evo-quality").first).to_contain_text("uniform")
    shoot(page, "run-opened")
