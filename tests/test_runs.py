"""Many runs: the table, the comparison, every candidate, the front and the map say what the logs say."""
import json
import math
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import by, made_up, short_config, small_pools

from evoprune_nb.genome import Genome
from evoprune_nb.history import History
from evoprune_nb.mutation import make_offspring
from evoprune_nb.search import Search
from evoprune_nb.selection import Evaluation
from evoprune_nb.surrogate import LossModel
from evoprune_nb.target import plan_budget
from evoprune_nb.ui.candidate_table import ancestors, candidate_frame, candidates_of, write_frame
from evoprune_nb.ui.compare import all_settings, at_equal, curve, curves_figure, genome_differences, seed_groups, seeds_figure, setting_differences, winners_figure
from evoprune_nb.ui.datagrid import DataGrid
from evoprune_nb.ui.importance import fit_importance, importance_figure, importance_frame
from evoprune_nb.ui.pareto import pareto_figure, pareto_front, pareto_points
from evoprune_nb.ui.runs import COLUMNS, RunFolder, chosen_runs, find_runs


def lucky(genome, generation, stage) -> Evaluation:
    "Nobody is disqualified, and everything takes half a second."
    luck = random.Random(f"{genome.code} {generation} {stage}").random()
    return replace(made_up(genome, generation, stage), fitness=1 + luck, disqualified="", seconds=0.5)


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    "Two seeds, one run of another size with a note and a branch, one damaged, and what is no run."
    top = tmp_path_factory.mktemp("many")
    for name, config in {"base/seed-0": short_config(heldout_tokens=64), "base/seed-1": short_config(heldout_tokens=64, seed=1), "other": short_config(sparsity=0.3, heldout_tokens=64, generations=4)}.items():
        Search(top / name, *small, small_pools(), config, by(lucky)).run(progress=False)
    search = Search(top / "other", *small, small_pools(), short_config(sparsity=0.3, heldout_tokens=64, generations=4), by(lucky))
    search.send({"command": "branch", "generation": 2})
    search.send({"command": "note", "text": "<b>try</b> again"})
    search.run(progress=False)
    (top / "broken").mkdir()
    (top / "broken" / "config.json").write_text("{")
    (top / "broken" / "events.jsonl").write_text("")
    (top / "model").mkdir()
    (top / "model" / "config.json").write_text("{}")
    return top


@pytest.fixture(scope="module")
def runs(folder):
    return {name: history for name, history in RunFolder(folder).histories.items()}


def test_the_table_has_every_run_and_says_which_is_damaged(folder):
    frame = RunFolder(folder).frame.set_index("run")
    assert list(frame.index) == ["base/seed-0", "base/seed-1", "broken", "other"] and list(frame.columns) == list(COLUMNS)[1:]
    assert frame.status.to_dict() == {"base/seed-0": "finished", "base/seed-1": "finished", "broken": "damaged", "other": "finished"}
    assert "config.json is damaged" in frame.note["broken"] and frame.note["other"] == "<b>try</b> again"
    history = History(folder / "other")
    row = frame.loc["other"]
    assert (row.branch, row.generation, row.target, row.tokens) == (1, 4, "30% removed", sum(history.tokens.values()))
    last = history.survivors[history.survivors.on_line].iloc[-1]
    assert row.fitness == last.fitness and math.isclose(row.heldout, math.exp(last.heldout_loss))


def test_a_table_is_read_again_only_where_something_was_written(small, tmp_path):
    search = Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up))
    search.step()
    table = RunFolder(tmp_path)
    before = table.histories["run"]
    assert table.frame.generation.tolist() == [0] and not table.refresh()
    search.run(progress=False)
    assert table.refresh() and table.histories["run"] is before and table.frame.status.tolist() == ["finished"]
    Search(tmp_path / "later", *small, small_pools(), short_config(), by(made_up)).step()
    assert table.refresh() and table.frame.run.tolist() == ["later", "run"]


def test_names_are_the_shortest_that_differ(folder, tmp_path):
    assert list(chosen_runs([folder / "base"])) == ["seed-0", "seed-1"]
    assert list(chosen_runs([folder / "base" / "seed-0", folder / "other"])) == ["base/seed-0", "other"]
    with pytest.raises(ValueError, match="no run directory in"):
        chosen_runs([tmp_path])
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        find_runs("nowhere")


