"""Baselines: sizes, costs, determinism, and errors that say what is wrong."""
import json
from dataclasses import replace

import pytest
import torch
from helpers import random_blocks, small_model

from evoprune_nb.baselines.errors import absolute_errors
from evoprune_nb.baselines.masks import MaskTraining, kept_share, train_masks
from evoprune_nb.baselines.one_unit import nats_of, one_unit_genomes, one_unit_scores
from evoprune_nb.baselines.problem import Found, Problem, baseline
from evoprune_nb.baselines.registry import BASELINES, TITLES, solve
from evoprune_nb.baselines.structures import Flow, observe, ranked_genome, removal_order, structure_scores
from evoprune_nb.candidates import materialize
from evoprune_nb.data import TokenPool
from evoprune_nb.database import build_database
from evoprune_nb.genome import Genome
from evoprune_nb.models import prunable_units
from evoprune_nb.paper.genomes import genomes_figure
from evoprune_nb.pruning import collect_hessians
from evoprune_nb.target import Target
from evoprune_nb.training import Training

OPTIONS = {
    "random_search": dict(evaluations=6), "ziplm": dict(evaluations=6), "masks": dict(settings=MaskTraining(tokens=1024, lr=0.5)),
    "evopress": dict(generations=2, offspring=4, scale=1 / 256), "darwinlm": dict(generations=1, offspring=2, scale=1 / 1024, training=Training(lr=1e-3))}


@pytest.fixture(scope="module")
def problem(small, tmp_path_factory):
    model, database = small
    pools = {name: TokenPool(name, random_blocks(n, seed=seed).int()) for name, n, seed in (("calibration", 16, 0), ("tuning", 64, 1), ("scoring", 32, 2))}
    return Problem(model, database, pools, directory=tmp_path_factory.mktemp("baselines"), scoring_tokens=128)


@pytest.fixture(scope="module")
def found(problem) -> dict[str, Found]:
    return {name: solve(name, problem, **OPTIONS.get(name, {})) for name in BASELINES}


@pytest.mark.parametrize("name", BASELINES)
def test_same_size_and_what_it_took(problem, found, name):
    "Never larger than uniform, and not much smaller; the pruned model has that many parameters; the row says what it took."
    answer, limit = found[name], problem.budget.limits["params"]
    assert answer.name == name and name in TITLES and 0.95 * limit <= answer.n_params <= limit
    candidate = materialize(problem.model, answer.database, answer.genome)
    assert sum(parameter.numel() for parameter in candidate.parameters()) == answer.n_params
    row = json.loads(json.dumps(answer.row))
    assert row["seconds"] >= 0 and all(json.dumps(event) for event in answer.log)
    evaluations = {"random_search": 6, "ziplm": 6, "mip": 1 + sum(len(levels) - 1 for levels in problem.space.removed)}
    assert row["evaluations"] == evaluations.get(name, row["evaluations"])
    assert (row["scoring_tokens"] > 0) == (row["evaluations"] > 0)
    assert (row["tuning_tokens"] > 0) == (name in ("masks", "darwinlm"))
    assert (row["calibration_tokens"] > 0) == (name in ("uniform_groups", "wanda", "width", "ziplm"))


def test_the_seed_decides(problem, found, tmp_path):
    "The same problem has the same answers elsewhere; another seed draws other candidates."
    again = replace(problem, directory=tmp_path)
    untimed = lambda answer: [{key: value for key, value in row.items() if key not in ("seconds", "time")} for row in answer.log]
    for name in BASELINES:
        answer = solve(name, again, **OPTIONS.get(name, {}))
        assert (answer.genome, untimed(answer)) == (found[name].genome, untimed(found[name])), name
    other = solve("random_search", replace(problem, seed=1), evaluations=6)
    assert {row["genome"] for row in other.log} != {row["genome"] for row in found["random_search"].log}


def test_no_genome_of_ramps_is_better_than_the_best(problem, found):
    "The winner has the least fitness of the log, and uniform is in it."
    fitness = {row["genome"]: row["fitness"] for row in found["ramps"].log}
    assert fitness[found["ramps"].genome.code] == min(fitness.values()) and problem.uniform.code in fitness


def test_absolute_errors_are_those_of_the_hessian(problem):
    "Relative error times tr(W H Wᵀ), with the damping of the build, also where an input is always zero."
    model, blocks = small_model("llama-gqa", seed=3), random_blocks()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 0  # a dead channel
    units = prunable_units(model)
    database = build_database(model, blocks, problem.place("dead"), progress=False)
    errors = absolute_errors(model, database, observe(model, units, blocks))
    for unit, row, relative, hessian in zip(units, errors, database.errors, collect_hessians(model, units, blocks, progress=False)):
        weight, wide = model.get_submodule(unit.output).weight.detach().double(), hessian.double()
        mean, dead = wide.diagonal().mean(), wide.diagonal() == 0
        weight = weight.masked_fill(dead, 0)
        energy = (weight @ (wide + 0.01 * mean * torch.eye(len(wide))) @ weight.T).trace().item()
        assert row == pytest.approx([energy * error for error in relative], rel=1e-4)


