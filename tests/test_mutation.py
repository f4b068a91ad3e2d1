"""Offspring are new, within the budget, and reproducible."""
import random

import pytest
from helpers import small_model, spaces
from hypothesis import given
from hypothesis import strategies as st

from evoprune_nb.target import Budget, Target, plan_budget
from evoprune_nb.genome import level_grid, make_space
from evoprune_nb.models import prunable_units
from evoprune_nb.mutation import OPERATORS, MutationError, cost_swap, level_swap, make_offspring

seeds = st.integers(0, 2**32)


@st.composite
def parents(draw):
    "A space, a genome in it, and some frozen units."
    space = draw(spaces())
    genome = space.genome([draw(st.integers(0, space.n_levels(unit) - 1)) for unit in range(len(space.units))])
    return space, genome, draw(st.sets(st.integers(0, len(space.units) - 1)))


@given(parents(), seeds, st.integers(1, 5))
def test_level_swap_conserves_levels_of_each_kind(drawn, seed, max_swaps):
    "Swaps keep the sum of levels of attention and of MLPs, stay in the grid, leave frozen units alone, and are at most max_swaps."
    space, parent, frozen = drawn
    child = space.check(level_swap(parent, space, random.Random(seed), max_swaps, frozen))
    assert sum(child.attn) == sum(parent.attn) and sum(child.mlp) == sum(parent.mlp)
    assert all(child.levels[unit] == parent.levels[unit] for unit in frozen)
    assert child.distance(parent) % 2 == 0 and child.distance(parent) <= 2 * max_swaps


@given(parents(), seeds)
def test_level_swap_is_a_function_of_its_generator(drawn, seed):
    "The same seed gives the same child, whatever the global generator is doing."
    space, parent, frozen = drawn
    first = level_swap(parent, space, random.Random(seed), frozen=frozen)
    random.random()
    assert level_swap(parent, space, random.Random(seed), frozen=frozen) == first


