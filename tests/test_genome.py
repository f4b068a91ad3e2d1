"""Genomes, grids and spaces."""
import dataclasses
import json

import pytest
from helpers import small_model, spaces
from hypothesis import given
from hypothesis import strategies as st

from evoprune_nb.genome import Genome, Space, equal_levels, level_grid, make_space
from evoprune_nb.models import prunable_units

rows = st.lists(st.integers(0, 35), max_size=50).map(tuple)


@pytest.fixture(scope="module")
def model():
    return small_model("qwen3")


@pytest.fixture(scope="module")
def space(model):
    units = prunable_units(model)
    return make_space(model, units, level_grid(units), fingerprint="qwen3")


@given(rows, rows)
def test_code_and_levels_round_trip(attn, mlp):
    "A genome is what its code, its levels and its JSON say, and equal genomes hash alike."
    genome = Genome(attn, mlp)
    assert Genome.parse(genome.code) == genome == genome.with_levels(genome.levels)
    assert hash(Genome.parse(genome.code)) == hash(genome)
    assert str(genome).split("\n") == [f"attn {genome.code.split('/')[0]}", f"mlp  {genome.code.split('/')[1]}"]


@given(st.lists(st.tuples(st.integers(0, 35), st.integers(0, 35), st.integers(0, 35)), min_size=1))
def test_distance_is_a_metric(levels):
    "Distance counts level steps: zero only for equal genomes, symmetric, triangle inequality."
    a, b, c = (Genome(row, ()) for row in zip(*levels))
    assert (a.distance(b) == 0) == (a == b) and a.distance(b) == b.distance(a)
    assert a.distance(c) <= a.distance(b) + b.distance(c)


def test_genomes_cannot_be_changed_or_out_of_range():
    "A genome is immutable, and levels it cannot print are an error."
    with pytest.raises(dataclasses.FrozenInstanceError):
        Genome((1,), (2,)).attn = (2,)
    for levels in ((-1,), (36,)):
        with pytest.raises(ValueError, match="between 0 and 35"):
            Genome(levels, ())


@pytest.mark.parametrize("n_structures, levels", [
    (14336, (0, 1440, 2880, 4288, 5728, 7168, 8608, 10048, 11456, 12896, 14336)),  # Llama-3.1-8B, as published
    (13824, (0, 1376, 2752, 4160, 5536, 6912, 8288, 9664, 11072, 12448, 13824)),  # Qwen2.5-14B
    (32, (0, 3, 6, 10, 13, 16, 19, 22, 26, 29, 32)), (4, (0, 1, 2, 3, 4)), (1, (0, 1))])
def test_grids(n_structures, levels):
    "Ten equal steps, hardware-friendly for wide MLPs as published; steps that coincide are merged."
    assert equal_levels(n_structures) == levels


def test_the_finest_grid_has_a_code(model):
    "The most levels that a grid may have, the genome's code can say."
    grid = level_grid(prunable_units(model), n_levels=35)
    space = make_space(model, prunable_units(model), grid)
    genome = space.genome([len(levels) - 1 for levels in grid])
    assert max(map(len, grid)) == 36 and space.check(Genome.parse(genome.code)) == genome


@given(st.integers(1, 20_000), st.integers(2, 30))
def test_grids_rise_evenly_from_nothing_to_all(n_structures, n_levels):
    "Every grid starts dense, ends empty, rises strictly, and stays within a rounding step of equal steps."
    levels = equal_levels(n_structures, n_levels)
    assert levels[0] == 0 and levels[-1] == n_structures and list(levels) == sorted(set(levels))
    exact = [n_structures * k / n_levels for k in range(n_levels + 1)]
    assert all(min(abs(level - point) for level in levels) <= 16 for point in exact)


@pytest.mark.parametrize("heads, step", [("free", 1), ("query", 2), ("group", 3)])
def test_head_modes_step_in_query_heads(model, heads, step):
    "Grids count query heads in all modes: one by one, one of every group, whole groups."
    attn = level_grid(prunable_units(model), heads)[0]
    assert attn == tuple(range(0, 7, step))


@pytest.mark.parametrize("options, message", [
    (dict(heads="both"), "free, kv, query, group"), (dict(n_levels=1), "n_levels must be a whole number from 2 to 1,000; got 1"), (dict(custom={"mlp": [1, 80]}), "mlp.00.*start at 0"),
    (dict(custom={"mlp": [0, 81]}), "at most 80"), (dict(custom={"attn": [0, 4, 2]}), "rise"), (dict(heads="group", custom={"attn": [0, 2]}), "steps of 3 heads"),
    (dict(n_levels=36), "mlp.00 would have 37 levels.*at most 36"), (dict(custom={"mlp": range(37)}), "at most 36"), (dict(custom={"mpl": [0, 80]}), "kind of units in grid 'mpl' is unknown")])
def test_impossible_grids_say_what_would_be_possible(model, options, message):
    "A grid a unit cannot have is an error that names the unit's limits."
    with pytest.raises(ValueError, match=message):
        level_grid(prunable_units(model), **options)


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-biases", "llama-tied", "qwen2", "qwen3", "mistral"])
def test_dense_costs_are_the_models_own(family):
    "The dense genome costs what the model has; the emptiest one only what no unit owns."
    model = small_model(family)
    units = prunable_units(model)
    space = make_space(model, units, level_grid(units))
    owned = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    assert space.n_params(space.genome([0] * 6)) == space.dense_params == sum(p.numel() for p in model.parameters())
    assert space.n_params(space.genome([len(levels) - 1 for levels in space.removed])) == space.smallest_params == space.dense_params - owned


@pytest.mark.parametrize("genome, message", [(Genome((0,), (0,)), "1 attention and 1 MLP levels, but the model has 3 and 3"), (Genome((0, 0, 9), (0, 0, 0)), "attn.02 at level 9")])
def test_genome_of_another_shape_is_refused(space, genome, message):
    "A genome that a space does not contain says why."
    with pytest.raises(ValueError, match=message):
        space.n_params(genome)


@given(spaces())
def test_space_round_trips_through_json(space):
    "A space is what its JSON says; measures it does not know are an error that names those it does."
    assert Space.from_dict(json.loads(json.dumps(dataclasses.asdict(space)))) == space
    with pytest.raises(ValueError, match="'latency' are not known.*params, flops, kv_bytes"):
        space.cost(space.genome([0] * len(space.units)), "latency")


def test_spaces_of_earlier_versions_load(space):
    "JSON with parameters only, as run directories of earlier versions hold it, gives the same genomes, fingerprint and sizes."
    row = json.loads(json.dumps(dataclasses.asdict(space)))
    old = {"units": row["units"], "removed": row["removed"], "params": row["costs"]["params"], "fixed_params": row["fixed"]["params"], "model": row["model"]}
    loaded, genome = Space.from_dict(old), space.genome([1, 2, 3, 4, 5, 6])
    assert loaded.fingerprint == space.fingerprint and loaded.n_params(genome) == space.n_params(genome) and list(loaded.costs) == ["params"]


@given(spaces(), st.data())
def test_costs_are_sums_over_units(space, data):
    "What a genome costs is the fixed part and one entry of the table for each unit, in every measure."
    genome = space.genome([data.draw(st.integers(0, space.n_levels(i) - 1)) for i in range(len(space.units))])
    for measure, table in space.costs.items():
        assert space.cost(genome, measure) == space.fixed[measure] + sum(table[i][level] for i, level in enumerate(genome.levels))
