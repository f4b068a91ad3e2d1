"""A GGUF file holds exactly the candidate's weights, and llama.cpp computes from it what transformers computes."""
import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from helpers import FAMILIES, SMALL, random_blocks, small_model
from safetensors.torch import load_file, save_file

from evoprune_nb.candidates import materialize
from evoprune_nb.ship.cards import Card
from evoprune_nb.ship.export import export_hf, load_exported
from evoprune_nb.ship.gguf import PLACEHOLDER, context_length, deci_layers, export_gguf, stored_types
from evoprune_nb.database import build_database

TOP = -1  # the unit's last level, at which all of it is gone
GENOMES = {  # name → levels of the three attention units and the three MLPs
    "dense": [0, 0, 0, 0, 0, 0],
    "thin": [1, 1, 0, 3, 5, 9],
    "first attention gone": [TOP, 1, 1, 0, 2, 4],
    "second attention gone": [1, TOP, 1, 5, 2, 5],
    "an MLP gone": [1, 0, 1, 5, TOP, 5],
    "the last MLP gone": [1, 0, 1, 5, 3, TOP],
    "a layer gone": [1, TOP, 1, 5, TOP, 5],
    "all attention gone": [TOP, TOP, TOP, 1, 2, 3],
}
HEADS = {"llama-mha": "free", "llama-gqa": "query", "llama-tied": "group", "llama-rope": "query", "llama-biases": "group", "qwen2": "query", "mistral": "group"}
CASES = [(family, name) for family in HEADS for name in (GENOMES if family in ("llama-gqa", "qwen2") else ("thin", "first attention gone", "an MLP gone"))]
TEXTS = ["Hello, world! It's 1234 o'clock.", "  two  spaces\n\nand lines\t", "Don't WE'LL naïve café 3.14159", "the cat sat on the mat and the dog ate 12 apples"]

RUN = """
import json, pathlib, sys
import numpy as np
import cyllama.llama.llama_cpp as llama
from safetensors.numpy import load_file, save_file

class Model(llama.LlamaModel):
    n_vocab = property(lambda self: self.get_vocab().n_vocab)  # which this wheel's context asks the model for

def logits(model, tokens):
    options = llama.LlamaContextParams()
    options.n_ctx, options.n_threads, options.n_threads_batch = 128, 1, 1
    options.flash_attn_type = options.type_k = options.type_v = 0  # keys and values in float32
    context = llama.LlamaContext(model, options)
    for position, token in enumerate(tokens):
        batch = llama.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)
        batch.add(int(token), position, [0], True)
        context.decode(batch)
        yield np.array(context.get_logits(), dtype=np.float32)

llama.set_log_callback(lambda level, text: None)
for case in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    model = Model(str(case / "out" / "model.gguf"), llama.LlamaModelParams())
    if (case / "texts.json").exists():
        vocabulary = model.get_vocab()
        found = [vocabulary.tokenize(text, True, True) for text in json.loads((case / "texts.json").read_text())]
        (case / "tokens.json").write_text(json.dumps([list(map(int, tokens)) for tokens in found]))
    if (case / "blocks.safetensors").exists():
        blocks = load_file(case / "blocks.safetensors")["blocks"]
        save_file({"logits": np.stack([np.stack(list(logits(model, block))) for block in blocks])}, case / "found.safetensors")
"""


