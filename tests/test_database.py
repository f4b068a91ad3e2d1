"""A level database holds what was computed, survives interruption, and is never used damaged."""
import json
import multiprocessing
import shutil
import weakref

import pytest
import torch
from safetensors import safe_open
from helpers import random_blocks, short_config, small_model, small_pools

from evoprune_nb import database as databases
from evoprune_nb.candidates import materialize
from evoprune_nb.database import CalibrationPlan, LevelDatabase, build_database, plan_calibration
from evoprune_nb.machine import files
from evoprune_nb.machine.lock import DirectoryBusy
from evoprune_nb.models import Unit, decoder_layers, model_fingerprint
from evoprune_nb.pruning import collect_hessians, prune_unit
from evoprune_nb.search import Search
from evoprune_nb.source import Source
from evoprune_nb.ship.export import load_winner


def contents(directory) -> dict[str, bytes]:
    "Names and bytes of what lies in a directory, without the lock."
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "writer.lock"}


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
    hessians = collect_hessians(model, database.units, random_blocks(), progress=False)
    for index, (unit, hessian) in enumerate(zip(database.units, hessians)):
        removed = database.space.removed[index]
        pruned = prune_unit(model.get_submodule(unit.output).weight, hessian, removed, unit.structure_size, unit.n_kv_heads)
        assert torch.equal(database.orders[index], pruned.order) and database.errors[index] == pruned.errors
        assert all(torch.equal(database.weight(index, level), pruned.weights[level]) for level in range(1, len(removed) - 1))


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
    store, calls = databases.store_unit, []

    def killing(*args):
        if len(calls) == n_units:
            if stored:
                store(*args)
            raise Killed
        calls.append(args)
        return store(*args)

    monkeypatch.setattr(databases, "store_unit", killing)
    with pytest.raises(Killed):
        build_database(model, random_blocks(), tmp_path / "database", progress=False)
    with pytest.raises(ValueError, match=f"{6 - n_units} of 6 units are missing"):
        LevelDatabase(tmp_path / "database", model)
    recomputed = []
    monkeypatch.setattr(databases, "store_unit", lambda *args: recomputed.append(args) or store(*args))
    build_database(model, random_blocks(), tmp_path / "database", progress=False)
    assert len(recomputed) == 6 - n_units
    assert contents(tmp_path / "database") == contents(built)


def test_build_killed_at_its_first_write_continues(model, built, tmp_path, monkeypatch):
    "A build killed before even its manifest was renamed into place can be started again."
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build_database(model, random_blocks(), tmp_path / "database", progress=False)
    build_database(model, random_blocks(), tmp_path / "database", progress=False)
    assert contents(tmp_path / "database").keys() >= contents(built).keys()


LARGEST, LAYER = 4 * 80**2, 4 * (48**2 + 80**2)  # bytes of the largest Hessian, and of one layer's, of the small model


@pytest.mark.parametrize("limit, n_groups", [(LARGEST, 6), (LAYER, 3), (2 * LAYER, 2), (None, 1)])
def test_grouped_hessians_give_the_same_database(model, built, tmp_path, monkeypatch, limit, n_groups):
    "A limit on the memory of Hessians is kept, and changes the number of passes but not a byte of the result."
    collect, held = databases.collect_hessians, []
    monkeypatch.setattr(databases, "collect_hessians", lambda *args: held.append(collect(*args)) or list(held[-1]))
    build_database(model, random_blocks(), tmp_path / "database", memory_bytes=limit, progress=False)
    assert len(held) == n_groups
    assert all(limit is None or sum(hessian.nbytes for hessian in group) <= limit for group in held)
    assert contents(tmp_path / "database") == contents(built)


def test_a_group_is_let_go_before_the_next(model, tmp_path, monkeypatch):
    "When the next Hessians are collected, those of the group before are no longer in memory."
    collect, held, left = databases.collect_hessians, [], []

    def watched(*args):
        left.append(sum(hessian() is not None for hessian in held))
        hessians = collect(*args)
        held.extend(map(weakref.ref, hessians))
        return hessians

    monkeypatch.setattr(databases, "collect_hessians", watched)
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
    monkeypatch.setattr(databases, "plan_calibration", by_layer)
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
    with pytest.raises(ValueError, match=f"format 99, this version reads {databases.FORMAT_VERSION}"):
        LevelDatabase(copied, model)


def test_grid_is_checked_before_any_work(model, tmp_path):
    "A grid that no unit can have is an error before anything is written."
    with pytest.raises(ValueError, match="does not fit mlp.00"):
        build_database(model, random_blocks(), tmp_path / "database", grid={"mlp": [0, 90]}, progress=False)
    assert not (tmp_path / "database").exists()


