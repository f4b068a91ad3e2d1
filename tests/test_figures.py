"""Pictures exist at every moment of a run, say what they show, and are the same bytes each time."""
import dataclasses
import math
import subprocess
import sys

import pandas as pd
import pytest
from helpers import by, made_up, short_config, small_pools

from evoprune_nb.paper.drawing import COLUMN, THEMES, Figure, plain, save_figure
from evoprune_nb.paper.figures import (
    comparison_figure, fitness_figure, genome_figure, lineage, lineage_figure, rank_changes, relative_fitness, sparsity_figure, stage_differences, stages_figure, swaps, tokens_figure)
from evoprune_nb.genome import Genome
from evoprune_nb.history import History
from evoprune_nb.search import Search

ROWS = [{"name": "uniform", "before": [72.2, 75.0], "after": [50.3, 51.0]}, {"name": "evolved", "before": [64.1, 63.0], "after": [47.1, 48.0]}]
STEPS = {"first candidate": 1, "open stage": 7, "second generation": 12, "finished": 1000}


@pytest.fixture(scope="module")
def histories(small, tmp_path_factory):
    "Runs with held-out tracking, stopped at several moments; the last one with disqualified candidates everywhere."
    found = {}
    for name, steps in {"empty": 0, **STEPS}.items():
        run_dir = tmp_path_factory.mktemp("runs") / "run"
        search = Search(run_dir, *small, small_pools(), short_config(heldout_tokens=64))
        for _ in range(steps):
            search.step()
        found[name] = History(run_dir)
    search = Search(run_dir.parent / "unlucky", *small, small_pools(), short_config(generations=8), by(made_up))
    search.run(progress=False)
    return found | {"unlucky": History(run_dir.parent / "unlucky")}


@pytest.fixture(scope="module")
def steered(small, tmp_path_factory):
    "A run that was paused, given more offspring, and taken back to its second generation."
    search = Search(tmp_path_factory.mktemp("runs") / "steered", *small, small_pools(), short_config(), evaluator=by(lambda *of: dataclasses.replace(made_up(*of), fitness=0.5, disqualified="")))
    search.send({"command": "set", "setting": "offspring", "value": 6})
    for _ in range(24):
        search.step()
    search.send({"command": "branch", "generation": 1})
    search.run(progress=False)
    return History(search.run_dir)


def texts(figure) -> str:
    "All text in a figure."
    import matplotlib.text

    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text())


@pytest.mark.parametrize("draw, message", [(fitness_figure, "no candidate has been evaluated yet"), (stages_figure, "no candidate has been evaluated yet"), (lineage_figure, "no generation is complete yet"), (tokens_figure, "no token has been used yet")])
def test_before_the_first_evaluation(histories, draw, message):
    "An empty run gives a figure that says that there is nothing yet."
    figure = draw(histories["empty"])
    assert isinstance(figure, Figure) and message in texts(figure) and figure._repr_png_()


@pytest.mark.parametrize("moment", [*STEPS, "unlucky"])
@pytest.mark.parametrize("view", ["raw", "log"])
def test_fitness_as_scored(histories, moment, view):
    "At every moment: labelled axes with units, a title, a legend, all survivors on the line, held-out loss below when it was tracked."
    history = histories[moment]
    figure = fitness_figure(history, view)
    axes, *below = figure.axes
    assert axes.get_ylabel() == "KL to the dense model (nats per token)" and axes.get_yscale() == ("log" if view == "log" else "linear") and axes.get_title() and figure.legends
    assert figure.axes[-1].get_xlabel() == "generation" and [lower.get_ylabel() for lower in below] == ["perplexity"] * bool(history.survivors.heldout_loss.notna().any())
    (line,) = [line for line in axes.lines if line.get_label() == "survivor"]
    expected = history.survivors.fitness.tolist()
    assert list(line.get_xdata()) == [generation + 1 for generation in history.survivors.generation]
    assert all(a == b or math.isnan(a) and math.isnan(b) for a, b in zip(line.get_ydata(), expected, strict=True))
    lost = history.evaluations.query("disqualified != ''").generation.nunique()
    assert texts(figure).count("disqualified") == lost and (lost > 0) == (moment == "unlucky")
    assert figure._repr_png_()


