"""The panel without a browser: clicks queue commands, the view follows the run directory, and every state looks intended."""
import gc
import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace

import ipywidgets as widgets
import numpy as np
import pytest
from helpers import by, made_up, short_config, small_pools

from evoprune_nb.genome import Genome
from evoprune_nb.history import History
from evoprune_nb.replay import replay
from evoprune_nb.runlog import write_state
from evoprune_nb.search import Search
from evoprune_nb.selection import Stage
from evoprune_nb.source import Source
from evoprune_nb.target import plan_budget
from evoprune_nb.ui import session, workbench
from evoprune_nb.ui.session import check_unchanged, heldout_losses, run_state, run_status
from evoprune_nb.ui.workbench import Workbench, attach, open_run
from evoprune_nb.ui.worker import Worker

WAIT = 60  # seconds, after which a test that waits for an event fails


class Gate:
    "An evaluator that waits for permission, and tells when it waits."

    def __init__(self, open: bool = False):
        self.waiting, self._allowed, self.opened = threading.Semaphore(0), threading.Semaphore(0), open

    def __call__(self, genome, generation, stage):
        if not self.opened:
            self.waiting.release()
            assert self._allowed.acquire(timeout=WAIT)
        return made_up(genome, generation, stage)

    def arrive(self) -> None:
        "Wait until an evaluation is under way."
        assert self.waiting.acquire(timeout=WAIT)

    def let(self) -> None:
        "Let it end."
        self._allowed.release()

    def open(self) -> None:
        "Let all end, from now on."
        self.opened = True
        self._allowed.release(1000)


def until(condition) -> None:
    "Wait for something that another thread does."
    never = threading.Event()
    for _ in range(100 * WAIT):
        if condition():
            return
        never.wait(0.01)
    raise AssertionError("waited in vain")


@pytest.fixture
def bench(small, tmp_path):
    "Makes panels over one run directory; all workers have ended afterwards."
    made, gates = [], []

    def make(evaluator=None, run_dir=tmp_path / "run", **changes) -> Workbench:
        evaluator = evaluator or Gate(open=True)
        gates.append(evaluator)
        panel = Workbench(run_dir, lambda say: (Search(run_dir, *small, small_pools(), short_config(**changes), evaluator=by(evaluator)), None), refresh_seconds=None)
        made.append(panel)
        return panel

    yield make
    for gate in gates:
        if isinstance(gate, Gate):
            gate.open()
    for panel in made:
        panel.driver.background.join()
        panel.driver.measuring.join()
        if panel.driver.driving:
            panel.worker.send({"command": "stop"})
            assert panel.worker.join(WAIT)


def prepared(panel: Workbench) -> Workbench:
    panel.prepare()
    panel.driver.background.join()
    panel.refresh()
    return panel


def started(panel: Workbench) -> Workbench:
    panel.run.start.click()
    panel.driver.background.join()
    panel.refresh()
    return panel


def finished(panel: Workbench) -> Workbench:
    started(panel)
    assert panel.worker.join(WAIT)
    panel.refresh()
    return panel


def text(widget: widgets.HTML) -> str:
    return re.sub(r"<[^>]+>", " ", re.sub(r"<svg.*?</svg>", "", widget.value, flags=re.DOTALL))


def tree(widget) -> list:
    "A widget and everything in it."
    return [widget] + [part for child in getattr(widget, "children", ()) for part in tree(child)]


def test_nothing_there_yet(bench):
    "An empty directory: one can start, and nothing else; the cards say that there is nothing to show."
    panel = bench()
    assert run_status(panel.driver) == "empty" and "Start begins the search" in text(panel.head)
    assert not panel.run.start.disabled and panel.run.pause.disabled and panel.run.stop.disabled and panel.run.add_note.disabled
    assert all("To come" in text(panel.gallery.views[name]) for name in ("fitness", "genome", "stages", "lineage"))


