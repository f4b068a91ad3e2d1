"""Models are found, checked and taken apart; errors come early and say what would be right."""
import re

import pytest
import torch
import transformers
from helpers import SMALL, small_model

from evoprune_nb.models import find_units, load_model, model_fingerprint, prunable_units
from evoprune_nb.machine.device import resolve_device, resolve_dtype


@pytest.mark.parametrize("options, message", [
    (dict(name="./no-such-directory"), "'./no-such-directory': there is no such directory"),
    (dict(name="/no/such/directory"), "there is no such directory"),
    (dict(name="no-such/model"), "'no-such/model': it is neither an embedded model .tiny, smollm2-135m., nor"),
    (dict(name="not a name!"), "'not a name!'"),
    (dict(dtype="float17"), "'float17' is not a floating-point torch dtype"),
    (dict(dtype="int8"), "'int8' is not a floating-point torch dtype"),
    (dict(dtype="nn"), "'nn' is not a floating-point torch dtype"),
    (dict(device="cuda:99"), "'cuda:99': torch sees 0"),
    (dict(device="gpu"), "'gpu' is no torch device; try 'cpu'"),
])
def test_wrong_arguments_are_named(options, message):
    "A wrong name, dtype or device is a ValueError with the value seen and what would be right."
    with pytest.raises(ValueError, match=message):
        load_model(**options)


def test_empty_directory_is_no_model(tmp_path):
    "A directory without config.json is refused by name."
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_model(str(tmp_path))


def test_absent_accelerators_are_refused(monkeypatch):
    "On a machine without accelerators, cuda and mps are errors and auto is the CPU."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(ValueError, match="device='cpu' or 'auto'"):
            resolve_device(device)
    assert resolve_device("auto") == torch.device("cpu")


def test_dtype_by_name_or_itself():
    "A dtype may be a name or a torch dtype."
    assert resolve_dtype("bfloat16") is resolve_dtype(torch.bfloat16) is torch.bfloat16


@pytest.mark.parametrize("form", ["absolute", "./relative", "~/home"])
def test_local_directories_load(tiny, tokenizer, tmp_path, monkeypatch, form):
    "A saved model loads from an absolute, a relative and a home directory, in the dtype asked for and in evaluation mode."
    tiny.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = {"absolute": str(tmp_path / "saved"), "./relative": "./saved", "~/home": "~/saved"}[form]
    loaded, _ = load_model(name)
    assert model_fingerprint(loaded) == model_fingerprint(tiny) and not loaded.training
    assert load_model(name, dtype="bfloat16")[0].dtype == torch.bfloat16


def on_meta(kind: str, **options):
    "A model without memory."
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options))


@pytest.mark.parametrize("kind, options, attn, mlp", [
    ("LlamaConfig", {}, (32, 32, 128, 32), (32, 11008)),  # Llama-2-7B is the default configuration
    ("LlamaConfig", dict(intermediate_size=14336, num_key_value_heads=8), (32, 32, 128, 8), (32, 14336)),  # Llama-3.1-8B
    ("Qwen2Config", dict(hidden_size=5120, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, intermediate_size=13824), (48, 40, 128, 8), (48, 13824)),
    ("Qwen3Config", dict(num_hidden_layers=3, head_dim=128), (3, 32, 128, 32), (3, 22016)),
])
def test_units_of_large_models(kind, options, attn, mlp):
    "Layers, heads, head size, key/value heads and channels are read from any Llama-shaped model, without its weights."
    units, refused = find_units(on_meta(kind, **options))
    assert not refused and [unit.layer for unit in units] == 2 * list(range(attn[0]))
    assert {(unit.n_structures, unit.structure_size, unit.n_kv_heads) for unit in units if unit.kind == "attn"} == {attn[1:]}
    assert {(unit.n_structures, unit.structure_size) for unit in units if unit.kind == "mlp"} == {(mlp[1], 1)}


def test_units_name_real_modules(tiny):
    "The scored matrix and the norm of every unit exist, with as many columns as the unit has structures; names are unique."
    units = prunable_units(tiny)
    assert len({unit.name for unit in units}) == len(units) == 2 * tiny.config.num_hidden_layers
    for unit in units:
        assert tiny.get_submodule(unit.output).in_features == unit.n_structures * unit.structure_size
        assert tiny.get_submodule(unit.norm).weight.shape == (tiny.config.hidden_size,)


