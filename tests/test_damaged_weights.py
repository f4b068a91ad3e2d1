"""Checkpoints whose weights are missing or not finite are refused by name, whoever wrote them."""

import pytest
import torch
from helpers import small_model, word_tokenizer
from safetensors.torch import load_file, save_file

from evoprune_nb.candidates import materialize
from evoprune_nb.models import load_model, model_fingerprint, non_finite
from evoprune_nb.ship.export import export_hf, load_exported


@pytest.fixture(params=["stock", "tied", "pruned"])
def checkpoint(request, small, tmp_path):
    "A directory of each kind, and the function that loads it."
    if request.param == "pruned":
        model, database = small
        candidate = materialize(model, database, database.space.genome([1] * len(database.units)))
        return export_hf(candidate, word_tokenizer("none"), tmp_path / "model"), load_exported
    model = small_model("llama-tied" if request.param == "tied" else "llama-gqa")
    model.save_pretrained(tmp_path / "model")
    word_tokenizer("none").save_pretrained(tmp_path / "model")
    return tmp_path / "model", load_model


def change(directory, edit) -> None:
    "Rewrite the weights of a checkpoint."
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NAMES = ("model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight", "model.norm.weight")


def test_whole_checkpoints_load(checkpoint):
    "A head that is tied to the embedding is not missing."
    directory, load = checkpoint
    first, second = load(str(directory))[0], load(str(directory))[0]
    assert model_fingerprint(first) == model_fingerprint(second) and non_finite(first) == []


@pytest.mark.parametrize("name", NAMES)
def test_missing_tensors_are_refused_by_name(checkpoint, name):
    "A missing tensor would be random numbers."
    directory, load = checkpoint
    change(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"lacks tensors.*{name}"):
        load(str(directory))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused_by_name(checkpoint, name, value, dtype):
    "One NaN or infinite value anywhere is enough, in any dtype."
    directory, load = checkpoint

    def edit(tensors):
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})
        tensors[name].view(-1)[-1] = value

    change(directory, edit)
    with pytest.raises(ValueError, match=f"NaN or infinite values in {name}"):
        load(str(directory))


def test_large_values_are_finite(checkpoint):
    "The largest number of a dtype is a number."
    directory, load = checkpoint
    change(directory, lambda tensors: tensors[NAMES[0]].fill_(torch.finfo(torch.float32).max))
    load(str(directory))


def test_many_names_are_shortened(tmp_path):
    "The first few are enough to see what happened."
    model = small_model("llama-gqa")
    model.save_pretrained(tmp_path)
    word_tokenizer("none").save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: [tensors.pop(name) for name in [*tensors] if "mlp" in name])
    with pytest.raises(ValueError, match="model.layers.0.mlp.down_proj.weight, .* and 4 more"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("n_bytes", [0, 4, 1000])
def test_cut_files_are_refused_by_name(checkpoint, n_bytes):
    "A file that ends early is an error with the directory's name."
    directory, load = checkpoint
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ValueError, match=f"{directory.name}.* (are damaged|cannot be read)"):
        load(str(directory))


def test_absent_weights_are_refused(checkpoint):
    "A directory without weights is an error with its name."
    directory, load = checkpoint
    (directory / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match=str(directory)):
        load(str(directory))


@pytest.mark.parametrize("name", NAMES[:2])
def test_tensors_of_another_shape_are_refused_by_name(checkpoint, name):
    "A configuration and weights that do not belong together."
    directory, load = checkpoint
    change(directory, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(ValueError, match=f"has tensors of other shapes than its config.json says: {name}"):
        load(str(directory))