@pytest.mark.parametrize("moment", STEPS)
def test_fitness_on_the_same_text(histories, moment):
    "A panel for each stage: marks are differences on the same tokens, to the parent where it was scored, else to the last that went on; held-out perplexity comes first."
    history = histories[moment]
    frame = stage_differences(history)
    tracked = bool(history.survivors.heldout_loss.notna().any())
    figure = fitness_figure(history, references={"dense": 4.0, "uniform": 4.1})
    panels = figure.axes[1:]
    assert len(panels) == frame.stage.nunique() and figure.axes[0].get_title().startswith("Held-out perplexity, 64 tokens" if tracked else "Fitness since the start")
    for (_, _, stage), rows in frame.groupby(["branch", "generation", "stage"]):
        parent, on = rows[rows.is_parent].fitness, rows[rows.survived.eq(True)].fitness
        measure = parent.item() if len(parent) else on.max() if len(on) else rows.fitness.min()
        assert rows.difference.tolist() == pytest.approx((rows.fitness - measure).tolist())
        drawn = {tuple(map(float, where)) for dots in panels[stage].collections for where in dots.get_offsets()}
        shown = rows[~rows.is_parent & (rows.difference < 0)]
        assert {(row.generation + 1.0, float(row.difference)) for row in shown.itertuples()} <= drawn
        assert not len(parent) or panels[stage].get_ylabel() == "Δ to the\nparent"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert (f"dense: {math.exp(4.0):.1f}" in " ".join(labels)) == tracked and ("± standard error over blocks" in labels) == tracked
    assert frame.drop(columns="difference").equals(history.evaluations)


def test_change_since_the_start(histories):
    "The survivors' level is the product of their ratios to the parent in the last stage, and never rises."
    history, level, levels = histories["finished"], 1.0, []
    for row in history.survivors.itertuples():
        last = history.evaluations.query(f"generation == {row.generation} and stage == 1").set_index("genome")
        level *= last.fitness[row.genome] / last[last.is_parent].fitness.item()
        levels.append(100 * (level - 1))
    found = relative_fitness(history).change.tolist()
    assert found == pytest.approx(levels) and found == sorted(found, reverse=True)


def test_losers_do_not_lie_below_the_survivor(histories):
    "In every stage, who fell is above who went on; in the last, above the survivor."
    frame = stage_differences(histories["finished"])
    for _, rows in frame.groupby(["generation", "stage"]):
        assert rows[rows.survived.eq(False)].difference.min() >= rows[rows.survived.eq(True)].difference.max()


def test_the_band_is_the_standard_error(histories):
    "It lies one standard error of the loss around the survivors' held-out perplexity."
    history = histories["finished"]
    (band,) = [each for each in fitness_figure(history).axes[0].collections if each.get_label().startswith("±")]
    path = history.survivors
    assert (path.heldout_stderr > 0).all()
    high = {round(math.exp(row.heldout_loss + row.heldout_stderr), 6) for row in path.itertuples()}
    assert high <= {round(float(y), 6) for _, y in band.get_paths()[0].vertices}


@pytest.mark.parametrize("draw", [lambda history, **more: fitness_figure(history, **more), lambda history, **more: sparsity_figure(history.winner, history.space, **more), lambda history, **more: comparison_figure(ROWS, **more)])
def test_columns(histories, draw):
    "A figure is as wide as one column of a paper or both, and nothing sticks out of it; another name is refused."
    for column, width in COLUMN.items():
        figure = draw(histories["finished"], column=column)
        figure._repr_png_()
        assert figure.get_figwidth() == width
        tight = figure.get_tightbbox()
        assert tight.x0 >= -0.03 and tight.x1 <= width + 0.03
    with pytest.raises(ValueError, match="single, double"):
        draw(histories["finished"], column="triple")


