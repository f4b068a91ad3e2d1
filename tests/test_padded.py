"""A padded checkpoint is an ordinary one: stock classes, no remote code, the same function."""
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import random_blocks, small_model
from safetensors.torch import save_file

from evoprune_nb.candidates import materialize
from evoprune_nb.ship.cards import Card
from evoprune_nb.ship.export import export_hf, load_exported
from evoprune_nb.models import model_fingerprint
from evoprune_nb.ship.padded import export_padded, padded_model, stock_shape
from evoprune_nb.database import build_database
from evoprune_nb.training import Training, train

TOP = -1  # the unit's last level, at which all of it is gone
GENOMES = {  # name → levels of the three attention units and the three MLPs
    "thin": [1, 1, 0, 3, 5, 9],
    "first attention gone": [TOP, 1, 1, 0, 2, 4],
    "a layer gone": [1, TOP, 1, 5, TOP, 5],
    "all attention gone": [TOP, TOP, TOP, 1, 2, 3],
}
HEADS = {"llama-mha": "free", "llama-gqa": "query", "llama-biases": "group", "llama-tied": "group", "llama-rope": "query", "qwen2": "query", "qwen2-tied": "group", "qwen2-mixed": "group",
         "qwen3": "query", "mistral": "group", "gemma2": "query", "gemma3": "group", "phi3": "query", "glm4": "group", "exaone4": "query"}
CASES = [(family, name, "float32") for family in HEADS for name in ("thin", "first attention gone", "a layer gone")]
CASES += [("llama-gqa", "all attention gone", "float32"), ("llama-gqa", "thin", "bfloat16"), ("qwen2-tied", "a layer gone", "bfloat16")]

