"""Small models with random weights, random search spaces, and short runs."""
import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import tokenizers
import torch
import transformers
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from evoprune_nb.data import TokenPool, derive_seed
from evoprune_nb.genome import HEAD_MODES, Genome, Space, level_grid
from evoprune_nb.models import Unit
from evoprune_nb.search import SearchConfig
from evoprune_nb.selection import Evaluation, OneByOne, Stage
from evoprune_nb.target import Target
from evoprune_nb.training import Training

VOCABULARY = 100
SMALL = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, vocab_size=VOCABULARY,
    max_position_embeddings=128, bos_token_id=0, pad_token_id=0, eos_token_id=None)
FAMILIES = {  # name → configuration class, what differs from SMALL
    "llama-mha": ("LlamaConfig", dict(num_key_value_heads=6)),
    "llama-gqa": ("LlamaConfig", {}),
    "llama-biases": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "llama-tied": ("LlamaConfig", dict(tie_word_embeddings=True)),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=False)),
    "qwen2-tied": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "mistral": ("MistralConfig", dict(sliding_window=8)),
    "llama-rope": ("LlamaConfig", dict(tie_word_embeddings=True, rope_parameters=dict(
        rope_type="llama3", rope_theta=10_000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32))),  # as Llama 3.1 and 3.2
    "qwen2-mixed": ("Qwen2Config", dict(layer_types=["full_attention", "sliding_attention", "full_attention"], use_sliding_window=True, sliding_window=8)),
    "gemma": ("GemmaConfig", dict(head_dim=8)),
    "gemma2": ("Gemma2Config", dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=8)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "phi3": ("Phi3Config", dict(sliding_window=None)),
    "glm4": ("Glm4Config", dict(head_dim=8, attention_bias=True)),
    "exaone4": ("Exaone4Config", dict(sliding_window=None, layer_types=3 * ["full_attention"])),
    "granite": ("GraniteConfig", dict(residual_multiplier=0.3, logits_scaling=2.0)),
    "stablelm": ("StableLmConfig", dict(use_parallel_residual=True)),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "nemotron": ("NemotronConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "cohere": ("CohereConfig", {}),
    "diffllama": ("DiffLlamaConfig", {}),
    "bitnet": ("BitNetConfig", {}),
    "hunyuan": ("HunYuanDenseV1Config", dict(head_dim=8)),
    "seed-oss": ("SeedOssConfig", dict(head_dim=8)),
}


def small_model(family: str, seed: int = 0, attention: str | None = None) -> nn.Module:
    "A random model of a family; weights, biases and norms are all far from their usual initial values."
    kind, options = FAMILIES[family]
    config = getattr(transformers, kind)(**SMALL | options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else parameter + 0.2 * noise)
    return model


def random_blocks(n_blocks: int = 16, seq_len: int = 32, seed: int = 0) -> torch.Tensor:
    "Random tokens, (n_blocks, seq_len)."
    return torch.randint(1, VOCABULARY, (n_blocks, seq_len), generator=torch.Generator().manual_seed(seed))


BOS, EOS = 1, 2
TEMPLATES = {"bos": "<s> $A", "bos and eos": "<s> $A </s>", "eos": "$A </s>", "none": "$A"}  # kind of tokenizer → what it puts around a text
WORDS = [f"w{i}" for i in range(3, VOCABULARY)]


def word_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    "A tokenizer of the small models: one token per word, and around a text what that kind adds."
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.post_processor = tokenizers.processors.TemplateProcessing(single=TEMPLATES[kind], special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@st.composite
def spaces(draw) -> Space:
    "A space of a made-up model, with parameters, FLOPs and cache proportional to what is kept."
    n_layers = draw(st.integers(2, 6))
    group, n_kv_heads, n_channels = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(10, 400))
    heads = draw(st.sampled_from(HEAD_MODES))
    units = [Unit(layer, "attn", f"{layer}.attn", f"{layer}.norm", group * n_kv_heads, 8, n_kv_heads) for layer in range(n_layers)]
    units += [Unit(layer, "mlp", f"{layer}.mlp", f"{layer}.norm2", n_channels, 1) for layer in range(n_layers)]
    removed = level_grid(units, heads, draw(st.integers(2, 12)))
    kept = [[unit.n_structures - k for k in levels] for unit, levels in zip(units, removed)]
    kv_kept = tuple(tuple(-(-k // group) if unit.kind == "attn" else 0 for k in levels) for unit, levels in zip(units, kept))
    cost = lambda per_structure: tuple(tuple(k * per_structure(unit) for k in levels) for unit, levels in zip(units, kept))
    costs = {
        "params": cost(lambda unit: 64 * unit.structure_size), "flops": cost(lambda unit: (200 if unit.kind == "attn" else 128) * unit.structure_size),
        "kv_bytes": tuple(tuple(32 * kv for kv in levels) for levels in kv_kept)}
    fixed = {"params": draw(st.integers(0, 10_000)), "flops": draw(st.integers(0, 10_000)), "kv_bytes": 0}
    return Space(tuple(units), removed, costs, fixed, "made-up", kv_kept)


def small_pools(seq_len: int = 16) -> dict[str, TokenPool]:
    "Pools of random tokens for the small models, 64 blocks each."
    return {split: TokenPool(split, random_blocks(64, seq_len, seed).int()) for seed, split in enumerate(("tuning", "scoring", "heldout"))}


def short_config(**changes) -> SearchConfig:
    "A search of seconds on a small model: 3 generations of 4 offspring in two stages, the second with tuning. Fields of `Target` are taken by their names."
    size = {"sparsity": 0.5} if not changes.keys() & {"params", "limits", "target"} else {}
    size |= {"tolerance": 0.1} | {field.name: changes.pop(field.name) for field in fields(Target) if field.name in changes}
    defaults = dict(generations=3, offspring=4, stages=(Stage(2, 0, 32), Stage(1, 64, 48)), training=Training(lr=1e-3, batch_size=2))
    return SearchConfig(**{"target": Target(**size)} | defaults | changes)


def made_up(genome: Genome, generation: int, stage: int) -> Evaluation:
    "An evaluation that costs nothing and depends on its arguments alone; one in eight is disqualified."
    luck = derive_seed(genome.code, generation, stage)
    fitness, why = (math.inf, "bad luck") if luck % 8 == 0 else (luck / 2**63, "")
    return Evaluation(generation, stage, genome.code, fitness, None, 0, 16, 0.0, why)


def by(evaluate):
    "A factory, as `Search` takes it, of an evaluator that calls a function for each candidate."
    return lambda rules, seed: OneByOne(evaluate)


def events(run_dir: Path) -> list[dict]:
    "The log of a run without what may differ between equal runs."
    rows = [json.loads(line) for line in (Path(run_dir) / "events.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("time", "seconds", "crc")} for row in rows]


def peak_of_tensors(action) -> int:
    "Largest number of bytes in tensors that an action allocates."
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@contextmanager
def unchanged_below(folder: Path) -> Iterator[None]:
    "No file or folder below appears, goes or changes; the file of a lock may come, and stays."
    def seen() -> dict[Path, tuple[int, int] | None]:
        paths = [path for path in folder.rglob("*") if path.name not in ("writer.lock", "queue.lock")]
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None for path in paths}

    before = seen()
    yield
    after = seen()
    assert after == before, {path for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0)}
