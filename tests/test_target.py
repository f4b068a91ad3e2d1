"""Budgets: what they ask for, where a search starts, what they refuse."""
import dataclasses
import itertools
import math
import random

import pytest
from helpers import small_model, spaces
from hypothesis import given
from hypothesis import strategies as st

from evoprune_nb.target import Budget, Target, fit_budget, plan_budget, uniform_genome
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
    budget, start = plan_budget(space, Target(sparsity=sparsity, tolerance=tolerance))
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
        budget, start = plan_budget(space, Target(params=params, tolerance=tolerance))
    except ValueError as error:
        assert "the nearest uniform genome has" in str(error)
    else:
        assert budget == Budget({"params": params}, tolerance) and params * (1 - tolerance) <= space.n_params(start) <= params


@pytest.mark.parametrize("wanted, message", [
    (dict(sparsity=1.2), "a share of the structures, must be a finite number from 0 to 1; got 1.2"), (dict(sparsity=-0.1), "0 to 1"), (dict(params=100), r"{smallest:,} to {dense:,}"),
    (dict(params=10**9), r"{smallest:,} to {dense:,}"), ({}, "either sparsity or params"), (dict(sparsity=0.5, params=1000), "either sparsity or params")])
def test_budgets_out_of_reach_name_the_range(space, wanted, message):
    "A sparsity or size that the grid cannot reach is an error with the range that it can."
    with pytest.raises(ValueError, match=message.format(smallest=space.smallest_params, dense=space.dense_params)):
        plan_budget(space, Target(**wanted))


def test_range_of_a_grid_that_does_not_reach_the_top(model):
    "Where a custom grid stops at half, so does the reachable sparsity."
    units = prunable_units(model)
    space = make_space(model, units, level_grid(units, custom={"mlp": [0, 20, 40]}))
    assert space.params_removed(uniform_genome(space, 0.5)) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="0 to 0.5"):
        uniform_genome(space, 0.51)


MEASURES = ("params", "flops", "kv_bytes")
limit_sets = st.dictionaries(st.sampled_from(MEASURES), st.floats(0.05, 1), min_size=1)


def all_genomes(space):
    "Every genome of a space (small ones only)."
    return map(space.genome, itertools.product(*(range(space.n_levels(i)) for i in range(len(space.units)))))


@st.composite
def little_spaces(draw):
    "A space of at most two layers and a few levels, so that all its genomes can be tried."
    space = draw(spaces().filter(lambda space: len(space.units) <= 4 and math.prod(space.n_levels(i) for i in range(len(space.units))) <= 4000))
    return dataclasses.replace(space, fixed=space.fixed | {"params": space.fixed_params + 1})


@given(spaces(), limit_sets, st.floats(0.01, 0.2))
def test_limits_alone_or_together_are_never_exceeded(space, limits, tolerance):
    "A start exceeds no share of the dense model's cost and uses at least one up to the tolerance; what cannot be had is an error with the range."
    try:
        budget, start = plan_budget(space, Target(limits=limits, tolerance=tolerance))
    except ValueError as error:
        assert "can reach" in str(error) or "the nearest uniform genome has" in str(error)
        return
    used = {measure: space.cost(start, measure) / space.dense_cost(measure) / share for measure, share in limits.items()}
    assert all(share <= 1 + 1e-12 for share in used.values()) and max(used.values()) >= 1 - tolerance - 1e-12
    assert budget.contains(space, start) and set(budget.limits) == set(limits)


def test_a_cache_limit_prunes_attention_alone(space):
    "What a limit does not count is not pruned for it; a second limit takes the rest from everywhere."
    _, start = plan_budget(space, Target(limits={"kv_bytes": 0.5}, tolerance=0.1))
    assert sum(start.attn) > 0 and sum(start.mlp) == 0
    _, both = plan_budget(space, Target(limits={"kv_bytes": 0.5, "params": 0.6}, tolerance=0.1))
    assert both.attn == start.attn and sum(both.mlp) > 0
    _, sparse = plan_budget(space, Target(sparsity=0.5, limits={"kv_bytes": 0.34}, tolerance=0.1))
    assert space.n_params(sparse) <= space.n_params(uniform_genome(space, 0.5)) and space.cost(sparse, "kv_bytes") <= 0.34 * space.dense_cost("kv_bytes")