def test_prepared(bench):
    "Once prepared: settings and genome can be seen and changed, and no evaluation was made."
    panel = prepared(bench())
    assert run_status(panel.driver) == "stopped" or run_status(panel.driver) == "ready"
    assert panel.history.evaluations.empty and panel.steering.editor and panel.steering.form.fields["offspring"].number == 4
    assert "press Start" in text(panel.run.say)


def test_a_click_is_answered_before_the_evaluation_ends(bench):
    "While an evaluation is under way, Pause is acknowledged at once, and applied when it ends."
    gate = Gate()
    panel = started(bench(gate))
    gate.arrive()
    panel.refresh()
    assert run_status(panel.driver) == "running" and not panel.run.pause.disabled and "driven by this kernel" in text(panel.head)
    panel.run.pause.click()
    assert "queued: pause" in text(panel.run.say) and run_status(panel.driver) == "running"
    gate.let()
    until(lambda: run_state(panel.run_dir)["status"] == "paused")
    panel.refresh()
    assert "applied: pause" in text(panel.run.say) and panel.run.start.description == "Resume" and not panel.run.start.disabled and panel.run.pause.disabled
    assert len(panel.history.evaluations) == 1


def test_steps(bench):
    "One evaluation, then one whole generation, then resume to the end."
    panel = prepared(bench())
    panel.run.step.click()
    panel.driver.background.join()
    until(lambda: run_state(panel.run_dir).get("status") == "paused")
    panel.refresh()
    assert len(panel.history.evaluations) == 1
    panel.run.step_generation.click()
    until(lambda: panel.history.refresh() and len(panel.history.line) == 1 and run_state(panel.run_dir)["status"] == "paused")
    panel.run.start.click()
    assert panel.worker.join(WAIT)
    panel.refresh()
    assert run_status(panel.driver) == "finished" and panel.run.start.disabled and "step: one generation" in text(panel.gallery.views["log"])


def test_settings(bench):
    "Changed fields become one command each; the form follows the rules; an impossible setting is refused and nothing is queued."
    gate = Gate()
    panel = started(bench(gate))
    gate.arrive()
    form = panel.steering.form
    assert form.apply.disabled
    form.fields["offspring"].value = "6"
    form.fields["lr"].value = "2e-3"
    assert form.apply.description == "Apply 2 changes" and not form.apply.disabled
    form.apply.click()
    form.fields["offspring"].value = "1"
    form.apply.click()
    said = text(form.say.widget)
    assert "refused" in said and "narrow" in said and "evo-refused" in form.fields["offspring"]._dom_classes and text(panel.run.say).strip() == "started"
    form.fields["offspring"].value = "5"
    assert "refused" not in text(form.say.widget) and "evo-refused" not in form.fields["offspring"]._dom_classes
    gate.open()
    assert panel.worker.join(WAIT)
    panel.refresh()
    assert (panel.history.rules.offspring, panel.history.rules.lr) == (6, 0.002)
    assert panel.history.commands.name.tolist() == ["set", "set"]
    form.undo.click()
    assert form.fields["offspring"].number == 6 and form.apply.disabled


def test_fewer_offspring_come_after_their_stages(bench):
    "Stages and a smaller λ changed together are sent in the order in which each is valid."
    panel = prepared(bench())
    panel.steering.form.fields["offspring"].value = "1"
    panel.steering.form.stages.value = (Stage(1, 0, 32),)
    assert list(panel.steering.form.changes()) == ["stages", "offspring"]
    panel.steering.form.apply.click()
    assert "refused" not in text(panel.steering.form.say.widget)
    finished(panel)
    assert panel.history.rules.offspring == 1 and len(panel.history.rules.stages) == 1


