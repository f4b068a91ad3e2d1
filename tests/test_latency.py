"""Measurements measure what they say: turns, warm-up, phases, bytes. No test looks at a clock."""
import gc

import pytest
import torch
from helpers import small_model
from hypothesis import given
from hypothesis import strategies as st

from evoprune_nb.candidates import materialize
from evoprune_nb.judge.latency import Ratio, Timing, compare_latency, kv_cache_bytes, measure_latency, peak_memory, quartiles, speedup, time_each, weight_bytes

positive = st.floats(1e-6, 1e3)


@given(st.lists(positive, min_size=1, max_size=30))
def test_median_and_quartiles_enclose_the_middle_half(seconds):
    "Half of the measurements (up to the interpolation at both ends) lie between the quartiles, the median too; one measurement is its own spread."
    timing = Timing(tuple(seconds))
    low, high = timing.quartiles
    assert low <= timing.median <= high and min(seconds) <= low and high <= max(seconds)
    assert sum(low <= value <= high for value in seconds) * 2 >= len(seconds) - 2
    assert len(seconds) > 1 or (low, high) == (seconds[0], seconds[0])


def test_quartiles_by_hand():
    "Interpolated between the values, ends included."
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0) and quartiles([0.0, 1.0]) == (0.25, 0.75)
    assert str(Timing((0.001, 0.002, 0.003))) == "2 ms (1.5–2.5)" and str(Timing((2.0,))) == "2 s (2–2)"


def test_actions_take_turns_and_warm_up_is_not_counted():
    "A B A B …, warm-up included; only the timed turns are returned; the garbage collector rests and works again afterwards."
    calls, collecting = [], []
    actions = {name: lambda name=name: (calls.append(name), collecting.append(gc.isenabled())) for name in "AB"}
    timings = time_each(actions, warmup=2, repeats=3)
    assert calls == ["A", "B"] * 5 and not any(collecting) and gc.isenabled()
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"A": 3, "B": 3}


def test_garbage_collector_returns_after_an_error():
    "An action that fails leaves the garbage collector as it was."
    with pytest.raises(ZeroDivisionError):
        time_each({"A": lambda: 1 / 0})
    assert gc.isenabled()


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20))
def test_speedup_is_the_median_of_ratios_within_turns(pairs):
    "A drift that changes both by the same factor changes nothing."
    before, after = (Timing(tuple(column)) for column in zip(*pairs))
    drift = [2.0**turn for turn in range(len(pairs))]
    drifted = (Timing(tuple(value * factor for value, factor in zip(timing.seconds, drift))) for timing in (before, after))
    ratio = speedup(before, after)
    assert ratio.low <= ratio.median <= ratio.high
    drifting = speedup(*drifted)
    assert (drifting.median, drifting.low, drifting.high) == pytest.approx((ratio.median, ratio.low, ratio.high))


def test_speedup_needs_the_same_turns():
    with pytest.raises(ValueError, match="same turns; got 2 and 1 repeats"):
        speedup(Timing((1.0, 2.0)), Timing((1.0,)))
    assert speedup(Timing((4.0, 4.0)), Timing((2.0, 1.0))) == Ratio(3.0, 2.5, 3.5)


def recorded(model) -> list[torch.Tensor]:
    "A list to which every forward pass appends its input tokens."
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True)
    return seen


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "qwen3"])
def test_prefill_reads_the_prompt_and_decode_writes_greedily(family):
    "Each turn is one pass over the whole prompt, then one pass per new token; the tokens are those that `generate` writes with its cache."
    model = small_model(family).train()
    seen = recorded(model)
    latency = measure_latency(model, batch_size=2, prompt_tokens=12, new_tokens=5, warmup=1, repeats=2)
    assert [tuple(tokens.shape) for tokens in seen] == ([(2, 12)] + [(2, 1)] * 5) * 3 and model.training
    expected = model.eval().generate(seen[0], attention_mask=torch.ones_like(seen[0]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.cat(seen[:6], 1), expected[:, :17])
    assert len(latency.prefill.seconds) == len(latency.decode.seconds) == 2
    assert (latency.batch_size, latency.prompt_tokens, latency.new_tokens, latency.device, latency.dtype) == (2, 12, 5, "cpu", "float32")
    row = latency.to_dict()
    assert row["prefill_tokens_per_second"] == 24 / row["prefill_median"] and row["decode_tokens_per_second"] == 10 / row["decode_median"]


def test_models_to_compare_take_turns():
    "Warm-up and timed turns alternate between the models."
    models, order = {"a": small_model("llama-gqa"), "b": small_model("llama-mha")}, []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *args, name=name: order.append(name))
    assert set(compare_latency(models, prompt_tokens=4, new_tokens=1, warmup=1, repeats=2)) == {"a", "b"}
    assert order == ["a", "a", "b", "b"] * 3


