"""The level database is exact, and survives interruption."""
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from helpers import random_blocks, small_model

from evoprune_nb import pruning
from evoprune_nb.models import Unit, decoder_layers, model_fingerprint
from evoprune_nb.database import CalibrationPlan, LevelDatabase, build_database, plan_calibration
from evoprune_nb.pruning import kept_structures, prune_unit

HEADS = dict(size=4, n_kv_heads=2)


def problem(n_columns: int, n_samples: int = 400, n_rows: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "A weight, correlated inputs (columns, samples), and their Hessian, all from one generator."
    generator = torch.Generator().manual_seed(n_columns)
    weight = torch.randn(n_rows, n_columns, generator=generator)
    mixing = torch.randn(n_columns, n_columns, generator=generator) / n_columns**0.5 + torch.diag(torch.rand(n_columns, generator=generator))
    inputs = (mixing @ torch.randn(n_columns, n_samples, generator=generator)).double()
    return weight, inputs, (2 * inputs @ inputs.T / n_samples).float()


def brain_surgeon(weight, hessian, size=1, n_kv_heads=0, heads="free", damping=0.01):
    """Remove one structure after another by the formulas of the paper, inverting from scratch each time.

    Returns the order of removal and, per number of structures removed, the full-size updated weight."""
    w, h = weight.double().clone(), hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    n_structures = len(h) // size
    group = n_structures // n_kv_heads if n_kv_heads else 1
    structures = [[s] for s in range(n_structures)]
    if heads == "group":
        structures = [list(range(g * group, (g + 1) * group)) for g in range(n_kv_heads)]
    columns_of = lambda structure: [s * size + c for s in structure for c in range(size)]
    order, history, taken = [], {0: w.clone()}, set()
    while structures:
        alive = sorted(column for structure in structures for column in columns_of(structure))
        inverse = torch.zeros_like(h)
        inverse[torch.tensor(alive)[:, None], torch.tensor(alive)] = torch.linalg.inv(h[alive][:, alive])
        if all(structure[0] // group in taken for structure in structures):
            taken = set()
        best, best_score = None, float("inf")
        for structure in structures:
            if heads == "query" and structure[0] // group in taken:
                continue
            s = columns_of(structure)
            score = sum(row @ torch.linalg.inv(inverse[s][:, s]) @ row for row in w[:, s])
            if score < best_score:
                best, best_score = structure, score
        s = columns_of(best)
        w = w - w[:, s] @ torch.linalg.inv(inverse[s][:, s]) @ inverse[s]
        w[:, s] = 0
        structures.remove(best)
        order += best
        history[len(order)] = w.clone()
        taken = taken | {best[0] // group}
    return order, history


def full_size(pruned, level: int, gone: int, shape, size: int = 1) -> torch.Tensor:
    "The weight of a level with zeros where columns were removed."
    full = torch.zeros(shape, dtype=torch.float64)
    columns = (kept_structures(pruned.order, gone)[:, None] * size + torch.arange(size)).flatten()
    full[:, columns] = pruned.weights[level].double()
    return full


@pytest.mark.parametrize("n_columns, n_samples", [(24, 400), (24, 5), (130, 400)], ids=["small", "singular", "more than two blocks"])
def test_channels_match_one_by_one_removal(n_columns, n_samples):
    "Channels go in the order, and with the weights, of the plain column-by-column algorithm, also for a singular Hessian."
    weight, _, hessian = problem(n_columns, n_samples)
    order, history = brain_surgeon(weight, hessian)
    removed = [0, 1, n_columns // 3, n_columns // 2, n_columns - 1, n_columns]
    pruned = prune_unit(weight, hessian, removed)
    assert pruned.order.tolist() == order
    for level in range(1, len(removed) - 1):
        torch.testing.assert_close(full_size(pruned, level, removed[level], weight.shape), history[removed[level]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads, removed", [("free", [0, 1, 2, 3, 4, 5, 6]), ("query", [0, 2, 4, 6]), ("group", [0, 3, 6])])
@pytest.mark.parametrize("n_samples", [400, 10], ids=["full rank", "singular"])
def test_heads_match_one_by_one_removal(heads, removed, n_samples):
    "Head blocks go in the order, and with the weights, of the plain algorithm, in all three ways to count heads off."
    weight, _, hessian = problem(24, n_samples)
    order, history = brain_surgeon(weight, hessian, heads=heads, **HEADS)
    pruned = prune_unit(weight, hessian, removed, heads=heads, **HEADS)
    assert pruned.order.tolist() == order
    for level, gone in enumerate(removed[1:-1], 1):
        torch.testing.assert_close(full_size(pruned, level, gone, weight.shape, 4), history[gone], rtol=1e-5, atol=1e-5)


def test_query_mode_takes_one_head_of_every_group_per_round():
    "With heads='query', every level removes the same number of heads from each key/value group."
    weight, _, hessian = problem(24)
    order = prune_unit(weight, hessian, [0, 6], heads="query", **HEADS).order.tolist()
    assert all(sorted(head // 3 for head in order[i : i + 2]) == [0, 1] for i in (0, 2, 4))


def test_levels_are_least_squares_solutions():
    "Each level holds the best weights for its kept columns: those that least squares on the raw inputs finds."
    weight, inputs, hessian = problem(24)
    pruned = prune_unit(weight, hessian, [0, 5, 12, 20], damping=1e-9)
    for level, gone in ((1, 5), (2, 12), (3, 20)):
        kept = kept_structures(pruned.order, gone)
        best = torch.linalg.lstsq(inputs[kept].T, (weight.double() @ inputs).T).solution.T
        torch.testing.assert_close(pruned.weights[level].double(), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options, removed", [({}, [0, 1, 6, 12, 23, 24]), (HEADS, [0, 1, 3, 5, 6])], ids=["channels", "heads"])
def test_reported_error_is_the_measured_one(options, removed):
    "The error of a level is ‖(W−W')X‖²/‖WX‖² on the calibration inputs, 0 for dense and 1 for empty, rising in between."
    weight, inputs, hessian = problem(24)
    pruned = prune_unit(weight, hessian, removed, damping=1e-9, **options)
    dense = weight.double() @ inputs
    for level in range(1, len(removed) - 1):
        outputs = full_size(pruned, level, removed[level], weight.shape, options.get("size", 1)) @ inputs
        assert pruned.errors[level] == pytest.approx(((dense - outputs).norm() / dense.norm()).item() ** 2, rel=1e-4)
    assert pruned.errors[0] == 0 and pruned.errors[-1] == 1 and pruned.errors == sorted(pruned.errors)


def test_dead_inputs_go_first_and_cost_nothing():
    "Columns whose input is always zero are removed first, without error and without changing the others."
    weight, inputs, _ = problem(24)
    inputs[[3, 17]] = 0
    pruned = prune_unit(weight, (2 * inputs @ inputs.T / 400).float(), [0, 2, 24])
    kept = kept_structures(pruned.order, 2)
    assert set(pruned.order[:2].tolist()) == {3, 17}
    assert pruned.errors[1] < 1e-12
    torch.testing.assert_close(pruned.weights[1], weight[:, kept], rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_are_pruned_in_full_precision():
    "A bfloat16 layer gets the float32 result, rounded once at the end."
    weight, _, hessian = problem(24)
    half = prune_unit(weight.bfloat16(), hessian, [0, 6, 12])
    full = prune_unit(weight.bfloat16().float(), hessian, [0, 6, 12])
    assert torch.equal(half.order, full.order)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(half.weights[1:], full.weights[1:]))


def test_overflown_hessian_is_an_error():
    "Non-finite calibration statistics are reported, not turned into weights."
    weight, _, hessian = problem(24)
    hessian[2, 2] = torch.inf
    with pytest.raises(ValueError, match="non-finite"):
        prune_unit(weight, hessian, [0, 12])


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def model():
    return small_model("llama-gqa")


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    "The directory of an uninterrupted build; not to be changed."
    directory = tmp_path_factory.mktemp("built") / "database"
    build_database(model, random_blocks(), directory, progress=False)
    return directory


@pytest.fixture
def copied(built, tmp_path):
    "A copy of it that may be changed."
    for name, content in contents(built).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_database_holds_what_prune_unit_computes(model, built):
    "Order, weights and errors on disk are those of each unit's own Hessian."
    database = LevelDatabase(built, model, verify=True)
    hessians = pruning.collect_hessians(model, database.units, random_blocks(), progress=False)
    for index, (unit, hessian) in enumerate(zip(database.units, hessians)):
        removed = database.space.removed[index]
        pruned = prune_unit(model.get_submodule(unit.output).weight, hessian, removed, unit.structure_size, unit.n_kv_heads)
        assert torch.equal(database.orders[index], pruned.order) and database.errors[index] == pruned.errors
        assert all(torch.equal(database.weight(index, level), pruned.weights[level]) for level in range(1, len(removed) - 1))


@pytest.mark.parametrize("rows", [256, 32], ids=["one block", "blocks that do not divide the width"])
def test_hessian_is_that_of_the_layer_inputs(model, monkeypatch, rows):
    "H = 2XXᵀ/n over all calibration tokens, whatever the batch size, in however many blocks of rows."
    monkeypatch.setattr(pruning, "_ROWS", rows)
    unit = pruning.prunable_units(model)[-1]
    seen = []
    handle = model.get_submodule(unit.output).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(random_blocks())
    handle.remove()
    x = torch.cat(seen).T
    for batch_size in (3, 16):
        (hessian,) = pruning.collect_hessians(model, [unit], random_blocks(), batch_size, progress=False)
        torch.testing.assert_close(hessian.double(), 2 * x @ x.T / x.shape[1], rtol=1e-4, atol=1e-5)
        assert torch.equal(hessian, hessian.T)


def test_levels_are_nested(database):
    "What a level removes, every higher level removes too."
    for unit in range(len(database.units)):
        kept = [set(database.kept(unit, level).tolist()) for level in range(database.space.n_levels(unit))]
        assert all(more > less for more, less in zip(kept, kept[1:])) and not kept[-1]


def test_build_leaves_the_model_alone(model, tmp_path):
    "Building changes no weight and leaves no hook behind."
    before = model_fingerprint(model)
    build_database(model, random_blocks(4), tmp_path / "database", progress=False)
    assert model_fingerprint(model) == before and not any(module._forward_pre_hooks for module in model.modules())


class Killed(Exception):
    pass


@pytest.mark.parametrize("stored", [True, False], ids=["file written", "file missing"])
@pytest.mark.parametrize("n_units", [0, 2, 5])
def test_interrupted_build_continues_to_the_same_bytes(model, built, tmp_path, monkeypatch, n_units, stored):
    "A build killed while storing unit k, before or after its file is in place, continues to the bytes of an uninterrupted one."
    store, calls = pruning._store_unit, []

    def killing(*args):
        if len(calls) == n_units:
            if stored:
                store(*args)
            raise Killed
        calls.append(args)
        return store(*args)

    monkeypatch.setattr(pruning, "_store_unit", killing)
    with pytest.raises(Killed):
        build_database(model, random_blocks(), tmp_path / "database", progress=False)
    with pytest.raises(ValueError, match=f"{6 - n_units} of 6 units are missing"):
        LevelDatabase(tmp_path / "database", model)
    recomputed = []
    monkeypatch.setattr(pruning, "_store_unit", lambda *args: recomputed.append(args) or store(*args))
    build_database(model, random_blocks(), tmp_path / "database", progress=False)
    assert len(recomputed) == 6 - n_units
    assert contents(tmp_path / "database") == contents(built)


def test_build_killed_at_its_first_write_continues(model, built, tmp_path, monkeypatch):
    "A build killed before even its manifest was renamed into place can be started again."
    with monkeypatch.context() as patch:
        patch.setattr(pruning.os, "replace", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build_database(model, random_blocks(), tmp_path / "database", progress=False)
    build_database(model, random_blocks(), tmp_path / "database", progress=False)
    assert contents(tmp_path / "database").keys() >= contents(built).keys()


LARGEST, LAYER = 4 * 80**2, 4 * (48**2 + 80**2)  # bytes of the largest Hessian, and of one layer's, of the small model


@pytest.mark.parametrize("limit, n_groups", [(LARGEST, 6), (LAYER, 3), (2 * LAYER, 2), (None, 1)])
def test_grouped_hessians_give_the_same_database(model, built, tmp_path, monkeypatch, limit, n_groups):
    "A limit on the memory of Hessians is kept, and changes the number of passes but not a byte of the result."
    collect, held = pruning.collect_hessians, []
    monkeypatch.setattr(pruning, "collect_hessians", lambda *args: held.append(collect(*args)) or list(held[-1]))
    build_database(model, random_blocks(), tmp_path / "database", memory_bytes=limit, progress=False)
    assert len(held) == n_groups
    assert all(limit is None or sum(hessian.nbytes for hessian in group) <= limit for group in held)
    assert contents(tmp_path / "database") == contents(built)


def test_a_group_is_let_go_before_the_next(model, tmp_path, monkeypatch):
    "When the next Hessians are collected, those of the group before are no longer in memory."
    collect, held, left = pruning.collect_hessians, [], []

    def watched(*args):
        left.append(sum(hessian() is not None for hessian in held))
        hessians = collect(*args)
        held.extend(map(weakref.ref, hessians))
        return hessians

    monkeypatch.setattr(pruning, "collect_hessians", watched)
    build_database(model, random_blocks(), tmp_path / "database", memory_bytes=LARGEST, progress=False)
    assert left == [0] * 6


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "qwen3", "mistral"])
def test_layers_calibrated_from_stored_states_run_once(family, tmp_path, monkeypatch):
    "With hidden states stored between groups of layers, every layer runs once per batch, and the database is the same to the last byte."
    model, blocks = small_model(family), random_blocks(4)
    build_database(model, blocks, tmp_path / "whole", batch_size=2, progress=False)
    _, layers = decoder_layers(model)
    calls = []
    for layer in layers:
        layer.self_attn.register_forward_hook(lambda module, *_: calls.append(module.layer_idx))
    by_layer = lambda units, *_: CalibrationPlan(tuple(tuple(unit for unit in units if unit.layer == i) for i in range(len(layers))), True, 0)
    monkeypatch.setattr(pruning, "plan_calibration", by_layer)
    build_database(model, blocks, tmp_path / "split", batch_size=2, progress=False)
    assert calls == [0, 0, 1, 1, 2, 2]
    assert contents(tmp_path / "split") == contents(tmp_path / "whole")


def test_plan_of_calibration():
    "No limit: one pass. Room for the hidden states: groups of whole layers from stored states. Else: one pass a group. Too little for one Hessian: an error with the number needed."
    units = [Unit(layer, kind, "", "", size, 1) for layer in range(4) for kind, size in (("attn", 10), ("mlp", 20))]  # 400 and 1600 bytes
    assert [len(group) for group in plan_calibration(units, 5000).groups] == [8]
    stored = plan_calibration(units, 1000, 5000)
    assert stored.offload and [len(group) for group in stored.groups] == [4, 4] and stored.n_bytes == 5000
    repeated = plan_calibration(units, 10_000, 5000)
    assert not repeated.offload and [len(group) for group in repeated.groups] == [5, 3] and repeated.n_bytes == 4400
    elsewhere = plan_calibration(units, 10_000, 5000, offload_bytes=10_000)
    assert elsewhere.offload and [len(group) for group in elsewhere.groups] == [4, 4] and elsewhere.n_bytes == 4000
    assert plan_calibration(units, 10_001, 5000, offload_bytes=10_000) == repeated
    with pytest.raises(ValueError, match="1,600"):
        plan_calibration(units, 0, 1599)


@pytest.mark.parametrize("change, named", [
    (dict(heads="group"), "heads"), (dict(n_levels=5), "removed"), (dict(damping=0.1), "damping"), (dict(grid={"mlp": [0, 40, 80]}), "removed"),
    (dict(blocks=random_blocks(seed=1)), "data"), (dict(model=small_model("llama-gqa", seed=1)), "model")])
def test_build_refuses_a_directory_built_differently(model, copied, change, named):
    "Continuing with another model, text or setting is an error that names what differs, and changes nothing."
    before = contents(copied)
    with pytest.raises(ValueError, match=rf"built differently \(.*\b{named}\b"):
        build_database(**dict(model=model, blocks=random_blocks(), directory=copied, progress=False) | change)
    assert contents(copied) == before


@pytest.mark.parametrize("other", [small_model("llama-gqa", seed=1), small_model("llama-gqa").bfloat16()], ids=["weights", "dtype"])
def test_opening_with_another_model_names_both(built, model, other):
    "A database of another model is refused with both fingerprints."
    with pytest.raises(ValueError) as error:
        LevelDatabase(built, other)
    assert model_fingerprint(model) in str(error.value) and model_fingerprint(other) in str(error.value)


def test_damaged_file_is_found_and_rebuilt(model, built, copied):
    "One flipped bit is found by verify=True; deleting the named file and building again repairs it."
    path = copied / "mlp.01.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"mlp\.01\.safetensors is damaged"):
        LevelDatabase(copied, model, verify=True)
    path.unlink()
    build_database(model, random_blocks(), copied, progress=False)
    assert contents(copied) == contents(built)


def test_foreign_directories_are_left_alone(model, tmp_path):
    "A directory with other files in it is neither written to nor opened."
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        build_database(model, random_blocks(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="no level database"):
        LevelDatabase(tmp_path, model)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_other_format_version_is_refused(model, copied):
    "A database of a future version is refused with both versions."
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match=f"format 99, this version reads {pruning.FORMAT_VERSION}"):
        LevelDatabase(copied, model)


def test_grid_is_checked_before_any_work(model, tmp_path):
    "A grid that no unit can have is an error before anything is written."
    with pytest.raises(ValueError, match="does not fit mlp.00"):
        build_database(model, random_blocks(), tmp_path / "database", grid={"mlp": [0, 90]}, progress=False)
    assert not (tmp_path / "database").exists()


def test_files_are_json_and_compact_safetensors(model, built):
    "The directory holds a JSON manifest and one readable safetensors file per unit, with only the kept columns."
    assert {path.suffix for path in built.iterdir()} == {".json", ".safetensors"}
    database = LevelDatabase(built, model)
    for unit, removed in zip(database.units, database.space.removed):
        with safe_open(built / f"{unit.name}.safetensors", framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        columns = {f"weight.{level}": (unit.n_structures - gone) * unit.structure_size for level, gone in enumerate(removed)}
        assert shapes == {"order": [unit.n_structures]} | {f"weight.{level}": [48, columns[f"weight.{level}"]] for level in range(1, len(removed) - 1)}


def test_full_disk_is_an_error_before_any_work(tiny, pools, tmp_path, monkeypatch):
    """When the disk cannot hold the missing units, the build stops before calibrating; a finished build needs no room."""
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 0))
    monkeypatch.setattr("evoprune_nb.pruning.collect_hessians", lambda *_, **__: pytest.fail("calibrated"))
    with pytest.raises(OSError, match="free"):
        build_database(tiny, pools["calibration"].blocks.long(), tmp_path / "database", progress=False)


def test_a_wide_layer_is_pruned_as_exactly():
    "Wide enough for factors and inverse by halves: every level is the least-squares solution on its channels, and its error the measured one."
    n = 1100
    weight, _, hessian = problem(n, 2 * n, n_rows=3)
    removed = [0, 100, 500, n - 1]
    pruned = prune_unit(weight, hessian, removed)
    w, h = weight.double(), hessian.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(n)
    for level, gone in enumerate(removed[1:], 1):
        kept = kept_structures(pruned.order, gone)
        full = torch.zeros_like(w)
        full[:, kept] = torch.linalg.solve(h[kept][:, kept], (w @ h)[:, kept].T).T
        torch.testing.assert_close(full_size(pruned, level, gone, w.shape), full, rtol=1e-5, atol=1e-6)
        assert pruned.errors[level] == pytest.approx((((w - full) @ h * (w - full)).sum() / (w @ h * w).sum()).item(), rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 129])
def test_inverse_by_halves(n):
    "Whatever the size, and halves that are unequal: inverse and factor as exact as torch's; an indefinite matrix is an error."
    torch.manual_seed(n)
    inputs = torch.randn(2 * n, n, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    matrix = inputs.T @ inputs / n + 1e-4 * torch.eye(n, dtype=torch.float64)
    found = pruning._inverse(matrix, small=4)
    torch.testing.assert_close(found, torch.linalg.inv(matrix), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pruning._cholesky(matrix, small=4), torch.linalg.cholesky(matrix), rtol=1e-9, atol=1e-9)
    with pytest.raises(torch.linalg.LinAlgError):
        pruning._inverse(matrix - 2 * matrix.diagonal().max() * torch.eye(n, dtype=torch.float64), small=4)
