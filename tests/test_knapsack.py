"""The knapsack against trying every combination."""
import itertools
import math

import pytest
from helpers import spaces
from hypothesis import given
from hypothesis import strategies as st

from evoprune_nb import knapsack as module
from evoprune_nb.knapsack import knapsack, knapsack_genome
from evoprune_nb.target import Target, plan_budget

levels = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=5)
tables = st.lists(levels, min_size=1, max_size=5)


def split(units):
    return [[score for score, _ in unit] for unit in units], [[cost for _, cost in unit] for unit in units]


def total(table, chosen):
    return sum(row[level] for row, level in zip(table, chosen, strict=True))


@given(tables, st.integers(0, 150), st.sampled_from([1, 0.001, 1e6]))
def test_no_combination_is_better(units, limit, scale):
    "Within the limit, the sum of scores is the least of all combinations; without any, the error names the least cost."
    scores, costs = split(units)
    scaled = [[scale * cost for cost in row] for row in costs]
    allowed = [choice for choice in itertools.product(*map(range, map(len, scores))) if total(scaled, choice) <= scale * limit]
    if not allowed:
        with pytest.raises(ValueError, match="no choice of levels is within the limit"):
            knapsack(scores, scaled, scale * limit)
        return
    chosen = knapsack(scores, scaled, scale * limit)
    assert total(scaled, chosen) <= scale * limit
    assert total(scores, chosen) == min(total(scores, choice) for choice in allowed)


def test_few_states_keep_the_limit(monkeypatch):
    "With more partial sums than are kept, the choice is within the limit, and no worse than at the next lower one."
    costs = [[(37 * unit + 11) * level**2 % 997 for level in range(9)] for unit in range(12)]
    scores = [[-cost for cost in row] for row in costs]  # every cost counts: the sum itself is the aim
    limit = 5000
    monkeypatch.setattr(module, "STATES", 256)
    spread = sum(map(max, costs)) / 256 * len(costs)
    assert limit - spread <= total(costs, knapsack(scores, costs, limit)) <= limit


def test_infinite_scores_are_never_chosen():
    "Levels may be forbidden; a unit without any level left is an error, as is what is no number."
    assert knapsack([[math.inf, 2, 1], [0, math.inf]], [[0, 5, 9], [3, 0]], 8) == [1, 0]
    for scores, message in (([[math.inf]], "unit 0 has no level"), ([[math.nan]], "numbers are needed"), ([[1, 2]], "same units and levels")):
        with pytest.raises(ValueError, match=message):
            knapsack(scores, [[1]], 5)


@given(spaces(), st.floats(0.1, 0.9))
def test_genome_of_a_budget(space, sparsity):
    "The genome keeps the limit, and its scores are no worse than those of the uniform genome."
    budget, uniform = plan_budget(space, Target(sparsity=sparsity))
    scores = [[(gone / unit.n_structures) ** 2 * (unit.layer + 1) for gone in removed] for unit, removed in zip(space.units, space.removed)]
    genome = knapsack_genome(scores, space, budget)
    assert budget.fits(budget.costs(space, genome)) and total(scores, genome.levels) <= total(scores, uniform.levels) * (1 + 1e-9)
