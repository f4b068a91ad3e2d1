"""A candidate is exactly the dense model with structures removed, only smaller."""
import copy

import pytest
import torch
from helpers import random_blocks, small_model

from evoprune_nb.candidates import dense_state, materialize
from evoprune_nb.genome import Genome
from evoprune_nb.models import find_units, model_fingerprint
from evoprune_nb.database import LevelDatabase, build_database
from evoprune_nb.training import Training, train

TOP = -1  # the unit's last level, at which all of it is gone
GENOMES = {  # name → levels of the three attention units and the three MLPs
    "dense": [0, 0, 0, 0, 0, 0],
    "thin": [1, 1, 1, 3, 5, 9],
    "first attention gone": [TOP, 1, 0, 0, 2, 4],
    "an MLP gone": [0, 1, 1, 4, TOP, 0],
    "a layer gone": [1, TOP, 1, 5, TOP, 5],
    "all attention gone": [TOP, TOP, TOP, 1, 2, 3],
    "all gone": [TOP, TOP, TOP, TOP, TOP, TOP],
}
MODELS = [("llama-mha", "free"), ("llama-gqa", "free"), ("llama-gqa", "query"), ("llama-gqa", "group"), ("llama-biases", "free"), ("llama-tied", "free"),
          ("llama-rope", "free"), ("qwen2", "free"), ("qwen2-tied", "query"), ("qwen2-mixed", "group"), ("qwen3", "free"), ("mistral", "free"), ("gemma2", "free"),
          ("gemma3", "query"), ("phi3", "free"), ("phi3", "group"), ("glm4", "free"), ("exaone4", "query")]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    "A function: family, heads, attention implementation → dense model and its database, each made once."
    known = {}

    def make(family, heads="free", attention=None):
        if (family, heads, attention) not in known:
            model = small_model(family, attention=attention)
            known[family, heads, attention] = model, build_database(model, random_blocks(), tmp_path_factory.mktemp("database"), heads, progress=False)
        return known[family, heads, attention]

    return make


def genome_of(database: LevelDatabase, name: str) -> Genome:
    space = database.space
    return space.genome([range(space.n_levels(unit))[level] for unit, level in enumerate(GENOMES[name])])


def zeroed(model, database: LevelDatabase, genome: Genome):
    "The obvious candidate: the dense model, with zeros in the columns of what is removed."
    model = copy.deepcopy(model)
    for index, (unit, level) in enumerate(zip(database.units, genome.levels)):
        output = model.get_submodule(unit.output)
        kept = database.kept(index, level)
        columns = (kept[:, None] * unit.structure_size + torch.arange(unit.structure_size)).flatten()
        if level == 0:
            continue
        with torch.no_grad():
            output.weight.zero_()
            if len(kept):
                output.weight[:, columns] = database.weight(index, level)
            elif output.bias is not None:
                output.bias.zero_()
    return model


def logits(model, blocks=random_blocks(4, 24, seed=7)) -> torch.Tensor:
    with torch.no_grad():
        return model(blocks).logits


def n_params(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", GENOMES)
@pytest.mark.parametrize("family, heads", MODELS)
def test_candidate_computes_what_the_zeroed_model_computes(made, family, heads, name):
    "To float32 rounding, and its parameters are what the budget counts, for every architecture and way to count heads."
    model, database = made(family, heads)
    genome = genome_of(database, name)
    candidate = materialize(model, database, genome)
    torch.testing.assert_close(logits(candidate), logits(zeroed(model, database, genome)), rtol=1e-5, atol=2e-5)
    assert n_params(candidate) == database.space.n_params(genome)
    assert not any(parameter.numel() == 0 for parameter in candidate.parameters())


@pytest.mark.parametrize("name", GENOMES)
@pytest.mark.parametrize("family", ["llama-gqa", "llama-biases", "qwen2-tied", "qwen3", "gemma2", "phi3", "glm4"])
def test_dense_state_is_the_way_back(made, family, name):
    "A dense model with a candidate's weights in the dense shapes computes what the candidate computes."
    model, database = made(family)
    candidate = materialize(model, database, genome_of(database, name))
    dense = copy.deepcopy(model)
    dense.load_state_dict(dense_state(candidate, model, database.units))
    torch.testing.assert_close(logits(candidate), logits(dense), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", [
    "granite", "stablelm", "olmo", "olmo2", "nemotron", "gemma", "smollm3", "starcoder2", "cohere", "diffllama", "bitnet", "hunyuan", "seed-oss"])
