"""Costs counted from shapes are those of real models: parameters, FLOPs, cache; up to the published full-size models."""
import pytest
import torch
import transformers
from helpers import random_blocks, small_model
from torch.utils.flop_counter import FlopCounterMode

from evoprune_nb.target import Target, plan_budget, uniform_genome
from evoprune_nb.candidates import materialize
from evoprune_nb.costs import fixed_costs, unit_costs
from evoprune_nb.genome import level_grid, make_space
from evoprune_nb.judge.latency import _cache_name, kv_cache_bytes
from evoprune_nb.models import find_units, prunable_units
from evoprune_nb.database import LevelDatabase, build_database

FAMILIES = ["llama-mha", "llama-gqa", "llama-biases", "llama-tied", "llama-rope", "qwen2", "qwen2-mixed", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "glm4", "exaone4"]
CONTEXT = 21  # beyond the sliding windows, which are 8


@pytest.fixture(scope="module", params=FAMILIES)
def candidates(request, tmp_path_factory):
    "The dense model of a family and three pruned ones, each with its genome, and their space."
    model = small_model(request.param, attention="eager")
    directory = tmp_path_factory.mktemp(request.param) / "database"
    build_database(model, random_blocks(), directory, progress=False)
    database = LevelDatabase(directory, model, context_tokens=CONTEXT)
    genomes = map(database.space.genome, ([0] * 6, [3] * 3 + [5] * 3, [5, 1, 2] + [0, 10, 7], [1, 6, 4] + [10, 2, 0]))
    return database.space, [(genome, materialize(model, database, genome, trainable=False)) for genome in genomes]


@torch.no_grad()
def flops_of_the_last_token(model) -> int:
    "FLOPs that torch counts while a model writes the last token of a context."
    tokens, name = random_blocks(1, CONTEXT), _cache_name(model)
    read = model(input_ids=tokens[:, :-1], use_cache=True)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens[:, -1:], use_cache=True, **{name: getattr(read, name)})
    rotary = [counts for name, counts in counter.get_flop_counts().items() if name.split(".")[-1].startswith("rotary_emb")]
    return counter.get_total_flops() - sum(n for counts in rotary for n in counts.values())  # older versions of transformers write it as a product of matrices


def test_costs_are_those_of_the_model(candidates):
    "Parameters, FLOPs of a token and bytes of cache, dense and pruned, in every family, are what torch and the cache object say."
    space, models = candidates
    for genome, model in models:
        assert space.cost(genome, "params") == sum(p.numel() for p in model.parameters())
        assert space.cost(genome, "flops") == flops_of_the_last_token(model), genome.code
        assert space.cost(genome, "kv_bytes") * CONTEXT == pytest.approx(kv_cache_bytes(model, CONTEXT)), genome.code


def test_costs_of_sublayers_that_cannot_be_pruned():
    "They are fixed; of those whose arithmetic is not known, only parameters are, and a limit on the rest is an error."
    model = small_model("olmo2", attention="eager")  # its query/key norms span all heads: MLPs only
    units, refused = find_units(model)
    assert {unit.kind for unit in units} == {"mlp"} and len(refused) == 3
    fixed = fixed_costs(model, units, CONTEXT)
    dense = [unit_costs(model, unit, unit.n_structures, 0, CONTEXT) for unit in units]
    assert fixed["flops"] + sum(costs["flops"] for costs in dense) == flops_of_the_last_token(model)
    assert fixed["kv_bytes"] * CONTEXT == kv_cache_bytes(model, CONTEXT)
    model.model.layers[1].self_attn = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3))
    space = make_space(model, units, level_grid(units))
    assert list(space.costs) == list(space.fixed) == ["params"]
    with pytest.raises(ValueError, match="'flops' are not known here; known are params"):
        plan_budget(space, Target(limits={"flops": 0.5}))


def test_attention_grows_with_the_context_up_to_the_window():
    "FLOPs rise with the context by 4·heads·head_dim a token, until a sliding window ends it; a cache is at most a window."
    for family, window in (("llama-gqa", None), ("mistral", 8)):
        model = small_model(family)
        unit = prunable_units(model)[0]
        flops = {n: unit_costs(model, unit, 6, 2, n)["flops"] for n in (4, 5, 8, 9, 100)}
        assert flops[5] - flops[4] == 4 * 6 * 8
        assert (flops[100] == flops[8]) == (window is not None)
        cache = [n * unit_costs(model, unit, 6, 2, n)["kv_bytes"] for n in (7, 100)]
        assert cache[1] == pytest.approx(cache[0] if window else cache[0] * 100 / 7)


