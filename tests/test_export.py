"""An exported checkpoint is the candidate, for software that has never heard of this package."""
import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import transformers
from helpers import by, made_up, random_blocks, short_config, small_model, small_pools, word_tokenizer
from safetensors.torch import save_file
from transformers.models.llama import modeling_llama as llama

from evoprune_nb.ship import export
from evoprune_nb import modeling
from evoprune_nb.machine.attention import IN_BLOCKS
from evoprune_nb.candidates import materialize
from evoprune_nb.ui.cli import main
from evoprune_nb.ship.cards import Card, add_scores, base_license, read_card
from evoprune_nb.ship.export import export_hf, is_run, load_exported, load_winner
from evoprune_nb.ship.layers import per_layer_config
from evoprune_nb.history import History
from evoprune_nb.modeling import fit_layers
from evoprune_nb.models import load_model, model_fingerprint
from evoprune_nb.ship.padded import export_padded, group_sizes
from evoprune_nb.database import build_database
from evoprune_nb.search import Search
from evoprune_nb.source import Source
from evoprune_nb.selection import Stage

TOP = -1  # the unit's last level, at which all of it is gone
GENOMES = {  # name → levels of the three attention units and the three MLPs
    "dense": [0, 0, 0, 0, 0, 0],
    "thin": [1, 2, 1, 3, 5, 9],
    "first attention gone": [TOP, 2, 0, 0, 2, 4],
    "a layer gone": [1, TOP, 1, 5, TOP, 5],
    "whole units only": [TOP, 0, 0, 0, TOP, 0],
    "all attention gone": [TOP, TOP, TOP, 1, 2, 3],
}
FAMILIES = ("llama-mha", "llama-gqa", "llama-biases", "llama-tied", "llama-rope", "qwen2", "qwen2-tied", "qwen2-mixed", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3", "glm4", "exaone4")
CASES = [(family, name, "float32") for family in FAMILIES for name in ("thin", "first attention gone", "a layer gone", "trained")]
CASES += [(family, "a layer gone", "float32") for family in ("olmo", "smollm3", "hunyuan", "seed-oss")]
CASES += [("llama-gqa", name, "float32") for name in ("dense", "whole units only", "all attention gone")]
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
    "Logits, and greedy continuations with a cache, on fixed text; with torch's attention, as plain transformers has it."
    if model.config._attn_implementation == IN_BLOCKS:
        model.set_attn_implementation("sdpa")
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
            optimizer = torch.optim.AdamW(candidate.parameters(), lr=1e-2)
            for block in random_blocks(8, 16, seed=9).split(4):  # with transformers' own loss, for heads that scale or cap their logits, too
                candidate(block, labels=block).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
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
    assert done.returncode == 0 and "per-layer attribute" not in done.stderr, done.stderr
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
    assert directory.stat().st_mode & 0o055 == 0o055 and all(path.stat().st_mode & 0o044 == 0o044 for path in directory.iterdir())
    card = (directory / "README.md").read_text()
    assert f"{sum(p.numel() for p in candidate.parameters()):,} parameters" in card and "Base model: small." in card
    assert "| query heads by layer | 5 0 5 |" in card and "| MLP channels by layer | 40 0 40 |" in card
    source = (directory / "modeling_pruned.py").read_text()
    assert "evoprune_nb" not in source and "nbdev" not in source and "\n\n\n\n" not in source and source.startswith('"""A pruned LlamaForCausalLM')
    assert compile(source, "modeling_pruned.py", "exec") and str(tmp_path) not in (directory / "config.json").read_text()


def test_a_used_directory_is_refused(made, tokenizer, tmp_path):
    "A target with files in it is refused, by name, and left alone; an empty one is used."
    candidate, database = made("llama-gqa", "thin")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="used exists and is not an empty directory"):
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


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-tied", "gemma3", "phi3"])
def test_this_package_reads_it_without_running_its_code(made, tokenizer, tmp_path, family):
    "load_exported gives bitwise the same logits from a directory whose modeling file would raise, and can export it again, file by file the same."
    candidate, _ = made(family, "first attention gone")
    export_hf(candidate, tokenizer, tmp_path / "first", Card(base_model="small"))
    source = (tmp_path / "first" / "modeling_pruned.py").read_text()
    (tmp_path / "first" / "modeling_pruned.py").write_text("raise SystemExit('this code was run')")
    model, loaded = load_exported(tmp_path / "first")
    assert torch.equal(behaviour(model)["logits"], behaviour(candidate)["logits"]) and not model.training
    assert per_layer_config(model) == per_layer_config(candidate) and loaded("Hello")["input_ids"] == tokenizer("Hello")["input_ids"]
    export_hf(model, loaded, tmp_path / "second", read_card(tmp_path / "first"))
    assert (tmp_path / "second" / "modeling_pruned.py").read_text() == source
    for name in ("config.json", "README.md", "model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name


def test_exports_of_version_0_1_are_read(made, tokenizer, tmp_path):
    "Their configuration names no AutoModel; the same weights, and a card that takes scores."
    candidate, _ = made("llama-gqa", "first attention gone")
    directory = export_hf(candidate, tokenizer, tmp_path / "old", Card("small"))
    config = json.loads((directory / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "README.md").write_text("---\nlicense: mit\n---\n\n# A pruned model\n\n## Licence\n\nMIT\n")
    (directory / "evaluation.json").write_text(json.dumps({"heldout": {"perplexity": 9.5}, "tasks": {}}))
    assert model_fingerprint(load_exported(directory)[0]) == model_fingerprint(candidate)
    add_scores(directory)
    assert "| held-out perplexity | 9.5 |\n\n## Licence" in (directory / "README.md").read_text()


def test_load_exported_reads_stock_models_and_refuses_others(tiny, tokenizer, tmp_path):
    "A stock checkpoint loads in its own dtype; a directory without one, or of an unknown type, is refused by name."
    tiny.save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    assert model_fingerprint(load_exported(tmp_path / "stock")[0]) == model_fingerprint(tiny)
    with pytest.raises(ValueError, match="is no checkpoint: it has no config.json"):
        load_exported(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "pruned_mamba9"}')
    with pytest.raises(ValueError, match="knows no 'mamba9'"):
        load_exported(tmp_path)


def test_large_models_are_sharded(made, tokenizer, tmp_path):
    "Beyond max_shard_size the weights go to several safetensors files with an index, and load to the same function."
    candidate, _ = made("llama-gqa", "thin")
    directory = export_hf(candidate, tokenizer, tmp_path / "sharded", max_shard_size=20_000)
    shards = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(shards.values())) > 2 and set(shards) == set(candidate.state_dict())
    assert torch.equal(behaviour(load_exported(directory)[0])["logits"], behaviour(candidate)["logits"])


@pytest.mark.parametrize("name", ["thin", "whole units only", "a layer gone"])
def test_it_steps_aside_for_classes_that_build_thin_layers_themselves(made, tokenizer, tmp_path, name):
    "On layers that already are as the configuration says, nothing is rebuilt: every module stays the same object."
    candidate, _ = made("llama-mha", name)
    export_hf(candidate, tokenizer, tmp_path / "checkpoint")
    model, _ = load_exported(tmp_path / "checkpoint")
    before = [id(module) for module in model.modules()]
    fit_layers(model.model.layers, model.config)
    assert [id(module) for module in model.modules()] == before


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa"])
@pytest.mark.parametrize("name", ["thin", "first attention gone", "a layer gone"])
def test_classes_that_build_from_per_layer_config(made, tokenizer, tmp_path, monkeypatch, family, name):
    "A stock layer that takes its sizes from `config.per_layer_config` keeps its linear layers, unless its query heads are spread unevenly, which no stock class can hold; logits are the same."
    candidate, _ = made(family, name)
    export_hf(candidate, tokenizer, tmp_path / "checkpoint")
    stock, rebuilt = llama.LlamaDecoderLayer, []

    class FromPerLayerConfig(stock):
        def __init__(self, config, layer_idx):
            super().__init__(config.per_layer_config[layer_idx], layer_idx)

    monkeypatch.setattr(llama, "LlamaDecoderLayer", FromPerLayerConfig)
    for shrink in ("shrink_attention", "shrink_mlp"):
        original = getattr(modeling, shrink)
        monkeypatch.setattr(modeling, shrink, lambda sublayer, size, original=original: rebuilt.append(size) or original(sublayer, size))
    model, _ = load_exported(tmp_path / "checkpoint")
    assert torch.equal(behaviour(model)["logits"], behaviour(candidate)["logits"])
    groups = [group_sizes(layer.self_attn) for layer in candidate.model.layers if layer.self_attn is not None]
    assert len(rebuilt) == sum(len(set(sizes)) > 1 for sizes in groups)


def test_card_tells_what_is_known(made, tokenizer, tmp_path):
    "Base model, licence and its files, picture, scores and provenance are in the card and its front matter; they survive a second export, with what an evaluation has left."
    from evoprune_nb.paper.figures import genome_figure

    candidate, database = made("llama-gqa", "thin")
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    (base / "LICENSE.txt").write_text("all of it")
    license, files = base_license(str(base))
    assert license == "cc-by-4.0" and [path.name for path in files] == ["LICENSE.txt"]
    genome = database.space.genome([1, 2, 1, 3, 5, 9])
    card = Card("org/base", license, files, genome.code, database.space.dense_params, {"perplexity": 12.345}, {"seed": "7"}, genome_figure(genome, database.space))
    first = export_hf(candidate, tokenizer, tmp_path / "first", card)
    (first / "evaluation.json").write_text(json.dumps({"heldout": {"perplexity": 9.5}, "tasks": {"piqa": {"metrics": {"acc": 0.5}}}}))
    second = export_hf(candidate, tokenizer, tmp_path / "second", read_card(first))
    for directory in (first, second):
        text = (directory / "README.md").read_text()
        assert (directory / "genome.png").exists() and (directory / "LICENSE.txt").read_text() == "all of it"
        assert all(part in text for part in ("license: cc-by-4.0", "base_model: org/base", "![heads and channels kept, by layer](genome.png)", "12.35", "| seed | 7 |", genome.code, "trust_remote_code=True"))
    assert "| held-out perplexity | 9.5 |" in text and "| piqa acc | 0.5 |" in text
    assert base_license(str(tmp_path / "first"))[0] == "cc-by-4.0" and base_license("smollm2-135m")[0] == "apache-2.0"


USE = """
import json, pathlib, sys
sys.modules["evoprune_nb"] = None  # importing it is an error from here on
import torch, transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
transformers.logging.set_verbosity_error()
source, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
load = lambda kind=AutoModelForCausalLM, **more: kind.from_pretrained(source, trust_remote_code=True, **more).eval()
blocks, found = torch.arange(40).view(2, 20), {}
torch.set_grad_enabled(False)
model = load()
wanted, hidden = model(blocks).logits, model.model(blocks).last_hidden_state

def use(function):
    try:
        with torch.enable_grad():
            found[function.__name__] = function()
    except Exception as error:
        found[function.__name__] = f"{type(error).__name__}: {error}"

@use
def body():
    body = load(AutoModel)
    return type(body).__name__ == "PrunedModel" and not hasattr(body, "lm_head") and torch.equal(body(blocks).last_hidden_state, hidden)

@use
def body_again():
    load(AutoModel).save_pretrained(out / "body")
    return torch.equal(AutoModel.from_pretrained(out / "body", trust_remote_code=True).eval()(blocks).last_hidden_state, hidden)

@use
def half():
    return bool((load().half()(blocks).logits.float() - wanted).abs().max() < 0.05 * wanted.abs().max())

@use
def device_map():
    return torch.equal(load(device_map="auto")(blocks.to(load(device_map="auto").device)).logits.cpu(), wanted)

@use
def generation():
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    direct = tokenizer.decode(load().generate(**tokenizer("The city", return_tensors="pt"), max_new_tokens=8, do_sample=False)[0])
    writer = pipeline("text-generation", str(source), trust_remote_code=True, device="cpu")
    return writer("The city", max_new_tokens=8, do_sample=False)[0]["generated_text"] == direct

@use
def features():
    return len(pipeline("feature-extraction", str(source), trust_remote_code=True, device="cpu")("The city")[0][0]) == hidden.shape[-1]

@use
def trainer():
    model = load()
    rows = [{"input_ids": row, "labels": row} for row in blocks]
    options = transformers.TrainingArguments(str(out / "trainer"), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-3)
    transformers.Trainer(model, options, train_dataset=rows).train()
    model.eval().save_pretrained(out / "trained")
    again = AutoModelForCausalLM.from_pretrained(out / "trained", trust_remote_code=True).eval()
    return torch.equal(again(blocks).logits, model(blocks).logits) and not torch.equal(model(blocks).logits, wanted)

@use
def compiled():
    torch.testing.assert_close(torch.compile(load(), backend="aot_eager")(blocks).logits, wanted)
    return True

@use
def exported():
    program = torch.export.export(load(), (), {"input_ids": blocks, "use_cache": False})
    torch.testing.assert_close(program.module()(input_ids=blocks, use_cache=False).logits, wanted)
    return True

@use
def default_lora():
    import peft

    adapted = peft.get_peft_model(load(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    places = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    adapted(blocks, labels=blocks).loss.backward()
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.01 * p.requires_grad)
    adapted.save_pretrained(out / "lora")
    again = peft.PeftModel.from_pretrained(load(), out / "lora")
    return sorted(places) == ["q_proj", "v_proj"] and torch.equal(again(blocks).logits, adapted.eval()(blocks).logits) and not torch.equal(again(blocks).logits, wanted)

(out / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(tiny, tokenizer, database, tmp_path_factory):
    "The embedded model with uneven heads and a missing sublayer of each kind, in `this/directory`, as its card says."
    candidate = materialize(tiny, database, database.space.genome([0, 1, 2, 3, 4, 5, 6, 6] + [0, 3, 10, 5, 7, 9, 1, 10]))
    return export_hf(candidate, tokenizer, tmp_path_factory.mktemp("exported") / "this" / "directory")


def elsewhere(script, *arguments, cwd) -> subprocess.CompletedProcess:
    "Run Python code in a fresh process; nobody answers its questions."
    environment = os.environ | {"HF_MODULES_CACHE": str(cwd / "modules"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.fixture(scope="module")
def used(exported, tmp_path_factory):
    "What other software makes of an export, by kind of use."
    out = tmp_path_factory.mktemp("used")
    done = elsewhere(USE, exported, out, cwd=out)
    assert (out / "found.json").exists(), done.stderr[-3000:]
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("use", ["body", "body_again", "half", "device_map", "generation", "features", "trainer", "compiled", "exported", "default_lora"])
def test_other_software_uses_it(used, use):
    """AutoModel (the body, with the weights of the whole), half precision, device_map="auto", pipelines, Trainer, torch.compile, torch.export,
    and peft, which finds the layers to adapt as it does in the stock model."""
    if use == "default_lora":
        pytest.importorskip("peft")
    assert used[use] is True, used[use]


@pytest.mark.parametrize("form", ["hf", "padded"])
def test_the_lines_on_the_card_load_it(exported, tokenizer, tmp_path, form):
    "Word for word, in a fresh process, without a question whether to run the code."
    home = exported.parents[1]
    if form == "padded":
        home = tmp_path
        export_padded(load_exported(exported)[0], tokenizer, home / "this" / "directory", pad_heads=True)
    code = (home / "this" / "directory" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = elsewhere(f"{code}\nprint(tokenizer('Hello, world')['input_ids'], type(model).__name__)", cwd=home)
    assert "[y/N]" not in done.stdout + done.stderr and "run the custom code" not in done.stdout + done.stderr
    assert done.returncode == 0 and done.stdout.strip().startswith(str(tokenizer("Hello, world")["input_ids"])), done.stderr[-2000:]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_body_of_every_family(made, tokenizer, tmp_path, monkeypatch, family):
    "AutoModel gives the last hidden state that the whole model has."
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    candidate, _ = made(family, "a layer gone")
    body = transformers.AutoModel.from_pretrained(export_hf(candidate, tokenizer, tmp_path / family), trust_remote_code=True).eval()
    behaviour(candidate)  # with torch's attention
    with torch.no_grad():
        assert torch.equal(body(random_blocks()).last_hidden_state, candidate.get_decoder()(random_blocks()).last_hidden_state)


def test_links_out_of_a_model_are_not_followed(made, tokenizer, tmp_path):
    "A LICENSE or a picture that is a link to somewhere else stays out of an export; the links of the hub's cache are followed."
    (tmp_path / "secret").write_text("the private key")
    base = tmp_path / "base"
    base.mkdir()
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    (base / "NOTICE").write_text("read me")
    (base / "genome.png").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match="LICENSE is a link out of the model's directory"):
        assert [path.name for path in base_license(str(base))[1]] == ["NOTICE"]
    with pytest.warns(UserWarning):
        assert read_card(base).figure is None
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("all of it")
    (snapshot / "LICENSE").symlink_to("../../blobs/123")
    out = export_hf(made("llama-gqa", "thin")[0], tokenizer, tmp_path / "out", Card(str(snapshot), *base_license(str(snapshot))))
    assert (out / "LICENSE").read_text() == "all of it" and not (out / "LICENSE").is_symlink()


def test_cards_escape_what_comes_from_others(made, tokenizer, tmp_path):
    "Names, notes, scores and provenance show as the text they are: no element, link, image, heading or further cell."
    evil = "a <img src=x onerror=alert(1)> | [b](http://c) ![d](e) `f` **g**\n\n# h\n| i | j |"
    card = Card(f"/x/{evil.replace('/', '')}", evil, (), evil, 0, {evil: 1.5, "task acc": evil}, {evil: evil}, None, evil)
    out = export_hf(made("llama-gqa", "thin")[0], tokenizer, tmp_path / "out", card)
    html = markdown_html((out / "README.md").read_text().split("\n---\n", 1)[1])
    for tag in ("<img", 'href="http://c"', "<em>", "<strong>"):
        assert tag not in html, tag
    assert html.count("<code") == 1 and html.count("<h1") == 1 and html.count("<table>") == 3 and "&lt;img src=x onerror=alert(1)&gt;" in html
    assert huggingface_hub.ModelCard.load(out / "README.md").data.license == evil


def markdown_html(text: str) -> str:
    import mistune

    return mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"])(text)


def test_scores_are_in_the_front_matter(made, tokenizer, tmp_path):
    "What an evaluation has measured is there as model hubs read it; what an owner wrote by hand stays."
    out = export_hf(made("llama-gqa", "thin")[0], tokenizer, tmp_path / "out", Card("org/base", scores={"fitness in the search (perplexity)": 3.0}))
    assert "model-index" not in (out / "README.md").read_text()
    (out / "evaluation.json").write_text(json.dumps({"heldout": {"perplexity": 9.5}, "tasks": {"piqa": {"metrics": {"acc": 0.5}}}}))
    found = huggingface_hub.ModelCard.load(out / "README.md")
    found.data.eval_results, found.data.model_name, found.data.language = [huggingface_hub.EvalResult("text-generation", "mine", "mine", "acc", 0.9)], "my model", "en"
    found.text += "\nMy own line.\n"
    found.save(out / "README.md")
    add_scores(out)
    once = (out / "README.md").read_text()
    add_scores(out)
    assert (out / "README.md").read_text() == once
    again = huggingface_hub.ModelCard.load(out / "README.md")
    assert [(row.dataset_name, row.metric_type, row.metric_value) for row in again.data.eval_results] == [("mine", "acc", 0.9), ("held-out", "perplexity", 9.5), ("piqa", "acc", 0.5)]
    assert again.data.language == "en" and again.data.model_name == "my model" and "My own line." in again.text and "| piqa acc | 0.5 |" in again.text


@pytest.fixture(scope="module")
def run_dir(tiny, database, pools, tmp_path_factory):
    "A finished run on the embedded model, with made-up fitness, that says what it searched; its database lies elsewhere."
    directory = tmp_path_factory.mktemp("run") / "run"
    parts = {name: pools["tuning" if name == "tuning" else "heldout"] for name in ("tuning", "scoring", "heldout")}
    search = Search(directory, tiny, database, parts, short_config(generations=1, stages=(Stage(2, 0, 64), Stage(1, 64, 64))), evaluator=by(made_up), source=Source("tiny"))
    search.run(progress=False)
    return directory


def test_export_command_writes_every_format(run_dir, database, tiny, tmp_path, capsys):
    "From a run directory, and on from the exported checkpoint; the card tells run, genome and licence."
    from_run = ["export", str(run_dir), "--database", str(database.directory)]
    assert main([*from_run, "--format", "hf", str(tmp_path / "hf")]) == 0
    winner = materialize(tiny, database, History(run_dir).winner)
    assert model_fingerprint(load_exported(tmp_path / "hf")[0]) == model_fingerprint(winner)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "license: apache-2.0" in card and "| search | finished |" in card and "fitness in the search" in card and (tmp_path / "hf" / "genome.png").stat().st_size > 1000
    assert main(["export", str(tmp_path / "hf"), "--format", "padded", "--pad-heads", str(tmp_path / "padded")]) == 0
    assert "of the saving is kept" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "hf"), "--format", "gguf", str(tmp_path / "gguf"), "--pad-heads"]) == 0
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {"model.gguf", "README.md", "genome.png", "card.json"}
    assert "| search | finished |" in (tmp_path / "gguf" / "README.md").read_text()


def test_card_of_an_evaluated_run(run_dir, database, corpus, tmp_path, capsys):
    "What `evoprune eval` measured of the winner in its run directory is in the winner's card, and in no other genome's."
    run, base = shutil.copytree(run_dir, tmp_path / "run"), ["--database", str(database.directory)]
    assert main(["eval", str(run), *base, "--text", str(corpus), "--seq-len", "64", "--tokens", "512"]) == 0
    perplexity = json.loads((run / "evaluation.json").read_text())["heldout"]["perplexity"]
    other = database.space.genome([1] * len(database.units))
    for name, options, known in (("winner", [], True), ("other", ["--genome", other.code], False)):
        assert main(["export", str(run), str(tmp_path / name), *base, *options]) == 0
        assert (f"| held-out perplexity | {perplexity:,.4g} |" in (tmp_path / name / "README.md").read_text()) == known


def test_export_command_refuses_before_work(run_dir, database, tmp_path, capsys, monkeypatch):
    "Each wrong use is one line that says what to do, exit status 2, and nothing is written."
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    plain = tmp_path / "plain"
    plain.mkdir()
    settings = json.loads((run_dir / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if key not in ("source", "sha256", "format")}))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    out, base = str(tmp_path / "out"), ["--database", str(database.directory)]
    for arguments, message in (
        ([str(run_dir), str(tmp_path / "used"), *base], "is not an empty directory; choose another place"),
        ([str(tmp_path), out], "is neither a run directory nor a checkpoint"),
        ([str(plain), out, *base], "name it (--model)"),
        ([str(run_dir), out], "holds no level database; say where it is (--database)"),
        ([str(run_dir), out, *base, "--genome", "12/34"], "2 attention and 2 MLP levels"),
        ([str(run_dir), out, *base, "--pad-heads"], "hf holds any heads"),
        ([str(run_dir), out, *base, "--format", "padded"], "--pad-heads"),
        ([str(run_dir), out, *base, "--format", "gguf"], "--pad-heads"),
        ([str(run_dir), out, *base, "--dtype", "bfloat16"], "was built from another model"),
    ):
        assert main(["export", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1, error
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_winner_of_a_run(small, tmp_path, monkeypatch):
    "A run directory gives its best candidate so far; what it does not say has to be said, and must be what it was."
    (model, database), mine = small, word_tokenizer("none")
    winner = Search(tmp_path / "run", model, database, small_pools(), short_config()).run(progress=False)
    monkeypatch.setattr(export, "load_model", lambda *_: (model, mine))
    candidate, found, history = load_winner(tmp_path / "run", "mine", database=database.directory)
    expected = materialize(model, database, winner)
    assert found is mine and history.winner == winner and is_run(tmp_path / "run") and not is_run(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(candidate.parameters(), expected.parameters(), strict=True))
    with pytest.raises(ValueError, match="does not say which model it prunes; name it"):
        load_winner(tmp_path / "run")
    with pytest.raises(ValueError, match="holds no level database"):
        load_winner(tmp_path / "run", "mine")
    other = build_database(model, random_blocks(seed=7), tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match=f"searched in another level database.*{other.fingerprint}"):
        load_winner(tmp_path / "run", "mine", database=other.directory)


@pytest.mark.parametrize("row", [
    {"nonsense": 1}, {"scores": [1]}, {"provenance": "text"}, {"base_model": 5}, {"dense_params": "many"}, {"license": {}}])
def test_a_card_of_other_contents_is_refused_by_name(tmp_path, row):
    "`card.json` may come from anybody."
    (tmp_path / "card.json").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=f"card.json is no card of evoprune_nb: {next(iter(row))} = "):
        read_card(tmp_path)


def test_scores_are_not_read_through_a_link(tmp_path):
    "An evaluation.json that leads out of the directory is not followed."
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text(json.dumps({"heldout": {"perplexity": 7.0}}))
    (tmp_path / "model" / "evaluation.json").symlink_to(tmp_path / "secret")
    assert read_card(tmp_path / "model").scores == {}


def test_vllm_is_promised_only_what_it_runs(tmp_path):
    "Attention in every layer, in groups of one size; the rest is refused with the settings that would do."
    model = small_model("llama-gqa")
    for heads, levels, message in [("query", [1, 2, 1, 3, TOP, 9], ""), ("query", [1, TOP, 1, 3, 5, 9], "layer 1 has none"), ("free", [1, 1, 0, 3, 5, 9], "layer 0 differ")]:
        database = build_database(model, random_blocks(), tmp_path / heads, heads=heads, progress=False)
        genome = database.space.genome([level % database.space.n_levels(unit) for unit, level in enumerate(levels)])
        candidate = materialize(model, database, genome)
        if not message:
            export.check_vllm(candidate)
            continue
        with pytest.raises(ValueError, match=f"{message}.*min_heads"):
            export.check_vllm(candidate)


def test_the_old_name_of_a_skipped_attention_is_read(made, tokenizer, tmp_path):
    "`attn` in an export of 0.1 means what `attention` means."
    model = small_model("llama-gqa")
    database = build_database(model, random_blocks(), tmp_path / "database", progress=False)
    candidate = materialize(model, database, database.space.genome([0, database.space.n_levels(1) - 1, 0, 0, 0, 0]))
    export_hf(candidate, word_tokenizer("none"), tmp_path / "out")
    row = json.loads((tmp_path / "out" / "config.json").read_text())
    assert row["per_layer_config"]["1"]["skip"] == ["attention"]
    row["per_layer_config"]["1"]["skip"] = ["attn"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(row))
    assert model_fingerprint(load_exported(tmp_path / "out")[0]) == model_fingerprint(candidate)
