"""Pictures exist at every moment of a run, say what they show, and are the same bytes each time."""
import math
import subprocess
import sys

import pytest
from helpers import made_up, short_config, small_pools

from evoprune_nb.figures import Figure, comparison_figure, fitness_figure, genome_figure, save_figure, sparsity_figure, stages_figure
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
    search = Search(run_dir.parent / "unlucky", *small, small_pools(), short_config(generations=8))
    search._evaluate = made_up
    search.run(progress=False)
    return found | {"unlucky": History(run_dir.parent / "unlucky")}


def texts(figure) -> str:
    "All text in a figure."
    import matplotlib.text

    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text())


@pytest.mark.parametrize("draw", [fitness_figure, stages_figure])
def test_before_the_first_evaluation(histories, draw):
    "An empty run gives a figure that says that there is nothing yet."
    figure = draw(histories["empty"])
    assert isinstance(figure, Figure) and "no candidate has been evaluated yet" in texts(figure) and figure._repr_png_()


@pytest.mark.parametrize("moment", [*STEPS, "unlucky"])
@pytest.mark.parametrize("log", [False, True])
def test_fitness_figure(histories, moment, log):
    "At every moment: labelled axes with units, a title, a legend, all survivors on the line, held-out loss below when it was tracked."
    history = histories[moment]
    figure = fitness_figure(history, log)
    axes, *below = figure.axes
    assert axes.get_ylabel() == "KL to the dense model (nats per token)" and axes.get_yscale() == ("log" if log else "linear") and axes.get_title() and axes.get_legend()
    assert figure.axes[-1].get_xlabel() == "generation" and [lower.get_ylabel() for lower in below] == ["held-out loss\n(nats per token)"] * bool(history.survivors.heldout_loss.notna().any())
    (line,) = [line for line in axes.lines if line.get_label() == "survivor"]
    expected = history.survivors.fitness.astype(float).tolist()
    assert list(line.get_xdata()) == [generation + 1 for generation in history.survivors.generation]
    assert all(a == b or math.isnan(a) and math.isnan(b) for a, b in zip(line.get_ydata(), expected, strict=True))
    lost = history.evaluations.query("disqualified != ''").generation.nunique()
    assert texts(figure).count("disqualified") == lost and (lost > 0) == (moment == "unlucky")
    assert figure._repr_png_()


def test_fitness_figure_shows_each_fallen_candidate_once(histories):
    "Every candidate that fell is one mark, at its last fitness, in the style of the stage in which it fell."
    history = histories["finished"]
    marks = {c.get_label(): sorted(map(tuple, c.get_offsets().tolist())) for c in fitness_figure(history).axes[0].collections}
    frame = history.evaluations
    for stage in (0, 1):
        fallen = frame[(frame.stage == stage) & frame.survived.eq(False)]
        assert marks[f"fell in stage {stage + 1}"] == sorted(zip(fallen.generation + 1.0, fallen.fitness))


def test_fitness_figure_names_the_fitness(small, tmp_path):
    "With perplexity as fitness, the axis says so."
    Search(tmp_path / "run", *small, small_pools(), short_config(fitness="perplexity", generations=1)).run(progress=False)
    assert fitness_figure(History(tmp_path / "run")).axes[0].get_ylabel() == "perplexity"


@pytest.mark.parametrize("moment", [*STEPS, "unlucky"])
def test_stages_figure(histories, moment):
    "One line per candidate of the generation, a column per stage with its tokens, rank 1 on top, the parent marked once it has entered."
    history = histories[moment]
    figure = stages_figure(history, 0)
    (axes,) = figure.axes
    frame = history.evaluations.query("generation == 0")
    assert axes.get_ylabel() == "rank (1 is best)" and axes.yaxis_inverted() and "generation 1" in axes.get_title()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["stage 1\n0 tuning\n32 scoring", "stage 2\n64 tuning\n48 scoring"]
    drawn = sorted(point for line in axes.lines for point in zip(line.get_xdata(), line.get_ydata()))
    ranks = [(stage, rank + 1.0) for stage, group in frame.groupby("stage") for rank in range(len(group))]
    assert len(axes.lines) == frame.genome.nunique() and drawn == ranks
    assert texts(figure).count("parent") == int(frame.is_parent.any())
    assert isinstance(stages_figure(history), Figure) and figure._repr_png_()


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
    "Bars are means over seeds, from zero, with their values; each seed is a dot; the dense model is a line."
    (axes,) = comparison_figure(ROWS, dense).axes
    heights = [patch.get_height() for container in axes.containers for patch in container]
    assert heights == pytest.approx([73.6, 63.55, 50.65, 47.55]) and axes.get_ylim()[0] == 0
    assert axes.get_ylabel() == "perplexity (lower is better)" and [label.get_text() for label in axes.get_xticklabels()] == ["uniform", "evolved"]
    assert {"73.6", "63.5"} <= {text.get_text() for text in axes.texts}
    assert sorted(y for dots in axes.collections for y in dots.get_offsets()[:, 1].tolist()) == [47.1, 48.0, 50.3, 51.0, 63.0, 64.1, 72.2, 75.0]
    assert [line.get_ydata()[0] for line in axes.lines] == ([dense] if dense else [])
    single = comparison_figure([{"name": "one", "before": [3.0], "after": [2.0]}]).axes[0]
    assert not single.collections


DRAW = {
    "fitness": fitness_figure, "stages": stages_figure, "genome": lambda history: genome_figure(history.winner, history.space),
    "sparsity": lambda history: sparsity_figure(history.winner, history.space), "comparison": lambda _: comparison_figure(ROWS, 19.3)}


def saved(figure, path) -> list[bytes]:
    "The bytes of the SVG and the PNG."
    files = save_figure(figure, path)
    assert [file.name for file in files] == [f"{path.name}.svg", f"{path.name}.png"]
    return [file.read_bytes() for file in files]


@pytest.mark.parametrize("name", DRAW)
def test_drawn_again_it_is_the_same_file(histories, tmp_path, name):
    "Drawing and saving again, elsewhere, gives the same SVG and PNG, byte for byte."
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
from evoprune_nb.figures import *
from evoprune_nb.history import History
history = History(sys.argv[1])
for figure in (fitness_figure(history), stages_figure(history), genome_figure(history.winner, history.space), sparsity_figure(history.winner, history.space)):
    figure._repr_png_(), save_figure(figure, sys.argv[2] + "/figure")
sys.exit("pyplot was imported" if "matplotlib.pyplot" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", script, str(histories["finished"].run_dir), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