def llama_cpp(root) -> None:
    "Run llama.cpp, in another process, over every case in a directory."
    done = subprocess.run([sys.executable, "-c", RUN, str(root)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A function: family, genome name, heads → candidate; databases are made once."
    known = {}

    def make(family, name, heads=None):
        heads = heads or HEADS.get(family, "free")
        if (family, heads) not in known:
            model = small_model(family)
            known[family, heads] = model, build_database(model, random_blocks(), tmp_path_factory.mktemp("database"), heads, progress=False)
        model, database = known[family, heads]
        return materialize(model, database, database.space.genome([range(database.space.n_levels(unit))[level] for unit, level in enumerate(GENOMES[name])]))

    return make


@pytest.fixture(scope="module")
def found(made, tmp_path_factory):
    "Logits of llama.cpp, (2, 16, vocabulary), for every case."
    root = tmp_path_factory.mktemp("gguf")
    for family, name in CASES:
        case = root / f"{family}, {name}"
        export_gguf(made(family, name), None, case / "out")
        save_file({"blocks": random_blocks(2, 16, seed=5)}, case / "blocks.safetensors")
    llama_cpp(root)
    return {case.name: load_file(case / "found.safetensors")["logits"] for case in root.iterdir()}


@pytest.mark.parametrize("family, name", CASES)
def test_llama_cpp_computes_what_transformers_computes(found, made, family, name):
    "To float32 rounding: every shape, missing sublayers, scaled rotary embeddings, biases, tied embeddings. The sliding window of Mistral starts beyond the file's context."
    candidate, blocks = made(family, name), random_blocks(2, 16, seed=5)
    length = min(16, context_length(candidate))
    with torch.no_grad():
        wanted = candidate(blocks).logits
    torch.testing.assert_close(found[f"{family}, {name}"][:, :length], wanted[:, :length], rtol=1e-4, atol=5e-5)


def rows_of(matrix: np.ndarray, size: int) -> np.ndarray:
    "The obvious way back from llama.cpp's order of a head's rows to transformers': even rows, then odd rows."
    heads = [matrix[start : start + size] for start in range(0, len(matrix), size)]
    return np.concatenate([np.concatenate([head[0::2], head[1::2]]) for head in heads])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_reads_back(made, tmp_path, dtype):
    "Tensor by tensor, in the dtype asked for, nothing missing and nothing more; zeros only where a placeholder is due."
    candidate = made("llama-biases", "an MLP gone")
    reader = gguf.GGUFReader(export_gguf(candidate, None, tmp_path / "out", dtype=dtype))
    stored = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    seen = set()
    for name, tensor in candidate.state_dict().items():
        if name in top:
            target = top[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            part, _, kind = rest.rpartition(".")
            target = f"blk.{layer}.{names[part]}.{kind}"
        array = rows_of(stored[target], 8) if "attn_q." in target or "attn_k." in target else stored[target]
        wanted = tensor if tensor.ndim == 1 else tensor.to(getattr(torch, dtype)).float()
        assert np.array_equal(array, wanted.numpy()), target
        assert kinds[target] == ("F32" if tensor.ndim == 1 else {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype])
        seen.add(target)
    assert set(stored) - seen == {f"blk.1.ffn_{part}.weight" for part in ("norm", "gate", "up", "down")} and not any(stored[name].any() for name in set(stored) - seen)


def test_metadata_says_what_differs_by_layer(made, tmp_path):
    "Head counts and widths are lists; a wholly removed layer is left out; placeholders stand where llama.cpp needs them."
    reader = gguf.GGUFReader(export_gguf(made("llama-gqa", "a layer gone"), None, tmp_path / "out", Card(base_model="small", license="apache-2.0")))
    field = {name: field.contents() for name, field in reader.fields.items()}
    assert field["general.architecture"] == "deci" and field["deci.block_count"] == 2 and field["general.license"] == "apache-2.0"
    assert field["deci.attention.head_count"] == [4, 4] and field["deci.attention.head_count_kv"] == [2, 2] and field["deci.feed_forward_length"] == [40, 40]
    rows = deci_layers(made("llama-gqa", "first attention gone"))
    assert (rows[0].n_heads, rows[0].n_kv_heads) == (1, 1) and deci_layers(made("llama-gqa", "second attention gone"))[1].n_heads == 0
    assert deci_layers(made("llama-gqa", "an MLP gone"))[1].width == PLACEHOLDER
    assert "\nlicense: apache-2.0\n" in (tmp_path / "out" / "README.md").read_text()


def test_commands_that_need_a_checkpoint_say_so_of_a_gguf_file(made, tmp_path):
    "Evaluation and post-training of a GGUF directory point to what it was made from."
    export_gguf(made("llama-gqa", "thin"), None, tmp_path / "out")
    with pytest.raises(ValueError, match="no config.json; a GGUF file is for llama.cpp, so give the run or checkpoint that it was made from"):
        load_exported(tmp_path / "out")


def test_a_sliding_window_bounds_the_context(made, tmp_path):
    "deci has no sliding window: the file claims no more context than computes the same."
    assert context_length(made("mistral", "thin")) == 8 and context_length(made("llama-gqa", "thin")) == 128
    reader = gguf.GGUFReader(export_gguf(made("mistral", "thin"), None, tmp_path / "out"))
    assert reader.fields["deci.context_length"].contents() == 8


@pytest.mark.parametrize("family, message", [
    ("qwen3", "holds llama, mistral, qwen2, not Qwen3ForCausalLM; use --format hf, or --format padded"),
    ("gemma2", "not Gemma2ForCausalLM"), ("phi3", "not Phi3ForCausalLM"),
    ("llama-gqa", r"layer 0 has key/value groups of (2, 3|3, 2) query heads, but GGUF's deci architecture holds groups of one size only.*heads='query' or 'group'.*--format hf.*--pad-heads"),
])
def test_what_does_not_fit_is_refused(made, tmp_path, family, message):
    "Families and free heads that deci cannot hold are refused with what to do instead, before anything is written."
    with pytest.raises(ValueError, match=message):
        export_gguf(made(family, "thin", "free"), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, message", [(dict(hidden_act="gelu"), "silu, not gelu"), (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)), "type 'yarn' cannot be written")])
def test_other_functions_are_refused(tmp_path, change, message):
    "A Llama with another activation or an unknown rotary scaling is refused."
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | change))
    with pytest.raises(ValueError, match=message):
        export_gguf(model, None, tmp_path / "out")


def test_free_heads_with_zero_heads(made, tmp_path):
    "pad_heads fills every group of a layer up to that layer's largest, and llama.cpp computes the same."
    candidate, blocks = made("llama-gqa", "thin", "free"), random_blocks(1, 8, seed=5)
    export_gguf(candidate, None, tmp_path / "root" / "case" / "out", pad_heads=True)
    save_file({"blocks": blocks}, tmp_path / "root" / "case" / "blocks.safetensors")
    llama_cpp(tmp_path / "root")
    with torch.no_grad():
        torch.testing.assert_close(load_file(tmp_path / "root" / "case" / "found.safetensors")["logits"], candidate(blocks).logits, rtol=1e-4, atol=5e-5)


def byte_level(pre_tokenizer, corpus: list[str]) -> transformers.PreTrainedTokenizerFast:
    "A small byte-level BPE tokenizer with that splitter."
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizer, tokenizers.decoders.ByteLevel()
    raw.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")


def sentencepiece_like(corpus: list[str]) -> transformers.PreTrainedTokenizerFast:
    "A small BPE tokenizer with byte fallback, as Llama 2 has."
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    words = [word for text in corpus for word in ("▁" + text.replace(" ", " ▁")).split(" ")]
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.train_from_iterator([" ".join(words)], tokenizers.trainers.BpeTrainer(vocab_size=200, show_progress=False))
    trained = json.loads(raw.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = special + sorted((piece for piece in trained["vocab"]), key=trained["vocab"].get)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in trained["merges"]]
    raw.model = tokenizers.models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    raw.normalizer, raw.pre_tokenizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]), None
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def test_llama_cpp_tokenizes_alike(tokenizer, corpus, tmp_path):
    "The tiny model's tokenizer, and small ones of the kinds of SmolLM2, Llama 3, Qwen2 and Llama 2: same tokens, special ones included."
    pre, texts = tokenizers.pre_tokenizers, [json.loads(line)["text"] for line in corpus.read_text().splitlines()][:40]
    split = {name: pre.Sequence([pre.Split(tokenizers.Regex(WORDS % digits), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]) for name, digits in (("llama3", "{1,3}"), ("qwen2", ""))}
    kinds = {"tiny": tokenizer, "smollm": byte_level(pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]), texts),
             **{name: byte_level(splitter, texts) for name, splitter in split.items()}, "llama2": sentencepiece_like(texts)}
    wanted = {}
    for name, kind in kinds.items():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | dict(vocab_size=len(kind) + 5, num_hidden_layers=1)))
        export_gguf(model, kind, tmp_path / name / "out")
        examples = [*TEXTS, *(text[:200] for text in texts[:10]), f"a{kind.eos_token}b"]
        (tmp_path / name / "texts.json").write_text(json.dumps(examples))
        wanted[name] = [kind(text)["input_ids"] for text in examples]
    llama_cpp(tmp_path)
    for name in kinds:
        assert json.loads((tmp_path / name / "tokens.json").read_text()) == wanted[name], name