def test_curves_count_all_that_was_spent(runs):
    "The last survivor of a run costs as much as the run; what a left branch took is counted."
    for history in runs.values():
        frame = curve(history)
        assert frame.tokens.iloc[-1] == sum(history.tokens.values()) and math.isclose(frame.seconds.iloc[-1], history.seconds)
        assert frame.generation.tolist() == [generation + 1 for _, generation in history.line]


def test_comparison_at_equal_cost(runs):
    "Nobody is judged by more than the shortest run had; each value stands in its run's own curve."
    table = at_equal(runs, "heldout", "tokens").set_index("run")
    least = min(curve(history).tokens.iloc[-1] for history in runs.values())
    for name, history in runs.items():
        frame = curve(history)
        before = frame[frame.tokens <= least]
        assert table.tokens[name] == least and table.heldout[name] == before.heldout.iloc[-1] and table.generation[name] == before.generation.iloc[-1]
    assert table.heldout.is_monotonic_increasing


def test_settings_that_differ(runs):
    found = setting_differences(runs).set_index("setting")
    assert set(found.index) == {"seed", "target.sparsity", "generations"}
    assert found.loc["target.sparsity"].to_dict() == {"base/seed-0": "0.5", "base/seed-1": "0.5", "other": "0.3"}
    assert all_settings(runs["other"])["stages"] == "2/0/32, 1/64/48"


def test_seeds_are_one_group(runs):
    groups = seed_groups(runs)
    assert sorted(map(list, groups.values())) == [["base/seed-0", "base/seed-1"], ["other"]]
    assert not any("seed" in words for words in groups)


def test_genomes_unit_by_unit(runs):
    frame = genome_differences(runs).set_index("unit")
    for i, unit in enumerate(runs["other"].space.units):
        kept = {name: history.space.kept(i, history.winner.levels[i]) for name, history in runs.items()}
        assert frame.loc[unit.name, list(runs)].to_dict() == kept
        assert frame.spread[unit.name] == round(100 * (max(kept.values()) - min(kept.values())) / unit.n_structures, 1)


def test_every_candidate_has_one_row(runs):
    "Each generation's candidates, the winner among them; differences are to the parent in the same stage."
    history = runs["other"]
    frame = candidate_frame(history)
    scored = history.evaluations
    assert len(frame) == len(scored.groupby(["branch", "generation", "genome"])) and set(frame.fate) >= {"won", "fell in stage 1"}
    won = {(row.branch, row.generation + 1): row.genome for row in history.survivors.itertuples()}
    assert {(row.branch, row.generation): row.genome for row in frame[frame.fate == "won"].itertuples()} == won
    for row in frame.sample(5, random_state=0).itertuples():
        rows = scored[(scored.branch == row.branch) & (scored.generation == row.generation - 1) & (scored.stage == row.stage - 1)]
        parent = rows[rows.is_parent].fitness
        assert row.params == history.space.n_params(Genome.parse(row.genome))
        if len(parent):
            assert math.isclose(row.difference, rows[rows.genome == row.genome].fitness.iloc[0] - parent.iloc[0], abs_tol=1e-12)


def test_ancestors_follow_the_branch_back(runs):
    "On a branch, the line of winners goes on with the branch that was left; each ancestor is another genome."
    history = runs["other"]
    won = {(row.branch, row.generation): row.genome for row in history.survivors.itertuples()}
    found = ancestors(history, 3, branch=1)
    line = [history.start.code] + [won[where] for where in history.line[:3]]
    assert [code for _, code in reversed(found)] == [code for i, code in enumerate(line) if not i or code != line[i - 1]]
    assert found[-1] == (-1, history.start.code)