@given(spaces(), st.floats(0, 1), seeds, st.integers(1, 8), st.data())
def test_offspring_keep_every_promise_or_say_how_many_do(space, sparsity, seed, n, data):
    "Offspring are n distinct genomes within the budget, not the parent, frozen units untouched, and reproducible; or an error says how many there are."
    budget, parent = plan_budget(space, Target(sparsity=sparsity, tolerance=0.05))
    frozen = data.draw(st.sets(st.integers(0, len(space.units) - 1), max_size=len(space.units) // 2))
    make = lambda: make_offspring(parent, space, budget, n, random.Random(seed), frozen=frozen, max_tries=40)
    try:
        offspring = make()
    except MutationError as error:
        assert any(f"only {found} of {n}" in str(error) for found in range(n))
        return
    assert len(set(offspring)) == len(offspring) == n and parent not in offspring
    assert all(budget.limits["params"] * 0.95 <= space.n_params(child) <= budget.limits["params"] for child in offspring)
    assert all(child.levels[unit] == parent.levels[unit] for child in offspring for unit in frozen)
    assert make() == offspring


@pytest.fixture(scope="module")
def space():
    model = small_model("llama-gqa")
    units = prunable_units(model)
    return make_space(model, units, level_grid(units))


def test_offspring_are_found_where_they_exist(space):
    "An ordinary space has a full generation of offspring, and every unit is reached by mutation."
    budget, parent = plan_budget(space, Target(sparsity=0.5, tolerance=0.05))
    changed = set()
    for seed in range(20):
        offspring = make_offspring(parent, space, budget, 16, random.Random(seed))
        changed |= {unit for child in offspring for unit in range(6) if child.levels[unit] != parent.levels[unit]}
    assert changed == set(range(6))


@pytest.mark.parametrize("options, message", [
    (dict(frozen=range(6)), "only 0 of 4 .*6 of 6 units frozen.*thaw"), (dict(frozen=(0, 1, 2, 3, 4)), "only 0 of 4"), (dict(sparsity=1.0), "only 0 of 4"), (dict(n=10_000), "of 10000")])
def test_impossible_generations_end_with_an_error(space, options, message):
    "Everything frozen, a single thawed unit, nothing left to swap, more offspring than exist: an error, not an endless loop."
    options = dict(sparsity=0.5, n=4, frozen=()) | options
    budget, parent = plan_budget(space, Target(sparsity=options.pop("sparsity")))
    with pytest.raises(MutationError, match=message):
        make_offspring(parent, space, budget, rng=random.Random(0), max_tries=20, **options)


def test_unknown_operator_names_the_known_ones(space):
    "A misspelt operator is an error that lists those there are."
    budget, parent = plan_budget(space, Target(sparsity=0.5))
    with pytest.raises(ValueError, match="level_swap"):
        make_offspring(parent, space, budget, 1, random.Random(0), operator="levelswap")


@given(parents(), seeds, st.integers(1, 5))
def test_cost_swap_leaves_frozen_units_alone(drawn, seed, max_swaps):
    "Cost swaps stay in the grid, never touch frozen units, and depend on their generator alone."
    space, parent, frozen = drawn
    budget = Budget({"params": space.n_params(parent) + 1}, 0.05)
    child = space.check(cost_swap(parent, space, budget, random.Random(seed), max_swaps, frozen))
    assert all(child.levels[unit] == parent.levels[unit] for unit in frozen)
    assert cost_swap(parent, space, budget, random.Random(seed), max_swaps, frozen) == child


limit_sets = st.dictionaries(st.sampled_from(("params", "flops", "kv_bytes")), st.floats(0.2, 0.9), min_size=1)


@given(spaces(), limit_sets, seeds, st.sampled_from(sorted(OPERATORS)), st.data())
def test_offspring_keep_limits_and_caps(space, limits, seed, operator, data):
    "Under limits of any kind, alone or together, and caps: offspring of both operators exceed none, waste none, and keep frozen units; or an error says how many there are."
    caps = {"max_width": data.draw(st.integers(0, 400)), "min_heads": data.draw(st.integers(0, 3))}
    try:
        budget, parent = plan_budget(space, Target(limits=limits, caps=caps, tolerance=0.1))
    except ValueError:
        return
    frozen = data.draw(st.sets(st.integers(0, len(space.units) - 1), max_size=len(space.units) // 2))
    try:
        offspring = make_offspring(parent, space, budget, 4, random.Random(seed), operator, frozen=frozen, max_tries=30)
    except MutationError as error:
        assert "of 4 distinct offspring" in str(error)
        return
    for child in offspring:
        used = [space.cost(child, measure) / (share * space.dense_cost(measure)) for measure, share in limits.items()]
        assert 0.9 - 1e-12 <= max(used) <= 1 + 1e-12
        assert all(child.levels[unit] == parent.levels[unit] for unit in frozen)
        for i, level in enumerate(child.levels):
            assert space.kept(i, level) <= caps["max_width"] if space.units[i].kind == "mlp" else space.kept(i, level) >= caps["min_heads"]


def test_cost_swaps_trade_heads_for_channels(space):
    "Level swaps keep the number of levels of each kind; cost swaps change it in most children, both ways, and nearly all meet the budget."
    budget, parent = plan_budget(space, Target(limits={"params": 0.6}, tolerance=0.05))
    children = [cost_swap(parent, space, budget, random.Random(seed)) for seed in range(200)]
    heads = [sum(child.attn) - sum(parent.attn) for child in children]
    assert sum(budget.contains(space, child) for child in children) > 150 and min(heads) < 0 < max(heads) and sum(map(bool, heads)) > 60


@pytest.mark.parametrize("wanted, start, offspring", [
    (dict(sparsity=0.5), "33333333/55555555", ["33333333/46555555", "33333333/45555655", "33333333/55565455", "33333333/55554565"]),
    (dict(sparsity=0.3), "22122221/33333333", ["22132211/33333333", "32122211/33333333", "12122321/33333333", "32121221/33333333"]),
    (dict(params=2_510_000), "33233332/54554554", ["33233332/45554554", "33233332/44554654", "33323332/54554554", "33233332/54564454"])])
def test_level_swaps_of_earlier_versions_are_reproduced(tiny, wanted, start, offspring):
    "Budgets of sparsity or parameters give the genomes, and the space the fingerprint, that version 0.1.0 gave: its runs can be continued."
    units = prunable_units(tiny)
    space = make_space(tiny, units, level_grid(units), fingerprint="tiny")
    budget, parent = plan_budget(space, Target(**wanted))
    assert space.fingerprint == "e084fbfcfc667ed5" and parent.code == start
    assert [child.code for child in make_offspring(parent, space, budget, 4, random.Random(7))] == offspring