@pytest.mark.parametrize("raw, message", [
    (tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})), "is of type WordLevel; GGUF export knows BPE"), (tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])), "splits text by a rule that has no name here")])
def test_unknown_tokenizers_are_refused(made, tmp_path, raw, message):
    "A tokenizer that llama.cpp would imitate wrongly is refused, and nothing is left."
    with pytest.raises(ValueError, match=message):
        export_gguf(made("llama-gqa", "dense"), transformers.PreTrainedTokenizerFast(tokenizer_object=raw), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_reloaded_export_speaks_as_transformers_does(tiny, tokenizer, tmp_path_factory, pools, tmp_path):
    "The embedded model, pruned by groups, through an exported directory: llama.cpp has the perplexity that transformers has on held-out text, and continues greedily with the same tokens."
    database = build_database(tiny, pools["calibration"].draw(2048, seed=0), tmp_path_factory.mktemp("groups"), "group", progress=False)
    candidate = materialize(tiny, database, database.space.genome([0, 1, 0, 2, 1, 0, 1, 1] + [5, 3, 10, 5, 7, 2, 4, 3]))
    export_hf(candidate, tokenizer, tmp_path / "pruned")
    reloaded, _ = load_exported(tmp_path / "pruned")
    prompt = pools["heldout"].draw(64, seed=0)
    continued = candidate.generate(prompt[:, :8], attention_mask=torch.ones_like(prompt[:, :8]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    case = tmp_path / "root" / "case"
    export_gguf(reloaded, tokenizer, case / "out")
    save_file({"blocks": torch.cat([prompt[:, : continued.shape[1]], continued])}, case / "blocks.safetensors")
    llama_cpp(tmp_path / "root")
    text, greedy = load_file(case / "found.safetensors")["logits"]
    assert torch.equal(greedy[7:-1].argmax(-1), continued[0, 8:])
    with torch.no_grad():
        nats = candidate(prompt[:, : continued.shape[1]], labels=prompt[:, : continued.shape[1]]).loss.item()
    assert torch.nn.functional.cross_entropy(text[:-1], prompt[0, 1 : len(text)]).item() == pytest.approx(nats, rel=1e-4)


def test_all_families_are_either_held_or_refused(tmp_path):
    "Every family of the test suite is exported or refused with a reason; none crashes halfway."
    for family in FAMILIES:
        try:
            export_gguf(small_model(family), None, tmp_path / family)
        except ValueError as error:
            assert "GGUF's deci architecture" in str(error) and not (tmp_path / family).exists()


@pytest.mark.parametrize("dtype, worst", [("q8_0", 0.01), ("q5_0", 0.08), ("q4_0", 0.15)])
def test_quantised_types_are_near_the_weights(tmp_path, dtype, worst):
    "Matrices are stored in the type, to its error; llama.cpp reads the file; its type says so."
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | dict(hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=96)))
    reader = gguf.GGUFReader(export_gguf(model, None, tmp_path / "out", dtype=dtype))
    stored = {tensor.name: tensor for tensor in reader.tensors}["blk.0.ffn_down.weight"]
    wanted = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    error = np.abs(gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(wanted.shape) - wanted).max() / np.abs(wanted).max()
    assert stored.tensor_type.name.lower() == dtype and 0 < error < worst


def test_widths_that_are_no_blocks_are_refused(made, tmp_path):
    "With the tensor, its width, and the setting of the level database that would do."
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match=r"multiple of 32 numbers, not .*\(48\).*multiple=32"):
        export_gguf(model, None, tmp_path / "out", dtype="q8_0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype, wanted, worst", [("q8_0", "Q8_0", 0.02), ("q4_k_m", "Q4_K", 0.3), ("q6_k", "Q6_K", 0.1)])