def test_a_draft_is_edited_and_injected(bench):
    "Cells select; levels go into the draft with its size shown; only a draft within the budget can be injected; it joins the next generation."
    gate = Gate()
    panel = started(bench(gate))
    gate.arrive()
    panel.refresh()
    editor, space = panel.steering.editor, panel.history.space
    assert editor.inject.disabled and "same as the parent" in text(editor.size)
    editor.cells[3].click()
    assert editor.selected == 3 and space.units[3].name in text(editor.tools.what) and "evo-selected" in editor.cells[3]._dom_classes
    editor.set_level(0)
    assert "evo-changed" in editor.cells[3]._dom_classes and "too many" in text(editor.size) and editor.inject.disabled
    assert editor.cells[3].description == f"▲{space.kept(3, 0)}"
    editor.adjust.click()
    assert "fits" in text(editor.size) and editor.draft.levels[3] == 0 and not editor.inject.disabled
    code = editor.draft.code
    editor.inject.click()
    assert "queued: inject" in text(editor.say.widget)
    gate.open()
    assert panel.worker.join(WAIT)
    panel.refresh()
    assert panel.history.generations.injected.tolist()[1] == [code]
    editor.reset.click()
    assert editor.draft == editor.parent


def test_showing_a_unit_edits_nothing(bench):
    "The slider follows the unit that is shown; only a hand on it changes the draft."
    editor = prepared(bench()).steering.editor
    edits, change = [], editor.load
    editor.load = lambda genome: (edits.append(genome), change(genome))
    start = editor.draft
    editor.set_level(0)
    assert len(edits) == 1 and editor.tools.level.value == 0
    for index, cell in enumerate(editor.cells):
        cell.click()
        assert editor.tools.level.value == editor.draft.levels[index]
    assert len(edits) == 1 and editor.draft.levels[1:] == start.levels[1:]
    editor.tools.level.value = editor.space.n_levels(index) - 1
    assert len(edits) == 2 and editor.draft.levels[index] == editor.tools.level.value


def test_a_click_while_the_view_is_redrawn(bench):
    "News of the run, shown by another thread at the moment of a click, change no draft and hide no selection."
    editor = prepared(bench()).steering.editor
    editor.set_level(0)
    arrived, clicked, show = threading.Event(), threading.Event(), editor.tools.show

    def slow(*what) -> None:
        if threading.current_thread() is news:
            arrived.set()
            clicked.wait(1)
        show(*what)

    editor.tools.show = slow
    frozen = [editor.space.units[0].name]
    news = threading.Thread(target=editor.follow, args=(editor.parent, editor.budget, frozen, True))
    news.start()
    assert arrived.wait(WAIT)
    editor.cells[3].click()
    editor.tools.more.click()
    clicked.set()
    news.join(WAIT)
    wanted = list(editor.parent.levels)
    wanted[0], wanted[3] = 0, wanted[3] - 1
    assert list(editor.draft.levels) == wanted and editor.tools.level.value == wanted[3]
    assert editor.space.units[3].name in text(editor.tools.what) and "frozen" not in text(editor.tools.what)


def test_freeze_and_thaw(bench):
    "The selected unit is frozen and thawed by commands; the cell shows it once the run knows it."
    panel = prepared(bench())
    panel.steering.editor.select(2)
    name = panel.history.space.units[2].name
    panel.steering.editor.freeze.click()
    panel.run.step.click()
    panel.driver.background.join()
    until(lambda: panel.history.refresh() and panel.history.rules.frozen == (name,))
    panel.refresh()
    assert "evo-frozen" in panel.steering.editor.cells[2]._dom_classes and panel.steering.editor.freeze.description == "Thaw" and "frozen" in panel.steering.editor.cells[2].tooltip
    panel.steering.editor.freeze.click()
    finished(panel)
    assert panel.history.rules.frozen == () and "evo-frozen" not in panel.steering.editor.cells[2]._dom_classes


