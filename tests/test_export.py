"""An exported checkpoint is the candidate, for software that has never heard of this package."""
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import random_blocks, short_config, small_model, small_pools
from safetensors.torch import save_file

from evoprune_nb import export
from evoprune_nb.candidates import materialize
from evoprune_nb.export import Card, export_hf, is_run, load_winner
from evoprune_nb.models import load_model, model_fingerprint
from evoprune_nb.pruning import build_database
from evoprune_nb.search import Search
from evoprune_nb.training import Training, train

TOP = -1  # the unit's last level, at which all of it is gone
GENOMES = {  # name → levels of the three attention units and the three MLPs
    "dense": [0, 0, 0, 0, 0, 0],
    "thin": [1, 2, 1, 3, 5, 9],
    "first attention gone": [TOP, 2, 0, 0, 2, 4],
    "a layer gone": [1, TOP, 1, 5, TOP, 5],
    "whole units only": [TOP, 0, 0, 0, TOP, 0],
    "all attention gone": [TOP, TOP, TOP, 1, 2, 3],
}
FAMILIES = ("llama-mha", "llama-gqa", "llama-biases", "llama-tied", "llama-rope", "qwen2", "qwen2-tied", "qwen2-mixed", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "glm4", "exaone4")
CASES = [(family, name, "float32") for family in FAMILIES for name in ("thin", "first attention gone", "a layer gone")]
CASES += [("llama-gqa", name, "float32") for name in ("dense", "whole units only", "all attention gone", "trained")]
CASES += [(family, name, "bfloat16") for family in ("llama-gqa", "qwen2-tied") for name in ("thin", "trained")]

RELOAD = """
import json, pathlib, sys
sys.modules["evoprune_nb"] = None  # importing it is an error from here on
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
logging.set_verbosity_error()

def behaviour(model, blocks):
    with torch.no_grad():
        logits = model(blocks).logits
    tokens = model.generate(blocks[:2, :10], attention_mask=torch.ones_like(blocks[:2, :10]), max_new_tokens=12, do_sample=False, use_cache=True, pad_token_id=0)
    return {"logits": logits, "tokens": tokens}

def equal(model, expected):
    found = behaviour(model, expected["blocks"])
    return {key: found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]) for key in found}

root, report = pathlib.Path(sys.argv[1]), {}
for case in sorted(root.iterdir()):
    try:
        expected = load_file(case / "expected.safetensors")
        model = AutoModelForCausalLM.from_pretrained(case / "checkpoint", trust_remote_code=True)
        row = {"reloaded": equal(model, expected), "n_params": sum(p.numel() for p in model.parameters()), "dtype": str(model.dtype), "training": model.training}
        row["greeting"] = AutoTokenizer.from_pretrained(case / "checkpoint")("Hello, world")["input_ids"]
        model.save_pretrained(case / "again")
        row["resaved"] = equal(AutoModelForCausalLM.from_pretrained(case / "again", trust_remote_code=True), expected)
        model.train()(expected["blocks"], labels=expected["blocks"]).loss.backward()
        row["trainable"] = all(p.grad is not None for p in model.parameters())
        try:
            row["untrusted"] = type(AutoModelForCausalLM.from_pretrained(case / "checkpoint")).__name__
        except ValueError as error:
            row["untrusted"] = "refused" if "trust_remote_code" in str(error) else str(error)
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"}
    report[case.name] = row
assert not any(name.startswith("evoprune_nb.") for name in sys.modules)
pathlib.Path(sys.argv[2]).write_text(json.dumps(report))
"""


def behaviour(model) -> dict[str, torch.Tensor]:
    "Logits, and greedy continuations with a cache, on fixed text."
    blocks = random_blocks(3, 24, seed=5)
    with torch.no_grad():
        logits = model(blocks).logits
    prompt = blocks[:2, :10]
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, use_cache=True, pad_token_id=0)
    return {"blocks": blocks, "logits": logits, "tokens": tokens}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A function: family, genome name, dtype → candidate, its units and its database; databases are made once."
    known = {}

    def make(family, name, dtype="float32"):
        if (family, dtype) not in known:
            model = small_model(family)
            for parameter in model.parameters():  # as from_pretrained does: not the rotary frequencies, which are buffers
                parameter.data = parameter.data.to(getattr(torch, dtype))
            known[family, dtype] = model, build_database(model, random_blocks(), tmp_path_factory.mktemp("database"), progress=False)
        model, database = known[family, dtype]
        levels = [range(database.space.n_levels(unit))[level] for unit, level in enumerate(GENOMES["thin" if name == "trained" else name])]
        candidate = materialize(model, database, database.space.genome(levels))
        if name == "trained":
            train(candidate, random_blocks(8, 16, seed=9), Training(lr=1e-2))
        return candidate, database

    return make


