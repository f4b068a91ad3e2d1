"""Attention in blocks is attention, and steps in only where it is plain."""
from unittest.mock import patch

import pytest
import torch
import transformers
from torch.nn import functional as F

from evoprune_nb.machine import attention
from evoprune_nb.machine.attention import IN_BLOCKS, causal_attention, faster_in_blocks, kept_probabilities, use_attention_in_blocks
from evoprune_nb.models import load_model


def outcome(function, tensors, upstream) -> list[torch.Tensor]:
    "Output and gradients."
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*inputs)
    out.backward(upstream)
    return [out.detach(), *(tensor.grad for tensor in inputs)]


def defined(query, key, value) -> torch.Tensor:
    "The definition, written out."
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return (logits.masked_fill(future, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("batch, heads, kv_heads, length, size", [(1, 1, 1, 2, 8), (3, 4, 4, 127, 16), (2, 6, 2, 128, 32), (1, 5, 5, 129, 64), (2, 4, 1, 300, 16), (1, 2, 2, 1024, 8)])
def test_output_and_gradients(batch, heads, kv_heads, length, size):
    "Any number of heads and of positions, in float64: equal to the definition."
    torch.manual_seed(0)
    tensors = [torch.randn(batch, length, n, size, dtype=torch.float64).transpose(1, 2) for n in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(batch, length, heads, size, dtype=torch.float64)
    for ours, exact in zip(outcome(causal_attention, tensors, upstream), outcome(defined, tensors, upstream)):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)  # logits are float32


def test_half_precision_is_as_exact_as_torch():
    "With logits as large as real attention has, bfloat16 gradients are no further off than those of torch's kernel."
    torch.manual_seed(0)
    tensors = [(scale * torch.randn(2, 3, 512, 64)).bfloat16() for scale in (3, 1, 1)]
    upstream = torch.randn(2, 512, 3, 64).bfloat16()
    exact = outcome(defined, [x.double() for x in tensors], upstream.double())

    def errors(function):
        return [((mine.double() - right).norm() / right.norm()).item() for mine, right in zip(outcome(function, tensors, upstream), exact)]

    ours, theirs = errors(causal_attention), errors(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))
    assert max(ours) < 1.1 * max(theirs) and ours[0] < 4e-3


def test_future_is_not_seen():
    "Changing a later token changes nothing before it, not even in the last bit."
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 200, 16)
    before = causal_attention(query, key, value)
    key[:, :, 150], value[:, :, 150] = 9.0, 9.0
    after = causal_attention(query, key, value)
    assert torch.equal(before[:, :150], after[:, :150]) and not torch.equal(before[:, 150:], after[:, 150:])


@pytest.mark.parametrize("amx", [False, True])
def test_block_sizes(monkeypatch, amx):
    "In bfloat16, processors with AMX take larger blocks: output and gradients are as near to the truth, and the probabilities kept are those planned for."
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    torch.manual_seed(0)
    exact = [torch.randn(1, 2, 300, 16, dtype=torch.float64).bfloat16().double().requires_grad_() for _ in range(3)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out = causal_attention(*rounded)
    assert sum(kept) == 3 * 2 * 300 * 16 + 2 * 300 * kept_probabilities(300, torch.bfloat16)
    assert kept_probabilities(300, torch.bfloat16) == ((256 * 256 + 44 * 300) if amx else (128 * 128 + 128 * 256 + 44 * 300)) / 300
    expected = F.scaled_dot_product_attention(*exact, is_causal=True).transpose(1, 2)
    ours, theirs = torch.autograd.grad(out.float().square().sum(), rounded), torch.autograd.grad(expected.square().sum(), exact)
    for a, b in zip([out, *ours], [expected, *theirs]):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-2


def test_memory_kept():
    "For the backward pass, inputs and as many probabilities as are planned for; without gradients nothing."
    tensors = [torch.randn(1, 2, 300, 16, requires_grad=True) for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        causal_attention(*tensors)
        assert sum(kept) == 3 * 2 * 300 * 16 + 2 * 300 * kept_probabilities(300, torch.float32)
        kept.clear()
        with torch.no_grad():
            causal_attention(*tensors)
        assert not kept
    assert not faster_in_blocks(torch.float32, 1025) and not faster_in_blocks(torch.float16, 512)


@pytest.mark.parametrize("avx512_bf16, amx, training, length, expected", [
    (True, False, True, 1024, True), (True, False, False, 1024, True), (False, False, True, 512, False),
    (True, True, True, 512, True), (True, True, True, 513, False), (True, True, False, 512, False)])
def test_processors(monkeypatch, avx512_bf16, amx, training, length, expected):
    "bfloat16 goes in blocks where the processor multiplies it; where it multiplies tiles, in training steps alone. float32 does everywhere."
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert faster_in_blocks(torch.bfloat16, length, training) == expected and faster_in_blocks(torch.float32, length, training)
    model, _ = load_model("tiny", dtype="bfloat16")
    with patch.object(attention, "causal_attention", wraps=causal_attention) as ours, torch.set_grad_enabled(training):
        model(torch.zeros(1, length, dtype=torch.long))
    assert bool(ours.call_count) == expected


def calls(model, tokens, **options) -> tuple[int, torch.Tensor]:
    "How many layers' attention was done in blocks, and the logits."
    with torch.no_grad(), patch.object(attention, "causal_attention", wraps=causal_attention) as ours:
        logits = model(tokens, **options).logits
    return ours.call_count, logits


@pytest.mark.parametrize("config, options, length, expected", [
    (transformers.LlamaConfig(num_key_value_heads=2), {}, 40, 2),
    (transformers.LlamaConfig(num_key_value_heads=2), {"attention_mask": torch.tensor([[0] * 5 + [1] * 35] * 2)}, 40, 0),
    (transformers.MistralConfig(num_key_value_heads=2, sliding_window=64), {}, 40, 2),
    (transformers.MistralConfig(num_key_value_heads=2, sliding_window=16), {}, 40, 0),
    (transformers.Qwen3Config(num_key_value_heads=2, head_dim=16), {}, 1, 0)])
def test_where_it_steps_in(config, options, length, expected):
    "Plain causal attention is done in blocks; padding, windows and single tokens are left to torch, with the same logits either way."
    torch.manual_seed(0)
    for name, value in dict(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4).items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    tokens = torch.randint(1, 100, (2, length))
    none, usual = calls(model, tokens, **options)
    use_attention_in_blocks(model)
    some, logits = calls(model, tokens, **options)
    assert (none, some) == (0, expected)
    torch.testing.assert_close(logits, usual, rtol=1e-4, atol=1e-5)


def test_mixed_precision():
    "Under autocast, gradients are those of the attention in bfloat16, as with torch's kernel; they go to the backward pass in float32 weights."
    model, _ = load_model("tiny")
    tokens, gradients = torch.randint(0, 100, (2, 64)), {}
    for name in ("sdpa", IN_BLOCKS):
        model.set_attn_implementation(name)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        gradients[name] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert gradients[IN_BLOCKS].dtype == torch.float32
    assert (gradients["sdpa"] - gradients[IN_BLOCKS]).norm() < 0.05 * gradients["sdpa"].norm()


def test_the_choice_is_the_callers(tmp_path):
    "`load_model` takes transformers' flag; what was asked for stays; what is saved names no attention of ours."
    asked, _ = load_model("tiny", attn_implementation="eager")
    default, _ = load_model("tiny")
    use_attention_in_blocks(asked)
    assert asked.config._attn_implementation == "eager" and default.config._attn_implementation == IN_BLOCKS
    default.save_pretrained(tmp_path)
    assert IN_BLOCKS not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