def test_legends_can_be_read_in_grey(histories):
    "Two entries of a legend differ in more than hue: in shape, dash or hatch, or clearly in luminance."
    from matplotlib.colors import to_rgb

    def looks(handle) -> tuple:
        color = next(getattr(handle, name)() for name in ("get_color", "get_facecolor") if hasattr(handle, name))
        color = color[0] if len(color) and not isinstance(color[0], (str, float)) else color
        red, green, blue = to_rgb(color[:3] if not isinstance(color, str) else color) if len(color) else (0, 0, 0)
        shape = [str(getattr(handle, name)()) for name in ("get_marker", "get_linestyle", "get_hatch") if hasattr(handle, name)]
        paths = [len(path.vertices) for path in handle.get_paths()] if hasattr(handle, "get_paths") else []
        dashes = str(getattr(handle, "_dash_pattern", ""))  # a line of a collection says "--" even when it is solid
        return (type(handle).__name__, *shape, dashes, *paths), 0.21 * red + 0.72 * green + 0.07 * blue

    for name, draw in DRAW.items():
        figure = draw(histories["finished"])
        for legend in (*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))):
            seen = [looks(handle) for handle in legend.legend_handles]
            for i, (shape, light) in enumerate(seen):
                assert all(shape != other or abs(light - other_light) > 0.08 for other, other_light in seen[:i]), (name, seen)


def test_fitness_with_lost_candidates_and_parents(histories):
    "Where nothing can be compared, nothing is drawn; the line goes on."
    history = histories["unlucky"]
    frame = stage_differences(history)
    assert frame[frame.fitness.isna()].difference.isna().all() and fitness_figure(history)._repr_png_()
    (line,) = [line for line in fitness_figure(history).axes[0].lines if line.get_label() == "survivor"]
    assert len(line.get_ydata()) == 1 + len(history.survivors)


def test_fitness_that_is_no_ratio(small, tmp_path):
    "A divergence of zero has no ratio, so no change since the start is shown; another view is refused."
    search = Search(tmp_path / "run", *small, small_pools(), short_config(generations=1), evaluator=by(lambda *of: dataclasses.replace(made_up(*of), fitness=0.0, disqualified="")))
    search.run(progress=False)
    assert [axes.get_title()[:7] for axes in fitness_figure(History(tmp_path / "run")).axes] == ["Stage 1", "Stage 2"]
    with pytest.raises(ValueError, match="use one of relative, raw, log"):
        fitness_figure(History(tmp_path / "run"), "linear")


@pytest.mark.parametrize("text", ["$\\frac{$", "$x$", "\\$", "50 $", "\ud800", "$\ud800_{$ \\$ $", "a & <b> é"])
def test_text_of_users_is_drawn_as_it_is(small, tmp_path, text):
    "A note, a title and a name with dollar signs or half a character break no figure, and are no formula."
    run_dir = tmp_path / "run"
    search = Search(run_dir, *small, small_pools(), short_config(generations=1))
    search.send({"command": "note", "text": text.encode("utf-8", "replace").decode()})  # others are refused
    search.run(progress=False)
    history = History(run_dir)
    rows = [{"name": text, "before": [2.0], "after": [1.0]}]
    for figure in (fitness_figure(history), genome_figure(history.winner, history.space, text, history.start, text), comparison_figure(rows, title=text)):
        assert figure._repr_png_() and (plain(text) in texts(figure) or plain(history.notes.text[0]) in texts(figure))
        save_figure(figure, tmp_path / "figure")
    from matplotlib.cbook import is_math_text

    assert not is_math_text(plain(text))


def test_fitness_figure_shows_each_fallen_candidate_once(histories):
    "Every candidate that fell is one mark, at its last fitness, in the style of the stage in which it fell."
    history = histories["finished"]
    marks = {c.get_label(): sorted(map(tuple, c.get_offsets().tolist())) for c in fitness_figure(history, "raw").axes[0].collections}
    frame = history.evaluations
    for stage in (0, 1):
        fallen = frame[(frame.stage == stage) & frame.survived.eq(False)]
        assert marks[f"fell in stage {stage + 1}"] == sorted(zip(fallen.generation + 1.0, fallen.fitness))


