"""Budgets: what they ask for, where a search starts, what they refuse."""
import dataclasses

import pytest
from helpers import small_model, spaces
from hypothesis import given
from hypothesis import strategies as st

from evoprune_nb.budgets import Budget, plan_budget, uniform_genome
from evoprune_nb.genome import level_grid, make_space
from evoprune_nb.models import prunable_units

shares = st.floats(0, 1)


@pytest.fixture(scope="module")
def model():
    return small_model("qwen3")


@pytest.fixture(scope="module")
def space(model):
    units = prunable_units(model)
    return make_space(model, units, level_grid(units), fingerprint="qwen3")


@given(spaces(), shares)
def test_uniform_genome_removes_the_share(space, sparsity):
    "Of heads and of channels alike, the share asked for is removed to within half a level step of the whole model."
    genome = uniform_genome(space, sparsity)
    for kind in ("attn", "mlp"):
        of_kind = [i for i, unit in enumerate(space.units) if unit.kind == kind]
        gone = sum(space.removed[i][genome.levels[i]] for i in of_kind)
        wanted = sparsity * sum(space.units[i].n_structures for i in of_kind)
        step = max(b - a for i in of_kind for a, b in zip(space.removed[i], space.removed[i][1:]))
        assert abs(gone - wanted) <= step / 2 + 1e-6
        assert max(genome.levels[i] for i in of_kind) - min(genome.levels[i] for i in of_kind) <= 1


@given(spaces(), shares, st.floats(0, 0.5))
def test_budget_is_one_sided(space, sparsity, tolerance):
    "The target of a budget is the uniform genome's own size: it fits, one parameter more does not, nor does less than the tolerance."
    budget, start = plan_budget(space, sparsity=sparsity, tolerance=tolerance)
    assert start == uniform_genome(space, sparsity) and budget.limits == {"params": space.n_params(start)}
    target = space.n_params(start)
    sized = lambda extra: dataclasses.replace(space, fixed=space.fixed | {"params": space.fixed_params + extra})
    assert budget.contains(space, start) and not budget.contains(sized(1), start)
    assert not budget.contains(sized(int(target * (1 - tolerance)) - 1 - target), start)


@given(spaces(), shares, st.floats(0.001, 0.2))
def test_budget_in_parameters_is_never_exceeded(space, share, tolerance):
    "With `params`, the uniform start is at most that large and within the tolerance; where none is, the nearest is named."
    params = round(space.smallest_params + share * (space.dense_params - space.smallest_params))
    try:
        budget, start = plan_budget(space, params=params, tolerance=tolerance)
    except ValueError as error:
        assert "the nearest uniform genome has" in str(error)
    else:
        assert budget == Budget({"params": params}, tolerance) and params * (1 - tolerance) <= space.n_params(start) <= params


@pytest.mark.parametrize("wanted, message", [
    (dict(sparsity=1.2), "1.2 is outside what the grid can reach: 0 to 1"), (dict(sparsity=-0.1), "0 to 1"), (dict(params=100), r"{smallest:,} to {dense:,}"),
    (dict(params=10**9), r"{smallest:,} to {dense:,}"), ({}, "either sparsity or params"), (dict(sparsity=0.5, params=1000), "either sparsity or params")])
def test_budgets_out_of_reach_name_the_range(space, wanted, message):
    "A sparsity or size that the grid cannot reach is an error with the range that it can."
    with pytest.raises(ValueError, match=message.format(smallest=space.smallest_params, dense=space.dense_params)):
        plan_budget(space, **wanted)


def test_range_of_a_grid_that_does_not_reach_the_top(model):
    "Where a custom grid stops at half, so does the reachable sparsity."
    units = prunable_units(model)
    space = make_space(model, units, level_grid(units, custom={"mlp": [0, 20, 40]}))
    assert space.params_removed(uniform_genome(space, 0.5)) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="0 to 0.5"):
        uniform_genome(space, 0.51)