RELOAD = """
import json, pathlib, sys
sys.modules["evoprune_nb"] = None  # importing it is an error from here on
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
logging.set_verbosity_error()
root, report = pathlib.Path(sys.argv[1]), {}
for case in sorted(root.iterdir()):
    expected = load_file(case / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(case / "checkpoint")
    prompt = expected["blocks"][:2, :10]
    with torch.no_grad():
        logits = model(expected["blocks"]).logits
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0)
    report[case.name] = {
        "class": type(model).__name__, "logits": torch.equal(logits, expected["logits"]), "tokens": torch.equal(tokens, expected["tokens"]), "dtype": str(model.dtype),
        "n_params": sum(p.numel() for p in model.parameters()), "greeting": AutoTokenizer.from_pretrained(case / "checkpoint")("Hello, world")["input_ids"]}
pathlib.Path(sys.argv[2]).write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A function: family, genome name, dtype, heads → candidate and database; databases are made once."
    known = {}

    def make(family, name, dtype="float32", heads=None):
        heads = heads or HEADS[family]
        if (family, dtype, heads) not in known:
            model = small_model(family)
            for parameter in model.parameters():  # as from_pretrained does: not the rotary frequencies, which are buffers
                parameter.data = parameter.data.to(getattr(torch, dtype))
            known[family, dtype, heads] = model, build_database(model, random_blocks(), tmp_path_factory.mktemp("database"), heads, progress=False)
        model, database = known[family, dtype, heads]
        levels = [range(database.space.n_levels(unit))[level] for unit, level in enumerate(GENOMES[name])]
        return materialize(model, database, database.space.genome(levels)), database

    return make


def logits(model, blocks) -> torch.Tensor:
    with torch.no_grad():
        return model(blocks).logits


@pytest.fixture(scope="module")
def exports(made, tokenizer, tmp_path_factory):
    "All cases exported here, then loaded by one other process that cannot import evoprune_nb: case → what export said, what the process found."
    root, results = tmp_path_factory.mktemp("exports"), {}
    blocks = random_blocks(3, 24, seed=5)
    for family, name, dtype in CASES:
        candidate, _ = made(family, name, dtype)
        case = root / f"{family}, {name}, {dtype}"
        results[case.name] = export_padded(candidate, tokenizer, case / "checkpoint")
        prompt, here = blocks[:2, :10], transformers.AutoModelForCausalLM.from_pretrained(case / "checkpoint")
        tokens = candidate.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0)
        save_file({"blocks": blocks, "logits": logits(here, blocks), "tokens": tokens}, case / "expected.safetensors")
    home = tmp_path_factory.mktemp("elsewhere")
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", RELOAD, str(root), str(home / "report.json")], cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return results, json.loads((home / "report.json").read_text()), root


@pytest.mark.parametrize("family, name, dtype", CASES)
def test_reloaded_elsewhere_it_is_a_stock_model_with_the_same_function(exports, made, tokenizer, family, name, dtype):
    """Elsewhere, without this package and without remote code: the dense class, bitwise the logits it has here, the candidate's greedy text; and they are the candidate's logits, to rounding.
    Nothing in the directory is code."""
    results, report, root = exports
    case = f"{family}, {name}, {dtype}"
    found, result, candidate = report[case], results[case], made(family, name, dtype)[0]
    assert found["class"] == type(candidate).__name__ and found["logits"] and found["dtype"] == f"torch.{dtype}"
    assert found["n_params"] == result.n_params and result.pruned_params == sum(p.numel() for p in candidate.parameters())
    assert found["greeting"] == tokenizer("Hello, world")["input_ids"]
    assert not list((root / case / "checkpoint").glob("*.py")) and "auto_map" not in json.loads((root / case / "checkpoint" / "config.json").read_text())
    if dtype == "float32":
        assert found["tokens"]
        stock, blocks = transformers.AutoModelForCausalLM.from_pretrained(root / case / "checkpoint"), random_blocks(3, 24, seed=5)
        torch.testing.assert_close(logits(stock, blocks), logits(candidate, blocks), rtol=1e-5, atol=2e-5)


def test_padding_is_exact_zeros_and_no_wider_than_needed(made, tokenizer):
    "The shape is the widest layer's; outside of what a layer has, every weight is exactly zero; wholly removed layers are left out."
    candidate, _ = made("llama-gqa", "a layer gone")
    shape = stock_shape(candidate)
    assert (shape.layers, shape.n_heads, shape.n_kv_heads, shape.width) == ((0, 2), 4, 2, 40)
    candidate, _ = made("llama-gqa", "thin")
    stock = padded_model(candidate, stock_shape(candidate))
    for own, padded in zip(candidate.model.layers, stock.model.layers):
        down = padded.mlp.down_proj.weight
        assert torch.equal(down[:, : own.mlp.down_proj.in_features], own.mlp.down_proj.weight) and not down[:, own.mlp.down_proj.in_features :].any()
        assert int((padded.self_attn.o_proj.weight != 0).any(0).sum()) == own.self_attn.o_proj.in_features
        assert sum(p.count_nonzero().item() for p in padded.parameters()) == sum(p.count_nonzero().item() for p in own.parameters())


def test_saving_kept_is_counted(exports, made, tokenizer, tmp_path):
    "A uniform genome keeps all of the saving; a mixed one what its widest layer leaves; the card and the result say the same."
    results, _, root = exports
    model = small_model("llama-gqa")
    database = made("llama-gqa", "thin")[1]
    uniform = export_padded(materialize(model, database, database.space.genome([1, 1, 1, 5, 5, 5])), tokenizer, tmp_path / "uniform")
    assert uniform.kept_saving == 1 and uniform.n_params == uniform.pruned_params < uniform.dense_params
    mixed = results["llama-gqa, thin, float32"]
    assert 0 < mixed.kept_saving < 1 and mixed.dense_params == sum(p.numel() for p in model.parameters())
    card = (root / "llama-gqa, thin, float32" / "checkpoint" / "README.md").read_text()
    assert f"| share of the saving that padding keeps | {mixed.kept_saving:.0%} |" in card and f"{mixed.kept_saving:.0%} of the saving is kept" in str(mixed)


def test_free_heads_are_refused_with_what_to_do(made, tokenizer, tmp_path):
    "Groups of different sizes are refused, naming the layer and three ways out, and nothing is written; pad_heads is one of them and is exact."
    candidate, database = made("llama-gqa", "thin", heads="free")
    with pytest.raises(ValueError, match=r"layer 0 has key/value groups of (2, 3|3, 2) query heads.*heads='query' or 'group'.*--format hf.*--pad-heads"):
        export_padded(candidate, tokenizer, tmp_path / "refused")
    assert not list(tmp_path.iterdir())
    result = export_padded(candidate, tokenizer, tmp_path / "padded", pad_heads=True)
    assert result.shape.n_heads == 6 and result.shape.n_kv_heads == 2
    blocks = random_blocks(3, 24, seed=5)
    torch.testing.assert_close(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "padded"), blocks), logits(candidate, blocks), rtol=1e-5, atol=2e-5)


def test_engines_that_derive_the_head_size_find_it(made, tokenizer, tmp_path):
    "Qwen2's configuration has no head_dim: its number of query heads stays, so that hidden_size / heads is the head size; keep_head_count decides otherwise, for either."
    qwen, llama = made("qwen2", "a layer gone")[0], made("llama-gqa", "a layer gone")[0]
    for candidate, keep, n_heads in ((qwen, None, 6), (qwen, False, 4), (llama, None, 4), (llama, True, 6)):
        shape = stock_shape(candidate, keep)
        assert shape.n_heads == n_heads and n_heads % shape.n_kv_heads == 0
    export_padded(llama, tokenizer, tmp_path / "kept", keep_head_count=True)
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert config["hidden_size"] // config["num_attention_heads"] == config["head_dim"] == 8
    blocks = random_blocks(3, 24, seed=5)
    torch.testing.assert_close(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "kept"), blocks), logits(llama, blocks), rtol=1e-5, atol=2e-5)


def test_a_trained_and_reloaded_export_can_be_padded(made, tokenizer, tmp_path):
    "From a directory written by export_hf, after training, without running its code; and nothing of the source changes."
    candidate, _ = made("llama-gqa", "a layer gone")
    train(candidate, random_blocks(8, 16, seed=9), Training(lr=1e-2))
    before = model_fingerprint(candidate)
    export_hf(candidate, tokenizer, tmp_path / "pruned", Card(base_model="small"))
    reloaded, tokens = load_exported(tmp_path / "pruned")
    result = export_padded(reloaded, tokens, tmp_path / "padded", max_shard_size=20_000)
    assert (tmp_path / "padded" / "model.safetensors.index.json").exists() and result.pruned_params == sum(p.numel() for p in candidate.parameters())
    blocks = random_blocks(3, 24, seed=5)
    torch.testing.assert_close(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "padded"), blocks), logits(candidate, blocks), rtol=1e-5, atol=2e-5)
    assert model_fingerprint(candidate) == before


def test_a_wrong_checkpoint_is_never_left_behind(made, tokenizer, tmp_path, monkeypatch):
    "If what was written does not compute the same, export fails and leaves nothing."
    candidate, _ = made("llama-gqa", "thin")
    good = padded_model

    def wrong(model, shape):
        stock = good(model, shape)
        stock.model.layers[0].mlp.down_proj.weight.data[0] += 10
        return stock

    monkeypatch.setattr("evoprune_nb.ship.padded.padded_model", wrong)
    with pytest.raises(RuntimeError, match="computes other logits than the pruned model"):
        export_padded(candidate, tokenizer, tmp_path / "wrong")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama-gqa", "llama-rope", "gemma3"])
def test_older_software_finds_the_rotary_frequencies(made, tokenizer, tmp_path, family):
    "The names of transformers 4 stand beside `rope_parameters` and say the same, where they can: not for frequencies by kind of layer."
    export_padded(made(family, "thin")[0], tokenizer, tmp_path / "out")
    row = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = row["rope_parameters"]
    assert row.get("rope_theta") == rope.get("rope_theta") and ("rope_scaling" in row) == (family == "llama-rope")
    if family == "llama-rope":
        assert row["rope_scaling"] | {"rope_theta": row["rope_theta"]} == rope