def test_fitness_figure_names_the_fitness(small, tmp_path):
    "With perplexity as fitness, the axis says so."
    Search(tmp_path / "run", *small, small_pools(), short_config(fitness="perplexity", generations=1)).run(progress=False)
    assert "fitness (perplexity): lower is better" in texts(fitness_figure(History(tmp_path / "run")))
    assert fitness_figure(History(tmp_path / "run"), "raw").axes[0].get_ylabel() == "perplexity"


@pytest.mark.parametrize("moment", [*STEPS, "unlucky"])
def test_stages_figure(histories, moment):
    "Each candidate has a mark in every stage it reached, at its rank, with lines between; a cross where it fell; rank 1 on top; every candidate is named."
    history = histories[moment]
    figure = stages_figure(history, 0)
    (axes,) = figure.axes
    frame = history.evaluations.query("generation == 0")
    assert axes.get_ylabel() == "rank (1 is best)" and axes.yaxis_inverted() and "Generation 1" in axes.get_title()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["stage 1\nbefore tuning\n32 scoring", "stage 2\n64 tuning\n48 scoring"]
    marks = {(line.get_xdata()[0], line.get_ydata()[0]): line.get_marker() for line in axes.lines if len(line.get_xdata()) == 1}
    assert sorted(marks) == sorted(zip(frame.stage, frame["rank"]))
    fell = {(row.stage, row.rank) for row in frame.itertuples() if row.survived is False}
    assert {where for where, marker in marks.items() if marker == "x"} == fell
    paths = [list(line.get_xdata()) for line in axes.lines if line.get_label().startswith("_child") and len(line.get_xdata()) == 2 and line.get_xdata()[0] % 1 == 0]
    assert len(paths) == sum(n - 1 for n in frame.groupby("genome").size())
    assert texts(figure).count("parent") == int(frame.is_parent.any())
    assert isinstance(stages_figure(history), Figure) and figure._repr_png_()


def test_rank_changes():
    "Places are won and lost among those who were in both stages; flips are pairs whose order is not what it was: an oracle by hand."
    rows = [(0, code, rank) for rank, code in enumerate("abcde", 1)] + [(1, "c", 1), (1, "a", 2), (1, "parent", 3), (1, "b", 4)]
    frame = pd.DataFrame(rows, columns=["stage", "genome", "rank"])
    changes, flips, pairs = rank_changes(frame, 1)
    assert changes == {"a": -1, "b": -1, "c": 2} and (flips, pairs) == (2, 3)
    assert rank_changes(frame[frame.stage == 0], 1) == ({}, 0, 0)


def test_lineage(histories, small):
    "From the start to the winner, each step by the swaps between two winners; the picture has a triangle for each."
    history, space = histories["finished"], small[1].space
    path = lineage(history)
    assert path[0] == (-1, history.start) and path[-1] == (2, history.winner) and [generation for generation, _ in path] == [-1, 0, 1, 2]
    changes = [swap for (_, a), (_, b) in zip(path, path[1:]) for swap in swaps(a, b, space)]
    figure = lineage_figure(history)
    assert sum(len(dots.get_offsets()) for axes in figure.axes[:2] for dots in axes.collections) == len(changes)
    assert figure.axes[0].images[0].get_array()[:, -1].tolist() == pytest.approx([100 * space.kept(i, level) / 6 for i, level in enumerate(history.winner.attn)])


def test_genome_figure_frames_what_changed(small):
    "Beside its parent, exactly the changed units are framed, and the title counts them."
    space = small[1].space
    parent, child = space.genome([1, 0, 6, 3, 10, 5]), space.genome([1, 1, 6, 3, 9, 5])
    axes = genome_figure(child, space, "c1", parent).axes[1]
    assert "2 units changed" in axes.get_title() and [(round(patch.get_x() + 0.46), round(patch.get_y() + 0.46)) for patch in axes.patches] == [(1, 0), (1, 1)]
    assert "the same" in genome_figure(parent, space, "c1", parent).axes[1].get_title()