FULL_SIZE = {  # name → configuration, published grid (structures removed), dense parameters, published target
    "Llama-2-7B": (
        transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000, tie_word_embeddings=False),
        None, 6_738_415_616, 2.7e9),
    "Llama-3.1-8B": (
        transformers.LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
        {"attn": [n // 128 for n in (0, 512, 896, 1408, 1792, 2304, 2816, 3328, 3584, 3968, 4096)],
         "mlp": [0, 1440, 2880, 4288, 5728, 7168, 8608, 10048, 11456, 12896, 14336]}, 8_030_261_248, 4.6e9),
    "Qwen2.5-14B": (
        transformers.Qwen2Config(hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False),
        {"attn": [n // 128 for n in range(0, 5121, 512)], "mlp": [0, 1376, 2752, 4160, 5536, 6912, 8288, 9664, 11072, 12448, 13824]}, 14_770_033_664, 8.4e9),
}


@pytest.fixture(scope="module", params=sorted(FULL_SIZE))
def full_size(request):
    "A published model on the meta device, its space on the published grid, and the published target."
    config, grid, dense, target = FULL_SIZE[request.param]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    units = prunable_units(model)
    return config, model, make_space(model, units, level_grid(units, custom=grid)), dense, target


def test_full_size_units_and_costs(full_size):
    "Units, dense parameters, FLOPs and cache of the published models, against their well-known formulas."
    config, model, space, dense, _ = full_size
    n_layers, head_dim = config.num_hidden_layers, config.hidden_size // config.num_attention_heads
    assert [unit.name for unit in space.units] == [f"{kind}.{layer:02d}" for kind in ("attn", "mlp") for layer in range(n_layers)]
    assert all((u.n_structures, u.structure_size, u.n_kv_heads) == (config.num_attention_heads, head_dim, config.num_key_value_heads) for u in space.units[:n_layers])
    assert all((u.n_structures, u.structure_size) == (config.intermediate_size, 1) for u in space.units[n_layers:])
    assert space.dense_params == dense and model.device.type == "meta"
    q, kv = config.hidden_size, config.num_key_value_heads * head_dim
    matrices = n_layers * (2 * config.hidden_size * (q + kv) + 3 * config.hidden_size * config.intermediate_size) + config.vocab_size * config.hidden_size
    assert space.dense_cost("flops") == 2 * matrices + 4 * n_layers * q * 2048
    assert space.dense_cost("kv_bytes") == n_layers * 2 * kv * 2


def test_published_grids(full_size):
    "The published grids are accepted for these models, and where they are ten equal steps, they are what the package would choose."
    config, _, space, _, _ = full_size
    ours = level_grid(space.units)
    equal = "mlp" if config.hidden_size == 4096 else "both"  # the attention steps of Llama-3.1 are uneven
    assert space.removed[-1] == ours[-1] and (space.removed[0] == ours[0] or equal == "mlp")
    assert all(len(levels) == 11 and levels[0] == 0 and levels[-1] == unit.n_structures for unit, levels in zip(space.units, space.removed))


def test_published_targets_are_reached_within_a_hundredth(full_size):
    "2.7B, 4.6B and 8.4B parameters, from the uniform start, are met to within 1 %, and never exceeded."
    _, _, space, _, target = full_size
    budget, start = plan_budget(space, Target(params=int(target)))
    assert budget.contains(space, start) and 0.99 * target <= space.n_params(start) <= target
    assert max(start.mlp) - min(start.mlp) <= 1


def test_full_size_limits_of_every_kind(full_size):
    "Half of the arithmetic, of the cache, or both, can be asked of a full-size model; a uniform half of the levels keeps half of each unit."
    _, _, space, _, _ = full_size
    for limits in ({"flops": 0.5}, {"kv_bytes": 0.5}, {"flops": 0.6, "kv_bytes": 0.5}):
        budget, start = plan_budget(space, Target(limits=limits, tolerance=0.03))
        assert all(space.cost(start, measure) <= share * space.dense_cost(measure) for measure, share in limits.items()) and budget.contains(space, start)
    assert space.params_removed(uniform_genome(space, 0.5)) == pytest.approx(0.5, abs=0.06)