def test_two_panels_agree(bench):
    "Two panels on one run share its worker; either steers, both show the same."
    gate = Gate()
    first = started(bench(gate))
    gate.arrive()
    second = bench(gate)
    assert second.driver.driving and second.worker is first.worker
    second.run.pause.click()
    gate.let()
    until(lambda: run_state(first.run_dir)["status"] == "paused")
    first.refresh(), second.refresh()
    assert first.run.start.description == second.run.start.description == "Resume"
    first.run.note.value = "from the first"
    first.run.add_note.click()
    second.run.start.click()
    gate.open()
    assert first.worker.join(WAIT)
    for panel in (first, second):
        panel.gallery.urgent = True
        panel.refresh()
    assert first.head.value == second.head.value and first.run.stats.value == second.run.stats.value
    assert first.gallery.views["log"].value == second.gallery.views["log"].value and "from the first" in text(first.gallery.views["log"])


def test_the_slider_moves_every_card(bench):
    "At an earlier moment all cards show the run as it was; Live goes back to the present."
    panel = finished(bench())
    present = {name: view.value for name, view in panel.gallery.views.items()}
    assert panel.moment.slider.max == 3 and panel.moment.live.value
    panel.moment.slider.value = 1
    panel.refresh()
    assert not panel.moment.live.value and "generation 1" in str(panel.gallery.views["stages"].value) or panel.gallery.views["stages"].value != present["stages"]
    assert all(panel.gallery.views[name].value != present[name] for name in ("fitness", "stages", "lineage", "tokens", "budget"))
    panel.moment.live.value = True
    panel.gallery.urgent = True
    panel.refresh()
    assert panel.moment.slider.value == 3 and panel.gallery.views["budget"].value == present["budget"]


def test_branch_from_a_moment(bench):
    "A finished run is taken up again from an earlier moment, on a new branch."
    panel = finished(bench())
    panel.moment.slider.value = 1
    panel.refresh()
    assert not panel.moment.back.disabled
    panel.moment.back.click()
    panel.driver.background.join()
    assert panel.worker.join(WAIT)
    panel.refresh()
    assert panel.history.line == [(0, 0), (1, 1), (1, 2)] and "branch 1" in text(panel.run.stats)


def test_an_error_is_shown_folded_and_escaped(bench):
    "A failing evaluation: one line in sight, the traceback folded, nothing of it taken for HTML; Start tries again."
    def broken(genome, generation, stage):
        raise RuntimeError("no <b>memory</b> left")

    panel = started(bench(broken))
    assert panel.worker.join(WAIT)
    panel.refresh()
    assert run_status(panel.driver) == "failed" and "<details>" in panel.run.failure.value and "no &lt;b&gt;memory&lt;/b&gt; left" in panel.run.failure.value
    assert not panel.run.start.disabled


def test_a_failed_preparation_is_shown(tmp_path):
    "An error before there is a run: shown in the same way."
    def make(say):
        say("loading the model")
        raise ValueError("no model 'nowhere'")

    panel = Workbench(tmp_path / "run", make, refresh_seconds=None)
    panel.prepare()
    panel.driver.background.join()
    panel.refresh()
    assert run_status(panel.driver) == "failed" and "no model" in text(panel.run.failure)