@pytest.mark.parametrize("moment", [*STEPS, "unlucky"])
def test_tokens_figure(histories, moment):
    "The last bar is what the run has used; the plan ends at what it will use."
    history = histories[moment]
    (axes,) = tokens_figure(history).axes
    tops = [max(patch.get_y() + patch.get_height() for patch in container) for container in axes.containers]
    assert max(tops) == pytest.approx(sum(history.tokens.values()))
    assert axes.lines[0].get_ydata()[-1] == sum(history.planned_tokens.values())


def test_steering_is_marked(steered):
    "Settings, frozen units and branches are marked where they came; pausing is not; a branch that was left is pale."
    axes = fitness_figure(steered).axes[0]
    words = texts(axes.figure)
    assert "offspring → 6" in words and "back to generation 2" in words and "pause" not in words
    assert [line.get_label() for line in axes.lines if line.get_alpha()] == ["left branch 0"]
    assert len(lineage(steered)) == 1 + len(steered.line) and lineage_figure(steered)._repr_png_()


def test_a_branch_has_its_own_marks(small, tmp_path):
    "What was steered on the line that was left is not marked on the new one; what comes after the end is within the axes."
    search = Search(tmp_path / "run", *small, small_pools(), short_config(), evaluator=by(lambda *of: dataclasses.replace(made_up(*of), fitness=0.5, disqualified="")))
    search.run(progress=False)
    search.send({"command": "note", "text": "of the old line"})
    search.send({"command": "branch", "generation": 1})
    search.run(progress=False)
    search.send({"command": "note", "text": "after the end"})
    with search.driving():
        search.stepper.drain()
    axes = fitness_figure(History(search.run_dir)).axes[0]
    words = texts(axes.figure)
    assert "of the old line" not in words and "back to generation 2" in words and "after the end" in words
    low, high = axes.get_xlim()
    marks = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1]
    assert len(marks) == 2 and low < min(marks) and max(marks) < high


@pytest.mark.parametrize("draw", [fitness_figure, stages_figure, lineage_figure, tokens_figure])
@pytest.mark.parametrize("theme", THEMES)
def test_themes(histories, draw, theme):
    "Paper and ink are those of the theme, in an empty picture too; another name is refused."
    from matplotlib.colors import to_hex

    for moment in ("empty", "finished"):
        figure = draw(histories[moment], theme=theme)
        assert THEMES[theme].paper == "none" or to_hex(figure.get_facecolor()) == THEMES[theme].paper
        assert moment == "empty" or to_hex(figure.axes[0].title.get_color()) == THEMES[theme].ink
    with pytest.raises(ValueError, match="light, dark, page"):
        draw(histories["finished"], theme="sepia")


@pytest.mark.parametrize("levels", [[0] * 6, [6, 6, 6, 10, 10, 10], [1, 0, 6, 3, 10, 5]])
def test_genome_figure_says_what_is_kept(small, levels):
    "Each cell's number is what the space keeps there, heads above and channels below, and the colour is its share in percent."
    space = small[1].space
    genome = space.genome(levels)
    axes, bar = genome_figure(genome, space, "A genome").axes
    cells = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert cells == {(unit.kind == "mlp", unit.layer): str(space.kept(i, level)) for i, (unit, level) in enumerate(zip(space.units, levels))}
    shares = axes.images[0].get_array()
    assert all(shares[int(unit.kind == "mlp"), unit.layer] == pytest.approx(100 * space.kept(i, level) / unit.n_structures) for i, (unit, level) in enumerate(zip(space.units, levels)))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["attention\n(heads)", "MLP\n(channels)"]
    assert (axes.get_xlabel(), axes.get_title(), bar.get_ylabel()) == ("layer", "A genome", "kept (%)")


def test_genome_of_another_space_is_refused(small):
    "A genome that the space does not have is an error, not a picture."
    with pytest.raises(ValueError, match="2 attention and 2 MLP levels"):
        genome_figure(Genome((0, 0), (0, 0)), small[1].space)