@pytest.fixture(scope="module")
def reports(made, tokenizer, tmp_path_factory):
    "All cases exported here, then loaded by one other process that cannot import evoprune_nb; what it found, by case."
    root = tmp_path_factory.mktemp("exports")
    for family, name, dtype in CASES:
        candidate, database = made(family, name, dtype)
        case = root / f"{family}, {name}, {dtype}"
        export_hf(candidate, tokenizer, case / "checkpoint")
        save_file(behaviour(candidate), case / "expected.safetensors")
    home = tmp_path_factory.mktemp("elsewhere")
    environment = os.environ | {"HF_MODULES_CACHE": str(home / "modules"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", RELOAD, str(root), str(home / "report.json")], cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((home / "report.json").read_text())


@pytest.mark.parametrize("family, name, dtype", CASES)
def test_reloaded_elsewhere_it_is_the_same_model(reports, made, tokenizer, family, name, dtype):
    """Without this package, plain transformers loads it to bitwise the same logits and the same greedy text with a cache, in the same dtype and size,
    can train it, and can save and load it again; without trust_remote_code it refuses instead of building something else."""
    found, candidate = reports[f"{family}, {name}, {dtype}"], made(family, name, dtype)[0]
    assert "error" not in found, found["error"]
    assert found["reloaded"] == {"logits": True, "tokens": True}
    assert found["resaved"] == {"logits": True, "tokens": True}
    assert found["n_params"] == sum(p.numel() for p in candidate.parameters()) and found["dtype"] == f"torch.{dtype}" and not found["training"]
    assert found["greeting"] == tokenizer("Hello, world")["input_ids"]
    assert found["trainable"] and found["untrusted"] == "refused"


def test_export_changes_neither_candidate_nor_dense_model(made, tokenizer, tmp_path):
    "Exporting is reading: weights, configuration and behaviour stay as they were, and exporting twice gives the same files."
    candidate, database = made("qwen2-tied", "a layer gone")
    before, config, expected = model_fingerprint(candidate), candidate.config.to_dict(), behaviour(candidate)
    first, second = (export_hf(candidate, tokenizer, tmp_path / name / "checkpoint") for name in ("first", "second"))
    assert model_fingerprint(candidate) == before and candidate.config.to_dict() == config
    assert all(torch.equal(a, expected[key]) for key, a in behaviour(candidate).items())
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_what_is_written(made, tokenizer, tmp_path):
    "Weights as safetensors, nothing pickled, readable by others, and a card that says what was kept; relative paths and new parents are fine."
    candidate, database = made("llama-gqa", "a layer gone")
    directory = export_hf(candidate, tokenizer, tmp_path / "new" / "parent" / "checkpoint", Card(note="Base model: small."))
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_pruned.py", "README.md", "tokenizer.json"} <= names and not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert directory.stat().st_mode & 0o055 == 0o055
    card = (directory / "README.md").read_text()
    assert f"{sum(p.numel() for p in candidate.parameters()):,} parameters" in card and "Base model: small." in card
    assert "| query heads by layer | 5 0 5 |" in card and "| MLP channels by layer | 40 0 40 |" in card
    source = (directory / "modeling_pruned.py").read_text()
    assert "evoprune_nb" not in source and "import nbdev" not in source


def test_a_used_directory_is_refused(made, tokenizer, tmp_path):
    "A target with files in it is refused, by name, and left alone; an empty one is used."
    candidate, database = made("llama-gqa", "thin")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="used is not empty"):
        export_hf(candidate, tokenizer, tmp_path / "used")
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "notes.txt"]
    (tmp_path / "empty").mkdir()
    assert export_hf(candidate, tokenizer, tmp_path / "empty") == tmp_path / "empty"
    assert (tmp_path / "empty" / "config.json").exists() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_export_leaves_nothing(made, tokenizer, tmp_path, monkeypatch, error, existed):
    "An error or Ctrl-C halfway leaves no file behind, hidden ones included, and the target as it was."
    candidate, database = made("llama-gqa", "thin")
    if existed:
        (tmp_path / "checkpoint").mkdir()

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fails)
    with pytest.raises(type(error)):
        export_hf(candidate, tokenizer, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoint"] * existed


def test_the_dense_class_does_not_load_it(made, tokenizer, tmp_path):
    "Naming the dense class for a thinner checkpoint is an error, not a dense model with some random weights."
    candidate, database = made("llama-gqa", "thin")
    export_hf(candidate, tokenizer, tmp_path / "checkpoint")
    with pytest.raises(RuntimeError, match="size"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint")


def test_load_model_reads_an_export(made, tokenizer, tmp_path, monkeypatch):
    "load_model needs trust_remote_code for it, and says so; with it, the model computes the same."
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", None)
    candidate, database = made("llama-gqa", "first attention gone")
    export_hf(candidate, tokenizer, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(tmp_path / "checkpoint"))
    model, _ = load_model(str(tmp_path / "checkpoint"), trust_remote_code=True)
    assert torch.equal(behaviour(model)["logits"], behaviour(candidate)["logits"])


def test_winner_of_a_run(small, tmp_path, monkeypatch):
    "A run directory gives its best candidate so far; what it does not say has to be said, and must be what it was."
    model, database = small
    winner = Search(tmp_path / "run", model, database, small_pools(), short_config()).run(progress=False)
    monkeypatch.setattr(export, "load_model", lambda name, dtype, device: (model, name))
    candidate, name, history = load_winner(tmp_path / "run", "mine", database=database.directory)
    expected = materialize(model, database, winner)
    assert name == "mine" and history.winner == winner and is_run(tmp_path / "run") and not is_run(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(candidate.parameters(), expected.parameters(), strict=True))
    with pytest.raises(ValueError, match="does not say which model it prunes; name it"):
        load_winner(tmp_path / "run")
    with pytest.raises(ValueError, match="holds no level database"):
        load_winner(tmp_path / "run", "mine")
    other = build_database(model, random_blocks(seed=7), tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match=f"searched in another level database.*{other.fingerprint}"):
        load_winner(tmp_path / "run", "mine", database=other.directory)