def test_files_are_json_and_compact_safetensors(model, built):
    "The directory holds a JSON manifest and one readable safetensors file per unit, with only the kept columns."
    assert {name.rpartition(".")[2] for name in contents(built)} == {"json", "safetensors"}
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
    monkeypatch.setattr("evoprune_nb.database.collect_hessians", lambda *_, **__: pytest.fail("calibrated"))
    with pytest.raises(OSError, match="free"):
        build_database(tiny, pools["calibration"].blocks.long(), tmp_path / "database", progress=False)




def flip(path, position: int = -1) -> None:
    "Flip one bit of a file."
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def exchange(one, other) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def flip_a_bit(directory):
    flip(directory / "mlp.01.safetensors")


def exchange_two_units(directory):
    exchange(directory / "mlp.01.safetensors", directory / "mlp.02.safetensors")


def remove_a_file(directory):
    (directory / "mlp.01.safetensors").unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, exchange_two_units, remove_a_file])
def test_damage_is_never_used(model, copied, tmp_path_factory, damage):
    "A flipped bit, exchanged units or a missing file: whoever reads levels is refused, with the name of the file."
    sound = LevelDatabase(copied, model)
    genome = sound.space.genome([1, 2, 3, 3, 5, 1])
    materialize(model, sound, genome)
    damage(copied)
    opened, run = LevelDatabase(copied, model), tmp_path_factory.mktemp("search") / "run"
    for use in (
        lambda: materialize(model, opened, genome), lambda: opened.weight(0, 1), lambda: opened.kept(3, 1), opened.verify,
        lambda: Search(run, model, opened, small_pools(), short_config()).run(progress=False)):
        with pytest.raises(ValueError, match=r"mlp\.01\.safetensors is (damaged|missing).*build_database again"):
            use()
    build_database(model, random_blocks(), copied, progress=False)
    Search(run, model, LevelDatabase(copied, model), small_pools(), short_config()).run(progress=False)


def test_export_of_a_damaged_database_is_refused(tiny, database, tmp_path):
    "`load_winner`, and so every export, refuses a database whose units were exchanged."
    mine = LevelDatabase(shutil.copytree(database.directory, tmp_path / "database"), tiny)
    Search(tmp_path / "run", tiny, mine, small_pools(), short_config(heldout_tokens=0), source=Source(model_name="tiny")).run(progress=False)
    load_winner(tmp_path / "run", database=tmp_path / "database")
    exchange(tmp_path / "database" / "attn.01.safetensors", tmp_path / "database" / "attn.05.safetensors")
    with pytest.raises(ValueError, match=r"attn\.01\.safetensors is damaged"):
        load_winner(tmp_path / "run", database=tmp_path / "database")