@pytest.mark.parametrize("kind, options, reason", [
    ("GPT2Config", dict(n_layer=2), "GPT2LMHeadModel has no list of decoder layers named 'layers'"),
    ("PhiConfig", SMALL, "PhiAttention has no linear o_proj .nor qkv_proj."),
    ("CohereConfig", SMALL, "exactly one normalisation before .or after, or both. each sublayer; it has input_layernorm"),
    ("GraniteConfig", SMALL, "scales what a sublayer adds to the residual stream"),
    ("Phi3Config", SMALL | dict(resid_pdrop=0.1), "drops out part of what a sublayer adds"),
    ("GptOssConfig", SMALL | dict(head_dim=8, num_local_experts=2), "has parameters besides its projections and per-head normalisations: sinks"),
    ("BitNetConfig", SMALL, "normalisation spans all heads|attn_sub_norm"),
])
def test_other_architectures_are_refused_with_a_reason(kind, options, reason):
    "A model that is not Llama-shaped is refused, saying what stands in the way."
    with pytest.raises(ValueError, match=reason):
        prunable_units(on_meta(kind, **options))


@pytest.mark.parametrize("kind, options, norms, shape", [
    ("Gemma2Config", dict(head_dim=8), ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"), (6, 8, 2)),
    ("Gemma3TextConfig", dict(head_dim=8), ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"), (6, 8, 2)),
    ("Glm4Config", dict(head_dim=8), ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"), (6, 8, 2)),
    ("Phi3Config", dict(resid_pdrop=0.0), ("input_layernorm", "post_attention_layernorm"), (6, 8, 2)),
    ("Exaone4Config", {}, ("post_attention_layernorm", "post_feedforward_layernorm"), (6, 8, 2)),
])
def test_other_orders_and_fused_projections_are_found(kind, options, norms, shape):
    "Post-normalisations belong to their unit, and heads are counted in fused projections, whatever the class is called."
    units, refused = find_units(on_meta(kind, **SMALL | options))
    assert not refused and len(units) == 6
    assert tuple(path.split(".")[-1] for unit in (units[0], units[3]) for path in unit.norms) == norms
    assert (units[0].n_structures, units[0].structure_size, units[0].n_kv_heads) == shape and units[3].n_structures == 80


@pytest.mark.parametrize("kind, norm, reason", [
    ("Olmo2Config", "post_feedforward_layernorm", "its query/key normalisation spans all heads, so heads are not independent"),
    ("DiffLlamaConfig", "post_attention_layernorm", "has parameters besides its projections and per-head normalisations: lambda_k1"),
])
def test_dependent_heads_leave_the_mlp(kind, norm, reason):
    "Where heads depend on one another, attention is refused for that reason; the MLPs are found."
    units, refused = find_units(on_meta(kind, **SMALL))
    assert [unit.name for unit in units] == ["mlp.00", "mlp.01", "mlp.02"] and units[0].norms == (f"model.layers.0.{norm}",)
    assert len(refused) == 3 and all(reason in why for why in refused.values())


def test_doubled_query_projection_is_refused():
    "A query projection that also holds an output gate is not taken for twice as many heads."
    model = on_meta("LlamaConfig", **SMALL)
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(48, 96, device="meta")
    _, refused = find_units(model)
    assert refused == {"model.layers.0.self_attn": "its projections hold 12 query, 2 key and 2 value heads of size 8, but o_proj reads 6; they must agree"}


def test_partly_prunable_models_say_what_is_left_out():
    "Mixture-of-experts MLPs are left out with a reason; attention is still found."
    units, refused = find_units(on_meta("MixtralConfig", **SMALL, num_local_experts=2))
    assert [unit.name for unit in units] == ["attn.00", "attn.01", "attn.02"]
    assert set(refused) == {f"model.layers.{layer}.mlp" for layer in range(3)} and all("no linear gate_proj" in reason for reason in refused.values())


def test_fingerprint_tells_models_apart():
    "Equal weights have equal fingerprints; one changed value, or another dtype, does not."
    first, second, changed = small_model("qwen2"), small_model("qwen2"), small_model("qwen2")
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-6
    assert model_fingerprint(first) == model_fingerprint(second)
    assert len({model_fingerprint(model) for model in (first, changed, small_model("qwen2").bfloat16())}) == 3