def test_tables_as_files(runs, tmp_path):
    frame = candidates_of(runs)
    assert frame.columns[0] == "run" and set(frame.run) == set(runs)
    for ending, read in {"csv": pd.read_csv, "json": pd.read_json, "parquet": pd.read_parquet}.items():
        path = write_frame(frame, tmp_path / "new" / f"candidates.{ending}")
        assert read(path).genome.astype(str).tolist() == frame.genome.tolist()
    with pytest.raises(ValueError, match=r"candidates\.pkl has no known ending; tables are written as \.csv, \.json, \.parquet"):
        write_frame(frame, tmp_path / "candidates.pkl")


def test_nobody_beats_the_front():
    "Against every pair, slowly."
    rng = np.random.default_rng(0)
    points = pd.DataFrame({"cost": rng.integers(0, 12, 80), "quality": rng.integers(0, 12, 80)})
    beaten = lambda a: any(b.cost <= a.cost and b.quality <= a.quality and (b.cost, b.quality) != (a.cost, a.quality) for b in points.itertuples())
    slow = {(a.cost, a.quality) for a in points.itertuples() if not beaten(a)}
    assert set(map(tuple, pareto_front(points).values.tolist())) == slow


@pytest.mark.parametrize("quality", ["heldout", "change", "fitness"])
def test_points_of_all_runs(runs, quality):
    points = pareto_points(runs, "flops", quality)
    assert set(points.run) == set(runs) and points.quality.notna().all()
    row = points.iloc[0]
    assert row.cost == runs[row.run].space.cost(Genome.parse(row.genome), "flops")
    if quality == "heldout":
        assert len(points) == sum(len(history.survivors) for history in runs.values())
    assert pareto_points(runs, "latency", quality).empty  # was not measured


def test_importance_finds_what_losses_are_made_of(small, tmp_path):
    "Losses that add up over units: the regression foretells those of genomes that nobody has evaluated."
    weights = {}

    def additive(genome, generation, stage) -> Evaluation:
        space = small[1].space
        if not weights:
            weights["true"] = LossModel(space.genome([0] * len(space.units)), space, np.concatenate([np.geomspace(0.05, 2, len(space.units)), np.zeros(len(space.units))]), np.zeros((2 * len(space.units),) * 2))
        return replace(made_up(genome, generation, stage), fitness=2 + weights["true"].predict(genome), disqualified="")

    Search(tmp_path / "run", *small, small_pools(), short_config(generations=6, offspring=8), by(additive)).run(progress=False)
    history = History(tmp_path / "run")
    model, budget = fit_importance(history), plan_budget(history.space, history.config.target)[0]
    fresh = make_offspring(history.winner, history.space, budget, 40, random.Random(1), "level_swap", 3)
    guessed, true = ([which.predict(genome) for genome in fresh] for which in (model, weights["true"]))
    assert np.corrcoef(guessed, true)[0, 1] > 0.9
    assert importance_frame(history).pairs.sum() > 0 and importance_figure(history)._repr_png_()


def test_before_there_is_anything(small, tmp_path):
    "A run without an evaluation: rows and figures that say so."
    Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up)).send({"command": "note", "text": "soon"})
    runs = chosen_runs([tmp_path]) if (tmp_path / "run" / "events.jsonl").exists() else {"run": History(tmp_path / "run")}
    history = next(iter(runs.values()))
    assert candidate_frame(history).empty and curve(history).empty and importance_frame(history).nats.isna().all()
    for figure in (curves_figure(runs), winners_figure(runs), seeds_figure(runs), pareto_figure(runs), importance_figure(history)):
        assert figure._repr_png_()


def test_a_grid_keeps_its_selection():
    "Rows may change; what is selected and still there stays so; what JSON lacks becomes None."
    grid, frame = DataGrid(many=True), pd.DataFrame({"run": ["a", "b"], "x": [1.5, math.inf], "n": [1, 2]})
    grid.show(frame, frame.run)
    grid.selected = ["a", "b"]
    grid.show(frame.assign(n=[3, 4]), frame.run)
    assert grid.selected == ["a", "b"] and grid.rows == [["a", "a", 1.5, 3], ["b", "b", None, 4]] and json.dumps(grid.rows, allow_nan=False)
    grid.show(frame.iloc[:1], ["a"])
    assert grid.selected == ["a"] and [column["numeric"] for column in grid.columns] == [False, True, True]