def test_files_are_hashed_once(model, copied, monkeypatch):
    "A file is hashed at first use, in however many instances; again when it changed, or when verification is asked for."
    hashed, real = [], databases.sha256_file
    monkeypatch.setattr(databases, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    first, second = LevelDatabase(copied, model), LevelDatabase(copied, model)
    assert hashed == []
    for _ in range(2):
        first.weight(0, 1), second.kept(1, 2)
    assert sorted(hashed) == sorted(path.name for path in copied.glob("*.safetensors"))
    LevelDatabase(copied, model, verify=True)
    assert len(hashed) == 12
    (copied / "mlp.00.safetensors").touch()
    LevelDatabase(copied, model).weight(0, 1)
    assert hashed[12:] == ["mlp.00.safetensors"]


def test_damaged_manifest_is_an_error_with_its_name(model, built, copied):
    "Whichever bit of the manifest flips: an error that names the file, or what differs; never other levels, never a raw error."
    path, sound = copied / "manifest.json", (built / "manifest.json").read_bytes()
    unnoticed = []
    for position in range(0, len(sound), 61):
        for bit in (0, 6):
            content = bytearray(sound)
            content[position] ^= 1 << bit
            path.write_bytes(content)
            try:
                manifest = LevelDatabase(copied, model, verify=True).manifest
                unnoticed.append({key: value for key, value in manifest.items() if key != "checksum"})
            except ValueError as error:
                assert "manifest.json" in str(error)
    honest = {key: value for key, value in json.loads(sound).items() if key != "checksum"}
    assert all({key: row[key] for key in honest} == honest for row in unnoticed)  # blanks, or the name of the checksum


def test_cut_off_manifest(model, copied):
    "A manifest that ends early, or holds something else, is named by reading and by building."
    path = copied / "manifest.json"
    for content in (path.read_bytes()[:100], b"", b"[]", b'{"format": 1}', b"\xff\xfe"):
        path.write_bytes(content)
        for use in (lambda: LevelDatabase(copied, model), lambda: build_database(model, random_blocks(), copied, progress=False)):
            with pytest.raises(ValueError, match="manifest.json is damaged"):
                use()


def test_databases_of_version_0_1_open(model, built, copied):
    "Without a checksum, as version 0.1 wrote it, a manifest is read and continued."
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    path.write_text(json.dumps(manifest, indent=1))
    assert LevelDatabase(copied, model, verify=True).fingerprint == LevelDatabase(built, model).fingerprint
    (copied / "mlp.00.safetensors").unlink()
    build_database(model, random_blocks(), copied, progress=False)
    assert contents(copied) == contents(built)


WRONG = [
    (dict(damping=-1), "damping must be .*got -1"), (dict(damping=float("nan")), "damping must be .*got nan"), (dict(damping=float("inf")), "damping must be .*got inf"),
    (dict(damping="0.01"), "damping must be .*got '0.01'"), (dict(batch_size=0), "batch_size must be .*got 0"), (dict(blocks=random_blocks().float()), "token ids"),
    (dict(blocks=random_blocks()[0]), r"token ids.*\(32,\)"), (dict(blocks=random_blocks().tolist()), "got list"),
    (dict(blocks=random_blocks()[:0]), "no tokens"), (dict(blocks=random_blocks() + 100), "from 101 to 199, but the model's go from 0 to 99"),
    (dict(blocks=-random_blocks()), "token ids from -99"), (dict(memory_bytes=100), "memory_bytes=100 is too little"), (dict(n_levels=1), "n_levels must be a whole number from 2 to 1,000; got 1"),
    (dict(n_levels=36), "at most 36"), (dict(grid={"mpl": [0, 80]}), "mpl"), (dict(heads="some"), "heads 'some' is unknown")]


@pytest.mark.parametrize("options, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_do_not_claim_the_directory(model, tmp_path, options, message):
    "Whatever argument is wrong, nothing is written, and the corrected call succeeds."
    good = dict(model=model, blocks=random_blocks(2), directory=tmp_path / "database", n_levels=2, progress=False)
    with pytest.raises(ValueError, match=message):
        build_database(**good | options)
    assert not (tmp_path / "database").exists()


def test_a_build_that_stored_nothing_claims_nothing(model, tmp_path):
    "When calibration fails, the directory can be used with another model or other settings; after a unit is stored, it cannot."
    broken = small_model("llama-gqa")
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or infinite"):
        build_database(broken, random_blocks(2), tmp_path, progress=False)
    build_database(model, random_blocks(2), tmp_path, damping=0.02, progress=False)
    with pytest.raises(ValueError, match=r"built differently \(damping\)"):
        build_database(model, random_blocks(2), tmp_path, progress=False)


def build_in_process(directory, seed: int, start, results) -> None:
    "One of several builders: reports what came of it."
    torch.set_num_threads(1)
    model = small_model("llama-gqa")
    start.wait()
    try:
        results.put(("built", build_database(model, random_blocks(seed=seed), directory, progress=False).manifest["data"]))
    except (DirectoryBusy, ValueError) as error:
        results.put((type(error).__name__, str(error)))


@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 1, 2)], ids=["same text", "other text"])
def test_several_builders_make_one_database(model, built, tmp_path, seeds):
    "Processes that build in one directory at the same time: one builds, the others are told so; other text is never mixed in."
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(len(seeds)), context.Queue()
    processes = [context.Process(target=build_in_process, args=(tmp_path / "database", seed, start, results)) for seed in seeds]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    texts = {what for kind, what in found if kind == "built"}
    assert len(texts) == 1
    for kind, what in found:
        assert kind == "built" or kind == "DirectoryBusy" and "is being written by" in what or "built differently (data)" in what
    made = LevelDatabase(tmp_path / "database", model, verify=True)
    assert made.manifest["data"] in texts and not list((tmp_path / "database").glob("*.tmp"))
    if len(set(seeds)) == 1:
        assert contents(tmp_path / "database") == contents(built)


def test_a_database_being_built_is_not_opened(model, tmp_path, monkeypatch):
    "While a build runs, opening says who is building, and a second build is refused; afterwards both work."
    real, seen = databases.store_unit, []

    def watched(*args):
        row = real(*args)
        if not seen:
            for use in (lambda: LevelDatabase(tmp_path, model), lambda: build_database(model, random_blocks(2), tmp_path, progress=False)):
                with pytest.raises(DirectoryBusy, match="is being written by this process"):
                    use()
                seen.append(use)
        return row

    monkeypatch.setattr(databases, "store_unit", watched)
    build_database(model, random_blocks(2), tmp_path, progress=False)
    for use in seen:
        assert use().n_bytes > 0


def test_a_finished_database_needs_no_lock(model, copied, monkeypatch):
    "A finished database opens, and is built again in no time, where nothing can be written."
    monkeypatch.setattr(databases, "DirectoryLock", lambda *_: pytest.fail("locked"))
    assert build_database(model, random_blocks(), copied, progress=False).fingerprint == LevelDatabase(copied, model).fingerprint