@given(spaces(), limit_sets, st.data())
def test_caps_hold_in_every_unit(space, limits, data):
    "With caps, a start has no wider or smaller layer than they allow, whatever the limits; or an error says what the levels keep."
    caps = data.draw(st.fixed_dictionaries({}, optional={
        "max_width": st.integers(0, 400), "min_width": st.integers(0, 400), "max_heads": st.integers(0, 16), "min_heads": st.integers(0, 16)}))
    try:
        budget, start = plan_budget(space, Target(limits=limits, caps=caps, tolerance=0.2))
    except ValueError as error:
        assert any(text in str(error) for text in ("can reach", "the nearest uniform genome has", "no level of", "contradict"))
        return
    for i, level in enumerate(start.levels):
        high, low = ("max_width", "min_width") if space.units[i].kind == "mlp" else ("max_heads", "min_heads")
        assert caps.get(low, 0) <= space.kept(i, level) <= caps.get(high, math.inf)


@given(little_spaces(), st.data())
def test_contains_is_what_it_says(space, data):
    "Against an oracle: costs summed by hand, limits compared by hand, for every genome of a small space."
    genomes = list(all_genomes(space))
    target = data.draw(st.sampled_from(genomes))
    budget = Budget({"params": space.n_params(target), "kv_bytes": space.cost(target, "kv_bytes") + 1}, data.draw(st.floats(0, 0.5)))
    for genome in genomes[:: max(1, len(genomes) // 50)]:
        costs = {m: space.fixed[m] + sum(space.costs[m][i][level] for i, level in enumerate(genome.levels)) for m in budget.limits}
        fits = all(costs[m] <= limit for m, limit in budget.limits.items())
        assert budget.contains(space, genome) == (fits and any(costs[m] >= limit * (1 - budget.tolerance) for m, limit in budget.limits.items()))


def errors_of(space, seed: int) -> list[list[float]]:
    "Errors that rise with the level, at another pace for every unit."
    rng = random.Random(seed)
    return [sorted(rng.random() for _ in levels) for levels in space.removed]


@given(little_spaces(), limit_sets, st.floats(0.001, 0.3), st.integers(0, 99), st.data())
def test_fitting_ends_within_the_budget_or_says_why_not(space, limits, tolerance, seed, data):
    "Fitted genomes meet the budget, frozen units are untouched; what no genome of the free units can have is an error. Where single steps are within the tolerance, an existing fit is always found."
    genome = space.genome([data.draw(st.integers(0, space.n_levels(i) - 1)) for i in range(len(space.units))])
    frozen = data.draw(st.sets(st.integers(0, len(space.units) - 1), max_size=len(space.units) - 1))
    budget = Budget({measure: max(1, share * space.dense_cost(measure)) for measure, share in limits.items()}, tolerance)
    free = (other for other in all_genomes(space) if all(other.levels[i] == genome.levels[i] for i in frozen))
    exists = any(budget.contains(space, other) for other in free)
    try:
        fitted = fit_budget(genome, space, budget, errors_of(space, seed), frozen)
    except ValueError as error:
        assert "units are frozen, and the others reach" in str(error)
        steps = [(a - b) / limit for m, limit in budget.limits.items() for costs in space.costs[m] for a, b in zip(costs, costs[1:])]
        assert not exists or max(steps) > tolerance
        return
    assert exists and budget.contains(space, fitted) and all(fitted.levels[i] == genome.levels[i] for i in frozen)
    assert not budget.contains(space, genome) or fitted == genome


@given(spaces(), shares, st.floats(0.01, 1), st.floats(0.01, 0.3), st.integers(0, 99))
def test_fitting_changes_no_more_than_it_must(space, before, share, tolerance, seed):
    "Towards a smaller budget no unit is raised that could stay a level lower; towards a larger one none is raised at all; the same arguments give the same genome."
    space = dataclasses.replace(space, fixed=space.fixed | {"params": 1000})
    start = uniform_genome(space, before)
    budget = Budget({"params": space.fixed_params + share * (space.dense_params - space.fixed_params)}, tolerance)
    single_steps = max(a - b for costs in space.params for a, b in zip(costs, costs[1:])) <= tolerance * budget.limits["params"]
    if not single_steps:  # then pairs of steps may be needed
        return
    fitted = fit_budget(start, space, budget, errors_of(space, seed))
    raised = [i for i, (a, b) in enumerate(zip(start.levels, fitted.levels)) if b > a]
    assert not raised or not budget.fits(budget.costs(space, start))
    for i in raised:
        undone = space.genome([level - (j == i) for j, level in enumerate(fitted.levels)])
        assert not budget.fits(budget.costs(space, undone))
    assert fit_budget(start, space, budget, errors_of(space, seed)) == fitted


def test_the_cheapest_steps_are_taken_first(space):
    "With costs alike, units whose error rises least are raised first, against an oracle that sorts all steps by error."
    errors = [[0.1 * level * (1 + i) for level in range(space.n_levels(i))] if space.units[i].kind == "mlp" else [100.0 * level for level in range(space.n_levels(i))] for i in range(6)]
    dense = space.genome([0] * 6)
    step = space.params[3][0] - space.params[3][1]
    budget = Budget({"params": space.dense_params - 14 * step}, tolerance=step / space.dense_params)
    fitted = fit_budget(dense, space, budget, errors)
    assert fitted.attn == (0, 0, 0) and fitted.mlp[0] == len(space.removed[3]) - 1 and fitted.mlp[1] >= fitted.mlp[2] == 0


def test_units_that_break_a_cap_are_moved_or_named(space):
    "A genome with a layer wider than a new cap is moved within it; when that layer is frozen, the error names it."
    genome = uniform_genome(space, 0.5)
    wide = space.genome([*genome.levels[:3], 0, *genome.levels[4:]])
    budget = Budget({"params": space.n_params(genome)}, 0.1, {"max_width": 48})
    fitted = fit_budget(wide, space, budget, errors_of(space, 0))
    assert budget.contains(space, fitted) and all(space.kept(i, fitted.levels[i]) <= 48 for i in (3, 4, 5))
    with pytest.raises(ValueError, match="mlp.00 break a cap.*frozen"):
        fit_budget(wide, space, budget, errors_of(space, 0), frozen=(3,))


@pytest.mark.parametrize("wanted, message", [
    ({}, "nothing limits the size"), (dict(sparsity=math.nan), "from 0 to 1; got nan"), (dict(sparsity=-0.1), "from 0 to 1; got -0.1"), (dict(sparsity=True), "got True"),
    (dict(sparsity="half"), "got 'half'"), (dict(params=-1), "of at least 0; got -1"), (dict(params=math.inf), "got inf"), (dict(limits={"flops": math.nan}), "got nan"),
    (dict(sparsity=0.5, tolerance=-0.1), "tolerance.*got -0.1"), (dict(sparsity=0.5, tolerance=1), "tolerance.*got 1"), (dict(sparsity=0.5, tolerance=math.nan), "got nan"),
    (dict(sparsity=0.5, caps={"max_width": True}), "got True"), (dict(sparsity=0.5, caps={"min_heads": -1}), "got -1"), (dict(sparsity=0.5, limits=0.5), "limits and caps must be dicts; got 0.5")])
def test_sizes_that_make_no_sense_are_refused_at_once(wanted, message):
    "Before a model is loaded: wrong types, NaN, negative numbers, two sizes at once, none at all."
    with pytest.raises(ValueError, match=message):
        Target(**wanted)


@pytest.mark.parametrize("wanted, message", [
    (dict(limits={"flops": 0.001}), r"limits\['flops'\]=0.001 is outside what the grid can reach: 0.\d+ to 1 of the dense model's"), (dict(limits={"flop": 0.5}), "'flop' is unknown; use one of params, flops.*did you mean 'flops'"),
    (dict(limits={"flops": 1.5}), "above 0 and of at most 1; got 1.5"), (dict(limits={"flops": "half"}), "got 'half'"), (dict(limits={"kv_bytes": 0}), "above 0"),
    (dict(limits={"latency": 0.5}), "'latency' are not known here .measure it"), (dict(sparsity=0.5, limits={"params": 0.5}), "once"),
    (dict(sparsity=0.1, caps={"max_width": 40}), "can reach: 0.5 to 1"), (dict(sparsity=0.9, caps={"min_heads": 2}), "can reach: 0 to 0.6"),
    (dict(params=10_000, caps={"min_heads": 6, "min_width": 80}), "outside what the grid can reach"), (dict(sparsity=0.5, caps={"max_heads": 3, "min_heads": 4}), "contradict: min_heads 4 > max_heads 3"),
    (dict(sparsity=0.5, caps={"width": 4}), "'width' is unknown; use one of max_width"), (dict(sparsity=0.5, caps={"max_width": 0.5}), "a whole number of at least 0; got 0.5")])
def test_limits_and_caps_out_of_reach_say_what_is_possible(space, wanted, message):
    "Limits and caps that cannot be met are errors with the range, the names or the numbers that can."
    with pytest.raises(ValueError, match=message):
        plan_budget(space, Target(**wanted))