def test_unusual_architectures_are_exact_or_refused(made, family):
    "An architecture that resembles Llama is either refused with a reason or pruned exactly; never silently changed."
    if not find_units(small_model(family))[0]:
        return
    model, database = made(family)
    for index, unit in enumerate(database.units):
        for level in (1, database.space.n_levels(index) - 1):
            genome = database.space.genome([level if i == index else 0 for i in range(len(database.units))])
            candidate = materialize(model, database, genome)
            torch.testing.assert_close(logits(candidate), logits(zeroed(model, database, genome)), rtol=1e-5, atol=2e-5, msg=f"{unit.name} at level {level}")
            assert n_params(candidate) == database.space.n_params(genome), f"{unit.name} at level {level}"


def generated(model, prompt, mask=None, use_cache=True) -> torch.Tensor:
    "Ten new tokens, greedily."
    mask = torch.ones_like(prompt) if mask is None else mask
    return model.generate(prompt, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=use_cache, pad_token_id=0)[:, prompt.shape[1]:]


@pytest.mark.parametrize("name", GENOMES)
@pytest.mark.parametrize("family, attention", [("llama-gqa", "sdpa"), ("llama-gqa", "eager"), ("qwen2", "sdpa"), ("qwen3", "sdpa"), ("mistral", "sdpa"), ("gemma3", "sdpa"), ("phi3", "eager")])
def test_generation_with_cache_equals_without(made, family, attention, name):
    "The key/value cache changes nothing, also for uneven heads and removed attention; nor does being smaller."
    model, database = made(family, attention=attention)
    genome = genome_of(database, name)
    candidate, prompt = materialize(model, database, genome), random_blocks(2, 12, seed=3)
    cached = generated(candidate, prompt)
    assert torch.equal(cached, generated(candidate, prompt, use_cache=False))
    assert torch.equal(cached, generated(zeroed(model, database, genome), prompt, use_cache=False))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["thin", "first attention gone", "a layer gone"])