def test_llama_cpp_reads_quantised_files(tmp_path, dtype, wanted, worst):
    "K types where rows hold whole blocks of 256, types with smaller blocks elsewhere; the card says how many; logits are near those of the weights. A missing sublayer is no obstacle."
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | dict(hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=512, num_hidden_layers=4))).eval()
    database = build_database(model, random_blocks(), tmp_path / "database", "query", multiple=256, progress=False)
    candidate = materialize(model, database, database.space.genome([0, TOP % database.space.n_levels(1), 0, 0, 1, 0, 1, 0]))
    case, blocks = tmp_path / "root" / "case", random_blocks(1, 16, seed=5)
    kinds = stored_types(export_gguf(candidate, None, case / "out", dtype=dtype))
    assert wanted in kinds and not {"F32", "F16"} & set(kinds) and f"{kinds[wanted]} {wanted}" in (case / "out" / "README.md").read_text()
    save_file({"blocks": blocks}, case / "blocks.safetensors")
    llama_cpp(tmp_path / "root")
    with torch.no_grad():
        exact = candidate(blocks).logits
    assert (load_file(case / "found.safetensors")["logits"] - exact).abs().mean() < worst * exact.std()


def test_k_types_need_llama_cpp(made, tmp_path, monkeypatch):
    "Without its wheel, the error names the extra, and nothing is written."
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | dict(hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=96)))
    monkeypatch.setattr("evoprune_nb.ship.gguf.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"evoprune-nb\[llama\].*llama-quantize"):
        export_gguf(model, None, tmp_path / "out", dtype="q4_k_m")
    assert not (tmp_path / "out").exists()