def test_attach_to_a_finished_run(bench):
    "A run that says nothing of its source is view only: no control can be used, the slider can."
    finished(bench())
    bench_dir = bench().run_dir
    script = f"""
import sys
from evoprune_nb.ui.session import run_status
from evoprune_nb.ui.workbench import attach
panel = attach({str(bench_dir)!r})
panel.close()
panel.refresh()
assert run_status(panel.driver) == "finished" and "view only" in panel.head.value, panel.head.value
assert panel.run.start.disabled and panel.run.step.disabled and panel.moment.back.disabled and panel.steering.form.apply.disabled and panel.steering.editor.freeze.disabled
assert not panel.moment.slider.disabled and panel.moment.slider.max == 3
sys.exit("pyplot" if "matplotlib.pyplot" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_attach_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="is no run directory"):
        attach(tmp_path)


def test_driven_elsewhere(bench):
    "While another process drives the run, the panel only looks, and says who drives."
    panel = bench()
    prepared(panel)
    write_state(panel.run_dir, "running", generation=0, stage=0, candidate=None, parent=panel.history.start.code, branch=0, error=None)
    state = json.loads((panel.run_dir / "state.json").read_text())
    (panel.run_dir / "state.json").write_text(json.dumps(state | {"pid": os.getppid()}))
    panel.refresh()
    assert f"view only: driven by process {os.getppid()}" in text(panel.head)
    assert panel.run.start.disabled and panel.run.step.disabled and panel.steering.form.apply.disabled and panel.steering.editor.inject.disabled


def test_what_stays_the_same_sends_nothing(bench):
    "A refresh without news changes no trait of any widget."
    panel = finished(bench())
    panel.gallery.urgent = True
    panel.refresh()
    changed = []
    for widget in tree(panel.widget):
        widget.observe(lambda change: changed.append((type(change["owner"]).__name__, change["name"])))
    panel.gallery.urgent = True
    panel.refresh()
    assert changed == []


def test_every_control_explains_itself(bench):
    "All controls have tooltips, and nothing is an Output widget."
    panel = prepared(bench())
    kinds = (widgets.Button, widgets.ToggleButton, widgets.Dropdown, widgets.Text, widgets.IntSlider, widgets.FloatText)
    controls = [widget for widget in tree(panel.widget) if isinstance(widget, kinds)]
    assert len(controls) > 30 and [control for control in controls if not control.tooltip] == []
    assert not [widget for widget in tree(panel.widget) if isinstance(widget, widgets.Output)]


def test_the_run_is_that_of_a_search_without_a_panel(bench, small, tmp_path):
    "A run driven by the panel, untouched, ends with the genome of `Search.run`."
    panel = finished(bench())
    alone = Search(tmp_path / "alone", *small, small_pools(), short_config(), evaluator=by(made_up))
    assert alone.run(progress=False) == History(panel.run_dir).winner


@pytest.mark.parametrize("name, typed, why", [
    ("offspring", "-1", "from 1 to 10,000"), ("offspring", "3.7", "whole number"), ("offspring", "1e12", "10,000"), ("offspring", "", "whole number"),
    ("offspring", "1,5", "whole number"), ("generations", "0", "at least"), ("lr", "-1", "above 0"), ("lr", "nan", "a number")])
def test_a_number_is_refused_as_it_was_typed(bench, name, typed, why):
    "Nothing is rounded, clamped or cut: what cannot be is refused beside the fields, in words, and its field is marked."
    panel = prepared(bench())
    form = panel.steering.form
    form.fields[name].value = typed
    form.apply.click()
    assert why in text(form.say.widget) and form.fields[name].value == typed and "evo-refused" in form.fields[name]._dom_classes
    assert not (panel.run_dir / "queue.json").exists()
    form.undo.click()
    assert not text(form.say.widget).strip() and "evo-refused" not in form.fields[name]._dom_classes


def test_exponents_are_read_and_shares_above_one_refused(bench):
    panel = prepared(bench())
    form = panel.steering.form
    form.fields["offspring"].value, form.target.limits["flops"].value = "1e1", "2"
    form.apply.click()
    assert "queued: offspring → 10" in text(form.say.widget) and "refused" in text(form.say.widget)
    assert "evo-refused" in form.target.limits["flops"]._dom_classes and "evo-refused" not in form.fields["offspring"]._dom_classes


def test_what_is_hardly_meant_is_asked_about(bench):
    "A learning rate of a billion, or a stage that scores less than a block: sent when Apply is pressed again."
    form = prepared(bench()).steering.form
    form.fields["lr"].value = "1e9"
    form.stages.value = (Stage(2, 0, 32), Stage(1, 64, 10))
    form.apply.click()
    assert "far from" in text(form.say.widget) and "less than a block of 16" in text(form.say.widget) and not form.apply.disabled
    form.apply.click()
    assert text(form.say.widget).count("queued") == 2


def test_no_fewer_generations_than_are_done(bench):
    panel = finished(bench())
    panel.steering.form.fields["generations"].value = "2"
    assert "at least 3" in text(panel.steering.form.say.widget) and panel.steering.form.apply.disabled


def test_a_finished_run_goes_on(bench):
    "More generations wait, are listed, and let Start be pressed."
    panel = finished(bench())
    assert panel.run.start.disabled and "more generations take it up again" in text(panel.head)
    panel.steering.form.fields["generations"].value = "4"
    panel.steering.form.apply.click()
    panel.refresh()
    assert "waits until Start is pressed" in text(panel.steering.form.say.widget) and "Waiting until Start is pressed: generations → 4" in " ".join(text(panel.run.waiting).split()) and not panel.run.start.disabled
    finished(panel)
    assert len(panel.history.line) == 4 and not panel.run.waiting.value and panel.run.start.disabled and "applied: generations → 4" in text(panel.steering.form.say.widget)


def test_a_run_of_another_kernel_is_loaded_when_it_is_needed(bench):
    "Attached without model and text, every control can be used: the first that needs them loads them."
    first = finished(bench())
    first.driver._worker = None
    gc.collect()
    panel = bench()
    assert panel.worker is None and "load the model first" in text(panel.head) and not panel.steering.editor.freeze.disabled
    panel.steering.form.fields["generations"].value = "4"
    panel.steering.form.apply.click()
    panel.driver.background.join()
    panel.refresh()
    assert panel.worker is not None and "queued: generations → 4" in text(panel.steering.form.say.widget) and not panel.run.start.disabled
    assert "stopped" not in text(panel.run.say)


def test_another_search_in_the_same_directory_is_refused(small, tmp_path):
    "At once, with what differs, also where this kernel has the run open with another text."
    run_dir, source = tmp_path / "run", Source(seq_len=16)
    search = Search(run_dir, *small, small_pools(), short_config(), evaluator=by(made_up), source=source)
    check_unchanged(run_dir, source, search.config)
    with pytest.raises(ValueError, match=r"config.offspring \(4 there, 6 here\)"):
        open_run(run_dir, source, short_config(offspring=6))
    worker = Worker(search)
    with pytest.raises(ValueError, match=r"open with another source: seq_len \(16 there, 32 here\)"):
        open_run(run_dir, Source(seq_len=32), search.config)
    assert worker.search is search


def test_how_good_the_model_is_comes_first(bench):
    "Dense, uniform and now in held-out perplexity with its error, above the fold; of any candidate on demand; kept with the run."
    panel = prepared(bench())
    panel.driver.measuring.join()
    panel.refresh()
    said = text(panel.run.quality)
    assert all(word in said for word in ("dense", "uniform", "now", "±", "+0.0 %", "48 tokens"))
    finished(panel)
    panel.candidate.choice.value = code = panel.candidate.choice.options[-1][1]
    panel.refresh()
    assert "–" in text(panel.candidate.quality) and not panel.candidate.measure.disabled
    panel.candidate.measure.click()
    panel.driver.background.join()
    panel.refresh()
    assert "–" not in text(panel.candidate.quality) and panel.candidate.measure.disabled
    kept = json.loads((panel.run_dir / "quality.json").read_text())["blocks"]
    dense, untuned = kept[panel.history.space.genome([0] * len(panel.history.space.units)).code], kept[code]
    assert heldout_losses(panel.worker.search.inputs, Genome.parse(code)) == untuned and dense != untuned


def test_the_gain_has_the_error_of_the_paired_difference(bench):
    "Of the differences block by block, not of two separate errors; once measured, a fresh panel knows it without a model."
    panel = finished(bench())
    panel.candidate.choice.value = code = panel.candidate.choice.options[-1][1]
    panel.refresh()
    panel.candidate.measure.click()
    panel.driver.background.join()
    panel.driver.measuring.join()
    panel.refresh()
    uniform = plan_budget(panel.history.space, panel.history.rules.target)[1].code
    inputs = panel.worker.search.inputs
    mine, theirs = (np.array(heldout_losses(inputs, Genome.parse(genome))) for genome in (code, uniform))
    difference, error = (mine - theirs).mean(), (mine - theirs).std(ddof=1) / len(mine) ** 0.5
    assert panel.driver.quality.gain(code, uniform) == pytest.approx((difference, error))
    words = f"{100 * (math.exp(difference) - 1):+.1f} % ± {100 * math.exp(difference) * error:.2g}"
    assert words in " ".join(text(panel.candidate.quality).split())
    fresh = Workbench(panel.run_dir, refresh_seconds=None)
    fresh.candidate.choice.value = code
    fresh.refresh()
    assert words in " ".join(text(fresh.candidate.quality).split())


def test_the_winner_so_far_was_scored_in_the_last_stage(bench):
    "While the second generation is in its first stage, the winner is still the first one's."
    gate = Gate()
    panel = started(bench(gate))
    n = sum(panel.history.rules.candidates) + 1
    for _ in range(n):
        gate.arrive()
        gate.let()
    gate.arrive()
    panel.refresh()
    assert panel.history.generation == 1 and len(panel.history.evaluations) == n and panel.shown == panel.history.winner.code == panel.history.survivors.genome[0]
    assert panel.candidate.choice.options[0][0] == "the winner so far"


def test_what_waits_for_the_next_generation_is_not_called_applied(bench):
    gate = Gate()
    panel = started(bench(gate))
    gate.arrive()
    panel.steering.form.fields["offspring"].value = "6"
    panel.steering.form.apply.click()
    gate.let()
    gate.arrive()
    panel.refresh()
    assert "accepted: offspring → 6; in force from generation 2 on" in text(panel.steering.form.say.widget)
    assert "From generation 2 on: offspring → 6" in " ".join(text(panel.run.waiting).split())
    gate.open()
    assert panel.worker.join(WAIT)
    panel.refresh()
    assert not panel.run.waiting.value


def test_what_another_candidate_wrote_is_gone(bench):
    panel = finished(bench())
    panel.candidate.of, panel.candidate.answer.value = panel.shown, "its words"
    panel.refresh()
    assert panel.candidate.answer.value == "its words"
    panel.candidate.choice.value = panel.candidate.choice.options[-1][1]
    panel.refresh()
    assert panel.candidate.answer.value == "" or panel.shown == panel.history.winner.code


def test_a_branch_says_what_it_keeps(bench):
    panel = prepared(bench())
    panel.steering.form.fields["offspring"].value = "5"
    finished(panel)
    panel.steering.form.fields["offspring"].value = "6"
    panel.steering.form.apply.click()
    panel.moment.slider.value = 1
    panel.refresh()
    assert "winner of then, under the settings in force now" in text(panel.moment.keeps) and "changed since then" not in text(panel.moment.keeps)
    panel.moment.back.click()
    panel.driver.background.join()
    assert panel.worker.join(WAIT)
    panel.refresh()
    panel.moment.slider.value = 1
    panel.refresh()
    assert "changed since then: offspring" in text(panel.moment.keeps) and "applied: back to generation 2" in text(panel.moment.say.widget)


def test_pictures_say_their_values(bench):
    "Marks of fitness, stages and genome have titles."
    panel = finished(bench())
    panel.gallery.urgent = True
    panel.refresh()
    shown = {name: re.findall("<title>(.*?)</title>", panel.gallery.views[name].value) for name in ("fitness", "stages", "genome")}
    evaluations, units = panel.history.evaluations, panel.history.space.units
    assert sum("stage 1" in words for words in shown["fitness"]) == (evaluations[evaluations.disqualified == ""].stage == 0).sum()
    assert any(re.search(r"c\d, generation 3, stage 2: .*, rank 1", words) for words in shown["stages"])
    assert len(shown["genome"]) == 2 * len(units) and shown["genome"][0].startswith("attn.00: keeps")


def test_units_are_timed_only_when_a_limit_or_the_source_asks(small, tmp_path, monkeypatch):
    class Made(Source):
        load_model = lambda self: (small[0], None)
        load_pools = lambda self, *_, **__: small_pools()
        build_database = lambda self, *_, **__: small[1]

    class Timed(Exception):
        pass

    def measure(*_, **__):
        raise Timed

    monkeypatch.setattr(session, "measure_unit_latency", measure)
    session.prepare_search(Made(), tmp_path / "a", short_config(), lambda _: None)
    for made, config in ((Made(latency=True), short_config()), (Made(), short_config(limits={"latency": 0.7}))):
        with pytest.raises(Timed):
            session.prepare_search(made, tmp_path / "b", config, lambda _: None)


def test_latency_can_be_limited_once_the_units_are_timed(bench, small, tmp_path, monkeypatch):
    "The settings say that, and offer it; then there is a field, the run keeps the prices, and goes on and repeats without a table."
    model, database = small

    def timed(search):
        space = search.space
        costs = tuple(tuple(float(kept) for kept in row) for row in space.costs["params"])
        return replace(space, costs=space.costs | {"latency": costs}, fixed=space.fixed | {"latency": 1.0})

    monkeypatch.setattr(workbench, "timed_space", timed)
    panel = finished(bench(generations=2))
    says = lambda: " ".join(text(part) for part in tree(panel.steering.form_box) if isinstance(part, widgets.HTML))
    assert "latency" not in panel.steering.form.target.limits and "Time the units" in says() and panel.candidate.time_units in tree(panel.steering.form_box)
    panel.candidate.time_units.click()
    panel.driver.background.join()
    panel.refresh()
    form = panel.steering.form
    assert "Time the units" not in says() and panel.candidate.time_units.disabled and "estimated latency" in text(panel.gallery.views["costs"])
    form.target.limits["latency"].value, form.fields["generations"].value = "0.55", "4"
    form.apply.click()
    panel.refresh()
    assert not panel.run.start.disabled
    history = finished(panel).history
    assert "latency" not in database.space.costs, "others who hold the database do not see it"
    cost, dense = history.space.cost(history.winner, "latency"), history.space.dense_cost("latency")
    assert history.finished and history.generation == 4 and cost <= 0.55 * dense
    assert History(panel.run_dir).space.cost(history.winner, "latency") == cost
    config = short_config(generations=2)
    again = Search(panel.run_dir, model, database, small_pools(), config, by(made_up))
    assert again.parent == history.winner
    assert replay(panel.run_dir, tmp_path / "replayed", model, database, small_pools(), False, by(made_up)) == history.winner


def test_levels_have_buttons_where_their_cost_is_known(bench):
    "Pressed, a level is the draft's; without measurements there are none."
    editor = prepared(bench()).steering.editor
    assert editor.tools.strip.children == ()
    editor.follow(editor.parent, editor.budget, editor.frozen, True, [[0.1 * level for level in range(editor.space.n_levels(i))] for i in range(len(editor.space.units))])
    editor.cells[2].click()
    levels = editor.tools.strip.children
    assert len(levels) == editor.space.n_levels(2) and levels[1].description == f"{editor.space.kept(2, 1)}: +0.100" and "attn.02 at level 1" in levels[1].tooltip
    levels[1].click()
    assert editor.draft.levels[2] == 1 and "evo-selected" in levels[1]._dom_classes and "evo-changed" in editor.cells[2]._dom_classes
