"""A latency table belongs to one database and device, continues after a kill, and becomes a cost like others. (No test asserts a time.)"""
import dataclasses
import json
import random

import pytest
import torch
from helpers import by, made_up, random_blocks, short_config, small_model, small_pools

from evoprune_nb import latency_table
from evoprune_nb.judge import unit_latency
from evoprune_nb.target import Target, plan_budget
from evoprune_nb.genome import Genome, Space
from evoprune_nb.history import History
from evoprune_nb.models import decoder_layers
from evoprune_nb.mutation import make_offspring
from evoprune_nb.database import LevelDatabase, build_database
from evoprune_nb.search import Search, check_search
from evoprune_nb.judge.unit_latency import measure_unit_latency
from evoprune_nb.latency_table import PHASES, open_unit_latency, read_table, unit_shape, with_latency, with_stored_latency, write_table
from evoprune_nb.replay import replay

QUICK = dict(prompt_tokens=8, warmup=0, repeats=3, progress=False)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    "One call per measurement: what is measured is not looked at."
    monkeypatch.setattr(unit_latency, "_LEAST_SECONDS", 0.0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "A model, its database, and a finished table."
    model = small_model("llama-gqa")
    database = build_database(model, random_blocks(), tmp_path_factory.mktemp("latency") / "database", progress=False)
    return model, database, measure_unit_latency(model, database, **QUICK)


@pytest.mark.parametrize("family", ["llama-mha", "llama-biases", "qwen2-tied", "qwen3", "mistral", "qwen2-mixed", "gemma2", "gemma3", "phi3", "glm4"])
def test_every_family_is_measured(family, tmp_path):
    "Every shape of every family gets a time for reading and for writing; missing units cost nothing; the model is left as it was."
    model = small_model(family).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    database = build_database(model.eval(), random_blocks(), tmp_path / "database", n_levels=3, progress=False)
    table = measure_unit_latency(model.train(), database, **QUICK | {"repeats": 1})
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for unit, shapes in enumerate(table.shapes):
        for level, shape in enumerate(shapes):
            assert (shape == "") == (database.space.kept(unit, level) == 0)
            assert not shape or all(table.seconds[shape][phase][0] > 0 for phase in PHASES)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma2"])
def test_what_is_timed_is_what_the_model_computes(family, tmp_path):
    "The lone sublayers of a layer, called as they are timed, add to the residual stream what the whole layer does, again and again: the cache they see stays as it was."
    model = small_model(family)
    database = build_database(model, random_blocks(), tmp_path / "database", n_levels=3, progress=False)
    n_layers = len(decoder_layers(model)[1])
    for phase in PHASES:
        calls = unit_latency._recorded_calls(model, 0, 2, 12)
        with torch.no_grad():
            attention = unit_latency._actions(unit_latency._copies(unit_latency._lone_sublayer(model, database, 0, 0), n_layers), calls, model.config)[phase]
            first, second, copied = attention[0](), attention[0](), attention[1]()
            mlp = unit_latency._lone_sublayer(model, database, n_layers, 0)
            taken = []
            hook = decoder_layers(model)[1][0].register_forward_hook(lambda module, _, output: taken.append(output))
            unit_latency._recorded_calls(model, 0, 2, 12)
            hook.remove()
        assert len(attention) == n_layers and torch.equal(first, second) and torch.equal(first, copied)
        whole = taken[PHASES.index(phase)]
        whole = whole[0] if isinstance(whole, tuple) else whole
        torch.testing.assert_close(mlp(first), whole)


def test_units_of_one_shape_are_measured_once(measured):
    "Shapes tell apart what runs differently (heads, key/value heads, uneven groups, widths), and nothing else."
    model, database, table = measured
    assert {unit_shape(model, database, unit, 1) for unit in (3, 4, 5)} == {table.shapes[3][1]}
    assert table.shapes[0][0].startswith("attn 6:2 in") and any(" uneven" in shape for shape in table.shapes[0]) and table.shapes[0][-1] == ""
    assert set(table.seconds) == {"fixed"} | {shape for row in table.shapes for shape in row if shape}


def test_latency_is_a_cost_like_others(measured):
    "The cost of a genome is the sum of its shapes' medians; budgets, starts and offspring keep it, and the space survives JSON."
    _, database, table = measured
    seconds = {shape: {"prefill": [1.0 + len(shape), 1, 1], "decode": [0.5, 1, 1]} for shape in table.seconds}
    table = dataclasses.replace(table, seconds=seconds, conditions=table.conditions | {"new_tokens": 4})
    space = with_latency(database.space, table)
    genome = space.genome([1, 2, 6, 0, 3, 10])
    shapes = [row[level] for row, level in zip(table.shapes, genome.levels)]
    assert space.cost(genome, "latency") == sum(3.0 + len(shape) for shape in ["fixed", *shapes] if shape)
    assert Space.from_dict(json.loads(json.dumps(dataclasses.asdict(space)))) == space and space.fingerprint == database.space.fingerprint
    budget, start = plan_budget(space, Target(limits={"latency": 0.8, "params": 0.8}, tolerance=0.1))
    for child in make_offspring(start, space, budget, 8, random.Random(0), "cost_swap"):
        assert space.cost(child, "latency") <= 0.8 * space.dense_cost("latency") and space.n_params(child) <= 0.8 * space.dense_params


def test_interrupted_measurement_continues(measured, monkeypatch):
    "After an interrupt, finished shapes are kept and not measured again; until the end, the table cannot be opened."
    model, database, _ = measured
    timed, left = unit_latency._timed, [2]

    def interrupted(*args):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return timed(*args)

    monkeypatch.setattr(unit_latency, "_timed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_unit_latency(model, database, name="killed", **QUICK)
    path = database.directory / "killed.json"
    kept = json.loads(path.read_text())["seconds"]
    assert "fixed" in kept and len(kept) > 1
    with pytest.raises(ValueError, match=r"killed.json is unfinished: \d+ of \d+ shapes are missing; call measure_unit_latency again"):
        open_unit_latency(model, database, "killed")
    left[0] = 1000
    table = measure_unit_latency(model, database, name="killed", **QUICK)
    assert {shape: table.seconds[shape] for shape in kept} == kept and len(table.seconds) > len(kept)
    left[0] = 0
    assert measure_unit_latency(model, database, name="killed", **QUICK) == table  # nothing left to time


def test_other_conditions_are_named(measured, tmp_path, monkeypatch):
    "Another batch, prompt, database, dtype or device is an error that names what differs with both values."
    model, database, table = measured
    with pytest.raises(ValueError, match=r"batch_size \(1 there, 2 here\)"):
        measure_unit_latency(model, database, **QUICK | {"batch_size": 2})
    with pytest.raises(ValueError, match=r"prompt_tokens \(8 there, 9 here\)"):
        measure_unit_latency(model, database, **QUICK | {"prompt_tokens": 9})
    with pytest.raises(ValueError, match="no latency table 'none'.*measure_unit_latency"):
        open_unit_latency(model, database, "none")
    other = build_database(model, random_blocks(seed=1), tmp_path / "other", progress=False)
    (other.directory / "latency.json").write_text((database.directory / "latency.json").read_text())
    with pytest.raises(ValueError, match=r"database \('\w{16}' there, '\w{16}' here\)"):
        open_unit_latency(model, other)
    monkeypatch.setattr(latency_table, "device_name", lambda device: "cpu: abacus")
    with pytest.raises(ValueError, match="device .*'cpu: abacus' here"):
        open_unit_latency(model, database)
    assert open_unit_latency(model, database, elsewhere=True) == table  # measured there on purpose


@pytest.mark.parametrize("options, message", [
    (dict(batch_size=0), "batch_size must be a whole number of at least 1; got 0"), (dict(prompt_tokens=128), "at most 128 tokens; a prompt of 128"), (dict(repeats=0), "repeats"), (dict(new_tokens=-1), "new_tokens.*got -1")])
def test_impossible_conditions_are_errors(measured, options, message):
    "Sizes that cannot be measured are errors before anything is timed or written."
    model, database, _ = measured
    with pytest.raises(ValueError, match=message):
        measure_unit_latency(model, database, name="new", **QUICK | options)
    assert not (database.directory / "new.json").exists()


def test_a_table_of_another_space_is_refused(measured, tmp_path):
    "A table joins only the space of its database."
    model, _, table = measured
    other = build_database(model, random_blocks(), tmp_path / "other", n_levels=4, progress=False)
    with pytest.raises(ValueError, match="another space"):
        with_latency(other.space, table)


def test_a_database_is_never_changed_from_outside(measured, tmp_path):
    "Seconds join the costs of another view of the same files; a space of other genomes is refused, and so is assignment."
    model, database, table = measured
    timed = with_stored_latency(model, database)
    assert "latency" in timed.space.costs and "latency" not in database.space.costs
    assert timed.fingerprint == database.fingerprint and torch.equal(timed.weight(0, 1), database.weight(0, 1))
    assert with_stored_latency(model, timed) is timed
    with pytest.raises(AttributeError):
        database.space = timed.space
    other = build_database(model, random_blocks(), tmp_path / "other", n_levels=4, progress=False)
    with pytest.raises(ValueError, match="the space is of another database"):
        database.with_space(other.space)


def test_new_tokens_can_be_changed_without_measuring_again(measured, monkeypatch):
    "How many tokens are written is a matter of adding up: the same seconds, other costs."
    model, database, _ = measured
    table = measure_unit_latency(model, database, name="written", **QUICK)
    monkeypatch.setattr(unit_latency, "_timed", None)
    more = measure_unit_latency(model, database, name="written", new_tokens=3, **QUICK)
    assert more.seconds == table.seconds and open_unit_latency(model, database, "written") == more
    shape = table.shapes[3][0]
    assert more.cost(shape) == pytest.approx(table.cost(shape) + 3 * table.seconds[shape]["decode"][0])


def test_a_search_needs_the_table_and_keeps_to_it(small, tmp_path):
    "Without a table a limit on seconds is an error that says how to get one; with it the search keeps within it, replays, and resumes only with the same table."
    model, config = small[0], short_config(limits={"latency": 0.8}, operator="cost_swap", tolerance=0.3)
    opened = lambda: LevelDatabase(tmp_path / "database", model)
    build_database(model, random_blocks(), tmp_path / "database", progress=False)
    check_search(model, small_pools(), config)  # before there is a database, seconds are not known
    with pytest.raises(ValueError, match="holds no latency table 'latency'; make one with measure_unit_latency"):
        Search(tmp_path / "run", model, opened(), small_pools(), config)
    measure_unit_latency(model, opened(), **QUICK)
    path = tmp_path / "database" / "latency.json"
    table = read_table(path)
    table["seconds"] = {shape: {phase: [float(shape.split()[-1] != "fixed"), 1, 1] for phase in PHASES} for shape in table["seconds"]}  # one second a unit
    write_table(path, table)
    winner = Search(tmp_path / "run", model, opened(), small_pools(), config, by(made_up)).run(progress=False)
    for code in History(tmp_path / "run").evaluations.genome:
        levels = Genome.parse(code).levels
        assert sum(opened().space.kept(i, level) > 0 for i, level in enumerate(levels)) <= 4  # 0.8 · 6 s: at least two units are gone
    assert replay(tmp_path / "run", tmp_path / "again", model, opened(), small_pools(), progress=False, evaluator=by(made_up)) == winner
    table["seconds"]["fixed"]["prefill"][0] = 0.5
    write_table(path, table)
    with pytest.raises(ValueError, match="different search: fingerprints.costs"):
        Search(tmp_path / "run", model, opened(), small_pools(), config)


def test_every_bit_of_a_table_counts(tmp_path):
    "A digit of a time that flips is noticed, as is a hash that is gone; a table of version 0.1 has none."
    path, table = tmp_path / "latency.json", {"conditions": {"device": "cpu"}, "seconds": {"fixed": {"prefill": [0.25, 0.2, 0.3]}}}
    write_table(path, table)
    whole = path.read_bytes()
    assert read_table(path) == table
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        try:
            assert read_table(path) == table  # white space
        except ValueError as error:
            assert "latency.json is damaged" in str(error)
    path.write_text(json.dumps(table))
    assert read_table(path) == table