@pytest.mark.parametrize("levels", [[0] * 6, [6, 6, 6, 10, 10, 10], [1, 0, 6, 3, 10, 5]])
def test_sparsity_figure(small, levels):
    "Two bars per layer with the percent of parameters removed, and the average as a line."
    space = small[1].space
    genome = space.genome(levels)
    (axes,) = sparsity_figure(genome, space).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "parameters removed (%)") and axes.get_legend()
    heights = [patch.get_height() for container in axes.containers for patch in container]
    assert heights == pytest.approx([100 * (1 - params[level] / params[0]) for params, level in zip(space.params, levels)])
    assert axes.lines[0].get_ydata()[0] == pytest.approx(100 * space.params_removed(genome)) and axes.get_ylim()[1] > 100


@pytest.mark.parametrize("dense", [None, 19.3])
def test_comparison_figure(dense):
    "Each seed is a dot, means have bars and their values; the dense model is a line."
    figure = comparison_figure(ROWS, dense)
    (axes,) = figure.axes
    dots = [y for drawn in axes.collections if hasattr(drawn, "get_sizes") and len(drawn.get_offsets()) == 4 for y in drawn.get_offsets()[:, 1].tolist()]
    assert sorted(dots) == [47.1, 48.0, 50.3, 51.0, 63.0, 64.1, 72.2, 75.0]
    bars = [segment[0][1] for drawn in axes.collections if hasattr(drawn, "get_segments") for segment in drawn.get_segments()]
    assert sorted(bars) == pytest.approx([47.55, 50.65, 63.55, 73.6]) and {"73.6", "63.5", "50.6"} <= {text.get_text() for text in axes.texts}
    assert axes.get_ylabel() == "perplexity (lower is better)" and [label.get_text() for label in axes.get_xticklabels()] == ["uniform", "evolved"]
    assert [line.get_ydata()[0] for line in axes.lines[2:]] == ([dense] if dense else [])  # after one line from before to after for each method
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert labels == ["before post-training", "after post-training", "mean over seeds"] + [f"dense: {dense}"] * bool(dense)
    single = comparison_figure([{"name": "one", "before": [3.0], "after": [2.0]}])
    assert "mean over seeds" not in [text.get_text() for text in single.legends[0].get_texts()]


DRAW = {
    "fitness": fitness_figure, "stages": stages_figure, "lineage": lineage_figure, "tokens": tokens_figure, "genome": lambda history: genome_figure(history.winner, history.space),
    "sparsity": lambda history: sparsity_figure(history.winner, history.space), "comparison": lambda _: comparison_figure(ROWS, 19.3)}


def saved(figure, path) -> list[bytes]:
    "The bytes of SVG, PDF and PNG."
    files = save_figure(figure, path)
    assert [file.name for file in files] == [f"{path.name}.svg", f"{path.name}.pdf", f"{path.name}.png"]
    return [file.read_bytes() for file in files]


@pytest.mark.parametrize("name", DRAW)
def test_drawn_again_it_is_the_same_file(histories, tmp_path, name):
    "Drawing and saving again, elsewhere, gives the same SVG, PDF and PNG, byte for byte."
    first, second = (saved(DRAW[name](histories["finished"]), tmp_path / there / name) for there in "ab")
    assert first == second


@pytest.mark.parametrize("name", DRAW)
def test_saved_again_it_is_the_same_file(histories, tmp_path, name):
    "So does saving the same figure a second time, and after it was shown."
    figure = DRAW[name](histories["finished"])
    first, second = (saved(figure, tmp_path / there / name) for there in "ab")
    assert first == second
    shown = DRAW[name](histories["finished"])
    shown._repr_png_()
    assert saved(shown, tmp_path / "c" / name) == first


def test_no_pyplot(histories, tmp_path):
    "Importing, drawing and saving never import pyplot, so figures can be made in any thread."
    script = """
import sys
from evoprune_nb.paper.drawing import *
from evoprune_nb.paper.figures import *
from evoprune_nb.history import History
history = History(sys.argv[1])
for figure in (fitness_figure(history), stages_figure(history), lineage_figure(history), tokens_figure(history), genome_figure(history.winner, history.space), sparsity_figure(history.winner, history.space)):
    figure._repr_png_(), save_figure(figure, sys.argv[2] + "/figure")
sys.exit("pyplot was imported" if "matplotlib.pyplot" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", script, str(histories["finished"].run_dir), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