@pytest.mark.parametrize(("conditions", "message"), [
    ({"repeats": 0}, "repeats must be a whole number of at least 1; got 0"),
    ({"warmup": -1}, "warmup must be a whole number of at least 0; got -1"),
    ({"new_tokens": 2.5}, "new_tokens must be a whole number of at least 1; got 2.5"),
    ({"prompt_tokens": 120, "new_tokens": 9}, "reads at most 128 tokens; prompt_tokens \\+ new_tokens is 129")])
def test_impossible_conditions_are_refused_before_any_work(conditions, message):
    model = small_model("llama-gqa")
    seen = recorded(model)
    with pytest.raises(ValueError, match=message):
        measure_latency(model, **conditions)
    assert seen == []


def test_models_on_two_devices_are_not_compared():
    with pytest.raises(ValueError, match="must be on one device; got cpu, meta"):
        compare_latency({"a": small_model("llama-gqa"), "b": small_model("llama-gqa").to("meta")})
    with pytest.raises(ValueError, match="got no model"):
        compare_latency({})


@pytest.mark.parametrize(("family", "n_kv", "size"), [("llama-mha", 6, 8), ("llama-gqa", 2, 8), ("qwen3", 2, 16)])
def test_cache_bytes_are_the_formula(family, n_kv, size):
    "Keys and values of every layer, head and token, in the dtype of the model."
    assert kv_cache_bytes(small_model(family), 20, batch_size=3) == 2 * 3 * n_kv * size * 20 * 3 * 4
    assert kv_cache_bytes(small_model(family).bfloat16(), 20) == 2 * 3 * n_kv * size * 20 * 2


def test_cache_of_a_sliding_window_stops_growing():
    model = small_model("mistral")  # a window of 8 tokens
    assert kv_cache_bytes(model, 4) < kv_cache_bytes(model, 40) == kv_cache_bytes(model, 80)


def test_cache_of_a_candidate_holds_what_is_left(small):
    "A missing attention block has no cache; key/value heads that no query head reads are gone."
    model, database = small
    space = database.space
    levels = [space.n_levels(0) - 1, 0, 2, 0, 0, 0]
    candidate = materialize(model, database, space.genome(levels))
    left = sum(layer.self_attn.k_proj.out_features for layer in candidate.model.layers if layer.self_attn is not None)
    assert kv_cache_bytes(candidate, 10) == 2 * 10 * left * 4 and left < 3 * 2 * 8


def test_tied_weights_are_counted_once():
    tied, untied = small_model("llama-tied"), small_model("llama-gqa")
    assert weight_bytes(untied) - weight_bytes(tied) == untied.lm_head.weight.numel() * 4
    assert weight_bytes(untied.bfloat16()) < 0.51 * weight_bytes(small_model("llama-gqa"))


@pytest.fixture(scope="module")
def heavy(tmp_path_factory, tokenizer):
    "A checkpoint of some 60 MB."
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, vocab_size=len(tokenizer)))
    directory = tmp_path_factory.mktemp("heavy")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory, weight_bytes(model)


def test_peak_memory_is_that_of_the_model(heavy):
    "A fresh process needs at least the weights, and not several times as much; a long prompt with many sequences needs more."
    directory, n_bytes = heavy
    short, long = peak_memory(directory, prompt_tokens=8, new_tokens=1), peak_memory(directory, batch_size=8, prompt_tokens=1024, new_tokens=1)
    assert n_bytes <= short.host <= 2.5 * n_bytes and short.device is None and short.host_loading <= short.host
    assert long.host > short.host + 8 * 1024 * 1536 * 4


def test_peak_memory_passes_the_other_process_error_on(tmp_path):
    with pytest.raises(RuntimeError, match="could not measure the memory of .*no such directory"):
        peak_memory(tmp_path / "missing")
    with pytest.raises(ValueError, match="new_tokens must be"):
        peak_memory("tiny", new_tokens=0)