@pytest.mark.parametrize("heads, expected", [("free", [3, 0, 4, 1, 5, 2]), ("group", [3, 4, 5, 0, 1, 2]), ("query", [3, 0, 4, 1, 5, 2])])
def test_heads_go_by_score_as_the_mode_says(problem, heads, expected):
    "By rising score; group by group; or one of each group per round."
    scores = torch.tensor([2.0, 4.0, 6.0, 1.0, 3.0, 5.0])
    assert removal_order(scores, problem.space.units[0], heads).tolist() == expected
    rounds = removal_order(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), problem.space.units[0], "query")
    assert heads != "query" or rounds.tolist() == [0, 3, 1, 4, 2, 5]


def test_slices_are_the_dense_weights(problem, found):
    "Width pruning keeps the structures of the largest activations, with weights as they were."
    answer, unit = found["width"], len(problem.space.units) - 1
    scores = structure_scores(problem.model, problem.space.units, observe(problem.model, problem.space.units, problem.calibration), "activation")
    level = answer.genome.levels[unit]
    kept, gone = answer.database.kept(unit, level), answer.database.orders[unit][: problem.space.removed[unit][level]]
    assert scores[unit][kept].min() >= scores[unit][gone].max()
    dense = problem.model.get_submodule(problem.space.units[unit].output).weight
    assert torch.equal(answer.database.weight(unit, level), dense[:, kept])


def test_one_unit_scores_are_above_the_dense_model(problem):
    "In nats, whatever the fitness: zero at level 0, and the perplexity's logarithm less the dense model's."
    of_perplexity = replace(problem, fitness="perplexity")
    evaluations = of_perplexity.evaluate(one_unit_genomes(problem.space))
    scores = one_unit_scores(problem.space, nats_of(evaluations, "perplexity"))
    assert [row[0] for row in scores] == [0] * len(problem.space.units) and [*map(len, scores)] == [*map(len, problem.space.removed)]
    last = torch.tensor([evaluations[-1].fitness, evaluations[0].fitness]).double().log()
    assert scores[-1][-1] == pytest.approx((last[0] - last[1]).item(), rel=1e-5)


def test_masks_come_near_the_size_and_leave_the_model_alone(problem):
    "The expected share ends near the wanted one; no weight has a gradient, or has changed."
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in problem.model.named_parameters()}
    log_alphas, rows = train_masks(problem, MaskTraining(tokens=2048, lr=0.5, batch_size=1))
    wanted = 1 - problem.space.params_removed(problem.uniform)
    assert abs(kept_share(log_alphas, problem) - wanted) < 0.1 < rows[0]["kept"] - wanted
    for name, parameter in problem.model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]


def test_larger_than_uniform_is_an_error(problem):
    "No answer above the limit leaves a baseline."
    dense = baseline(lambda problem: Found(Genome((0, 0, 0), (0, 0, 0)), problem.database))
    with pytest.raises(RuntimeError, match="the budget is"):
        dense(problem)


@pytest.mark.parametrize("name, options, message", [
    ("best", {}, "is unknown; use one of uniform,"), ("wanda", dict(scope="all"), "use one of global, kind"), ("width", dict(criterion="size"), "use one of magnitude"),
    ("ramps", dict(ramps=[1.5]), "ramp must be a finite number above -1 and below 1; got 1.5"), ("ziplm", dict(evaluations=0), "evaluations must be a whole number of at least 1"), ("evopress", dict(scale=0), "scale must be a finite number above 0"),
    ("random_search", dict(evaluations=0), "evaluations must be a whole number of at least 1")])
def test_wrong_options_are_named(problem, name, options, message):
    "Before any work, an error says what would be right."
    with pytest.raises(ValueError, match=message):
        solve(name, problem, **options)


def test_what_a_problem_lacks_is_named(problem):
    "A place to write; a single limit; settings of masks; genomes to draw."
    for name in ("width", "uniform_groups", "evopress"):
        with pytest.raises(ValueError, match="give the problem a directory"):
            solve(name, replace(problem, directory=None), **OPTIONS.get(name, {}))
    two = replace(problem, target=Target(sparsity=0.5, limits={"flops": 0.8}, tolerance=0.2))
    for name in ("ramps", "mip", "masks"):
        with pytest.raises(ValueError, match="one limit"):
            solve(name, two, **OPTIONS.get(name, {}))
    with pytest.raises(ValueError, match="warmup must be a finite number from 0 to 1"):
        MaskTraining(warmup=2)
    with pytest.raises(ValueError, match="nothing to draw"):
        genomes_figure([])


def test_one_threshold_makes_the_ranking(problem):
    "Where one layer's scores are all below another's, it gives up more: all, but for what meeting the size moves."
    units = problem.space.units
    scores = [torch.arange(unit.n_structures) + 1000.0 * unit.layer for unit in units]
    genome = ranked_genome(scores, problem, "kind")
    assert list(genome.levels) == [*sorted(genome.attn, reverse=True), *sorted(genome.mlp, reverse=True)]
    assert genome.mlp[0] - genome.mlp[2] >= 6 and genome.attn[0] - genome.attn[2] >= 4
    assert structure_scores(problem.model, units, [None] * len(units), "magnitude")[0].shape == (6,) and Flow(torch.ones(1), torch.ones(1)).energy == 0