@pytest.mark.parametrize("family, attention", [("llama-gqa", "sdpa"), ("llama-gqa", "eager"), ("mistral", "sdpa")])
def test_left_padded_prompts_generate_as_if_alone(made, family, attention, name, use_cache):
    "In a left-padded batch with an attention mask, each prompt is continued as it is on its own."
    model, database = made(family, attention=attention)
    candidate = materialize(model, database, genome_of(database, name))
    prompts, length = [random_blocks(1, n, seed=n) for n in (4, 9, 12)], 12
    batch = torch.cat([torch.cat([torch.zeros(1, length - p.shape[1], dtype=torch.long), p], 1) for p in prompts])
    together = generated(candidate, batch, (batch > 0).long(), use_cache)
    alone = torch.cat([generated(candidate, prompt, use_cache=use_cache) for prompt in prompts])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", ["thin", "first attention gone", "a layer gone"])
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma3"])
def test_generation_with_a_static_cache_and_beams(made, family, name):
    "A cache of fixed size, which is laid out before the first token, gives the same tokens; beams can be reordered in the cache."
    model, database = made(family)
    candidate, prompt = materialize(model, database, genome_of(database, name)), random_blocks(2, 12, seed=3)
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
    fixed = candidate.generate(prompt, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(fixed, candidate.generate(prompt, **options))
    assert torch.equal(candidate.generate(prompt, num_beams=3, **options), candidate.generate(prompt, num_beams=3, use_cache=False, **options))


def test_only_attention_of_one_kind_gone(made):
    "Where the first layer's kind of attention is gone altogether while another remains, transformers could not count tokens: refused, saying what to keep."
    model, database = made("gemma3")
    with pytest.raises(ValueError, match="every 'sliding_attention' block of this model is removed while others remain; keep at least one"):
        materialize(model, database, database.space.genome([database.space.n_levels(0) - 1, 0, database.space.n_levels(2) - 1, 0, 0, 0]))


def test_cache_holds_only_kept_heads(made):
    "The cache has an entry per remaining attention block, with only the key/value heads that are still read."
    model, database = made("llama-gqa")
    heads_left_one = next(level for level in range(7) if len(set((database.kept(1, level) // 3).tolist())) == 1)
    candidate = materialize(model, database, database.space.genome([6, heads_left_one, 1, 0, 0, 0]))
    with torch.no_grad():
        cache = candidate(random_blocks(1, 8), use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers if layer.is_initialized] == [1, 2]


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_scoring_candidate_shares_and_training_candidate_owns(made, family):
    "With trainable=False nothing outside pruned units is copied; otherwise no tensor is shared with the dense model. Neither changes it."
    model, database = made(family)
    before, genome = model_fingerprint(model), genome_of(database, "a layer gone")
    dense = dict(model.named_parameters(remove_duplicate=False))
    shared = dict(materialize(model, database, genome, trainable=False).named_parameters(remove_duplicate=False))
    own = dict(materialize(model, database, genome).named_parameters(remove_duplicate=False))
    pruned = tuple(unit.module for unit, level in zip(database.units, genome.levels) if level)
    assert all(parameter is dense[name] for name, parameter in shared.items() if not name.startswith(pruned))
    storages = {parameter.untyped_storage().data_ptr() for parameter in dense.values()}
    assert not storages & {parameter.untyped_storage().data_ptr() for parameter in own.values()}
    assert all(parameter.requires_grad for parameter in own.values())
    assert (own["lm_head.weight"] is own["model.embed_tokens.weight"]) == model.config.tie_word_embeddings
    assert model_fingerprint(model) == before


def test_what_is_pruned_stays_pruned_in_training(made):
    "Training moves the weights, not the shapes: removed columns stay exactly zero, and neither dense model nor database changes."
    model, database = made("llama-gqa")
    before, genome = model_fingerprint(model), genome_of(database, "thin")
    candidate, untrained = materialize(model, database, genome), materialize(model, database, genome)
    train(candidate, random_blocks(8, 16), Training(lr=1e-2))
    assert {n: p.shape for n, p in candidate.named_parameters()} == {n: p.shape for n, p in untrained.named_parameters()}
    assert not any(torch.equal(a, b) for a, b in zip(candidate.parameters(), untrained.parameters()))
    state = dense_state(candidate, model, database.units)
    for index, (unit, level) in enumerate(zip(database.units, genome.levels)):
        nonzero = state[f"{unit.output}.weight"].abs().sum(0).view(unit.n_structures, -1).sum(1).nonzero().flatten()
        assert torch.equal(nonzero, database.kept(index, level))
    assert model_fingerprint(model) == before
    assert model_fingerprint(materialize(model, database, genome)) == model_fingerprint(untrained)


def test_tiny_model(tiny, database, pools):
    "The embedded model, in its own shapes and on text, agrees with its zeroed version."
    genome = database.space.genome([0, 1, 2, 3, 4, 5, 6, 6] + [0, 3, 10, 5, 7, 9, 1, 10])
    candidate, blocks = materialize(tiny, database, genome), pools["heldout"].draw(256, seed=0)
    torch.testing.assert_close(logits(candidate, blocks), logits(zeroed(tiny, database, genome), blocks), rtol=1e-5, atol=1e-4)
    assert n_params(candidate) == database.space.n_params(genome)


@pytest.mark.parametrize("genome, message", [
    (Genome((0, 0), (0, 0)), "2 attention and 2 MLP levels, but the model has 3 and 3"), (Genome((0, 9, 0), (0, 0, 0)), "attn.01 at level 9, but its levels are 0 to 6")])
def test_genome_of_another_model_is_refused(made, genome, message):
    "A genome that does not fit says what differs."
    with pytest.raises(ValueError, match=message):
        materialize(*made("llama-gqa"), genome)
