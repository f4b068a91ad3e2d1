"""Training computes what it says, resumes exactly, and reports what went wrong."""
import copy

import pytest
import torch
import transformers
from helpers import FAMILIES, VOCABULARY, peak_of_tensors, random_blocks, small_model
from torch import nn

from evoprune_nb import training
from evoprune_nb.machine import portions
from evoprune_nb.data import TokenPool
from evoprune_nb.training import MasterOptimizer, Training, post_train, train
from evoprune_nb.losses import head_is_linear, next_token_loss


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.startswith(("llama", "qwen", "mistral"))])
def test_loss_is_that_of_transformers(family):
    "Mean and sum of the next-token loss agree with transformers' own, for every architecture."
    model, blocks = small_model(family), random_blocks(3, 20)
    with torch.no_grad():
        expected = model(input_ids=blocks, labels=blocks).loss
        torch.testing.assert_close(next_token_loss(model, blocks), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(next_token_loss(model, blocks, "sum"), expected * 3 * 19, rtol=1e-5, atol=1e-4)


def test_loss_on_text(tiny, pools):
    "The same on the embedded model and text."
    blocks = pools["heldout"].draw(512, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(tiny, blocks), tiny(input_ids=blocks, labels=blocks).loss, rtol=1e-5, atol=1e-5)


def test_scaled_heads_are_recognised():
    "Where logits are not simply head(hidden), as with Granite's scaling, head_is_linear says so."
    assert head_is_linear(small_model("llama-tied")) and not head_is_linear(small_model("granite"))
    with pytest.raises(ValueError, match="Granite.* scales or caps its logits"):
        train(small_model("granite"), random_blocks())


def test_blocks_are_seen_once_in_order():
    "One pass over the given blocks, in order: losses and tokens are those of the batches, the first loss that of the untouched model."
    model, blocks = small_model("llama-gqa"), random_blocks(7, 10)
    first = next_token_loss(model, blocks[:3]).item()
    result = train(model, blocks, Training(batch_size=3))
    assert result.losses[0] == first and len(result.losses) == 3 and result.tokens == 70 and result.finite


def plain_training(model, blocks, settings) -> None:
    "Float32 training in the obvious way, in place."
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    for batch in blocks.split(settings.batch_size):
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("settings", [Training(lr=1e-3), Training(lr=1e-3, weight_decay=0.1, max_grad_norm=0.1, batch_size=2)], ids=["default", "decay and clipping"])
def test_training_is_plain_adamw(settings):
    "In float32, the loop is AdamW with clipping and nothing else."
    model, blocks = small_model("llama-tied"), random_blocks(8, 16)
    expected = copy.deepcopy(model)
    plain_training(expected, blocks, settings)
    train(model, blocks, settings)
    for a, b in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_masters_are_float32_weights():
    "A bfloat16 model is trained on float32 masters: they follow plain float32 AdamW on the same gradients, and the model is them, rounded."
    model, settings = small_model("llama-gqa").bfloat16(), Training(lr=1e-3)
    masters = [parameter.detach().float().clone().requires_grad_() for parameter in model.parameters()]
    reference, optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.0, fused=True), MasterOptimizer(model, settings)
    for batch in random_blocks(12, 16).split(4):
        next_token_loss(model, batch).backward()
        for master, parameter in zip(masters, model.parameters()):
            master.grad = parameter.grad.float()
        nn.utils.clip_grad_norm_(masters, 1.0)
        reference.step()
        optimizer.step(1e-3)
        for master, mine, parameter in zip(masters, optimizer.masters, model.parameters()):
            torch.testing.assert_close(mine, master, rtol=1e-6, atol=1e-7)
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, mine.bfloat16()) and parameter.grad is None


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stepping_part_by_part_is_stepping_at_once(dtype, optimizer):
    "However many parts, and however large matrices are taken in portions, the weights and the optimizer's memory are the same to the last bit."
    results, batches = [], random_blocks(12, 16).split(4)
    for part in (64, 3000, 10**9):
        model = small_model("llama-gqa").to(dtype)
        stepper = MasterOptimizer(model, Training(lr=1e-2, optimizer=optimizer), part)
        for batch in batches:
            next_token_loss(model, batch).backward()
            stepper.step(1e-2)
        remembered = [(key, x.flatten()) for row in stepper.state.values() for key, x in row.items() if isinstance(x, torch.Tensor) and key != "step"]
        memory = {key: torch.cat([x for name, x in remembered if name == key]) for key, _ in remembered}
        results.append((stepper, list(model.parameters()), memory))
    n = len(results[0][1])
    assert len(results[0][0].parts) > len(results[1][0].parts) > len(results[2][0].parts) == 1
    assert len(results[2][0].portions) == n and (len(results[0][0].portions) > n) == (optimizer != "Adafactor")
    for _, parameters, memory in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][1]))
        assert memory.keys() == results[0][2].keys() and all(torch.equal(memory[key], results[0][2][key]) for key in memory)


def test_no_more_than_a_part_has_float32_gradients(monkeypatch):
    "In bfloat16, not even of a matrix that is larger than a part."
    model, sizes = small_model("llama-gqa").bfloat16(), []
    optimizer = MasterOptimizer(model, Training(), part=1000)
    assert max(parameter.numel() for parameter in model.parameters()) > 1000
    for inner in optimizer.optimizers:
        monkeypatch.setattr(inner, "step", lambda step=inner.step: (sizes.append(sum(p.grad.numel() for p in optimizer.portions if p.grad is not None)), step()))
    next_token_loss(model, random_blocks(4, 16)).backward()
    optimizer.step(1e-3)
    assert len(sizes) == len(optimizer.parts) and max(sizes) <= 1000 and sum(sizes) == sum(p.numel() for p in model.parameters())


def test_training_costs_weights_gradients_masters_and_moments():
    "With few tokens, so that activations are small: 2 + 2 + 4 + 8 bytes per parameter in bfloat16, 4 + 4 + 8 in float32, and little more."
    config = transformers.LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8, vocab_size=VOCABULARY)
    for dtype in (torch.bfloat16, torch.float32):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        size = sum(parameter.numel() for parameter in model.parameters())
        peak = model.dtype.itemsize * size + peak_of_tensors(lambda: train(model, random_blocks(3, 8), Training(batch_size=1)))
        assert 0.95 < peak / (16 * size) < 1.1


def test_updates_too_small_for_bfloat16_add_up():
    "A hundred steps of 1e-4, each below bfloat16's resolution at 1, move a bfloat16 weight from 1 to 0.99."
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    optimizer = MasterOptimizer(layer, Training(lr=1e-4, optimizer="SGD"))
    for _ in range(100):
        layer(torch.ones(1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(1e-4)
    assert layer.weight.item() == torch.tensor(0.99, dtype=torch.bfloat16).item()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor", "RMSprop"])
def test_resumed_training_is_bit_identical(tmp_path, monkeypatch, optimizer, dtype):
    "Killed between checkpoints and called again, training ends with the weights and losses of a run never killed."
    settings, blocks, path = Training(lr=1e-2, optimizer=optimizer, schedule="cosine", warmup=0.2, batch_size=2), random_blocks(20, 12), tmp_path / "checkpoint.safetensors"
    whole, first, resumed = (small_model("llama-tied").to(dtype) for _ in range(3))
    expected = train(whole, blocks, settings)
    step, steps = MasterOptimizer.step, []

    def interrupted(self, lr):
        if len(steps) == 7:
            raise Interrupted
        steps.append(lr)
        step(self, lr)

    with monkeypatch.context() as patch:
        patch.setattr(MasterOptimizer, "step", interrupted)
        with pytest.raises(Interrupted):
            train(first, blocks, settings, checkpoint=path, checkpoint_every=3)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    monkeypatch.setattr(MasterOptimizer, "step", lambda self, lr: steps.append(lr) or step(self, lr))
    result = train(resumed, blocks, settings, checkpoint=path, checkpoint_every=3)
    assert len(steps) == 7 + 4, "only the steps after the last checkpoint, at 6 of 10, are done again"
    assert result == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_a_checkpoint_of_other_portions_is_refused(tmp_path, monkeypatch):
    "The optimizer's memory is stored by portion; read for others it would be wrong. The file stays as it is."
    blocks, path = random_blocks(8, 12), tmp_path / "checkpoint.safetensors"
    train(small_model("llama-gqa"), blocks, checkpoint=path)
    before = path.read_bytes()
    monkeypatch.setattr(portions, "PART", 1000)
    with pytest.raises(ValueError, match="checkpoint of another training"):
        train(small_model("llama-gqa"), blocks, checkpoint=path)
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def interrupted_checkpoint(tmp_path_factory):
    "Bytes of the checkpoint of a training that was interrupted, and its blocks."
    blocks, path = random_blocks(8, 12), tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"
    train(small_model("llama-gqa"), blocks[:4], Training(batch_size=2), checkpoint=path)
    return path.read_bytes(), blocks[:4]


@pytest.mark.parametrize("share", [i / 40 for i in range(40)] + [0.9999])
def test_a_damaged_checkpoint_is_refused_by_name(interrupted_checkpoint, tmp_path, share):
    "A flipped bit anywhere, in tensors, losses or header, and a file cut short: an error that names the file; the model keeps its weights."
    content, blocks = interrupted_checkpoint
    path, at = tmp_path / "checkpoint.safetensors", int(share * len(content))
    flipped = bytearray(content)
    flipped[at] ^= 1 << at % 7
    for damaged in (flipped, content[:at]):
        path.write_bytes(damaged)
        model = small_model("llama-gqa")
        with pytest.raises(ValueError, match="checkpoint.safetensors is damaged"):
            train(model, blocks, Training(batch_size=2), checkpoint=path)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_model("llama-gqa").parameters()))


@pytest.mark.parametrize("at", [40, 200, 400, 700])
def test_a_damaged_header_is_refused_by_name(interrupted_checkpoint, tmp_path, at):
    "The header tells names, places, losses and tokens."
    test_a_damaged_checkpoint_is_refused_by_name(interrupted_checkpoint, tmp_path, at / len(interrupted_checkpoint[0]))


def test_a_checkpoint_of_version_0_1_is_read(tmp_path):
    "It has no hash; a new one that lost its own does not pass for it."
    from safetensors.torch import save_file

    blocks, path = random_blocks(8, 12), tmp_path / "checkpoint.safetensors"
    model = small_model("llama-gqa")
    result = train(model, blocks, checkpoint=path)
    with training.safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    del about["sha256"]
    save_file(tensors, path, metadata=about)
    again = small_model("llama-gqa")
    assert train(again, blocks, checkpoint=path) == result
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    save_file(tensors, path, metadata=about | {"sha257": "0"})
    with pytest.raises(ValueError, match="is damaged"):
        train(again, blocks, checkpoint=path)


def test_a_distilled_training_resumes_and_is_another_than_one_that_is_not(tmp_path):
    "With a teacher, an interrupted training ends with the same bits; its checkpoint is refused without, and at another weight. A teacher that is the model itself leaves it where it is."
    teacher, blocks, path = small_model("llama-gqa", seed=1), random_blocks(20, 12), tmp_path / "checkpoint.safetensors"
    settings, how = Training(lr=1e-2, batch_size=2), dict(teacher=teacher, distillation=0.5)
    whole, first, resumed = (small_model("llama-gqa") for _ in range(3))
    calls = iter([None] * 7)

    def interrupt():
        if next(calls, "over") == "over":
            raise Interrupted

    result = train(whole, blocks, settings, **how)
    with pytest.raises(Interrupted):
        train(first, blocks, settings, checkpoint=path, checkpoint_every=3, check_cancelled=interrupt, **how)
    for other in ({}, dict(teacher=teacher, distillation=0.25)):
        with pytest.raises(ValueError, match="checkpoint of another training"):
            train(small_model("llama-gqa"), blocks, settings, checkpoint=path, **other)
    assert train(resumed, blocks, settings, checkpoint=path, **how).losses == result.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    own = train(small_model("llama-gqa"), blocks, Training(optimizer="SGD", batch_size=2), teacher=small_model("llama-gqa"), distillation=1.0)
    assert max(map(abs, own.losses)) < 1e-5


def test_teachers_that_do_not_fit_are_refused():
    "A bias in the head is no part of the loss; another vocabulary cannot be compared."
    biased, larger = small_model("llama-gqa"), small_model("llama-gqa")
    biased.lm_head.bias = nn.Parameter(torch.ones(VOCABULARY))
    larger.resize_token_embeddings(VOCABULARY + 8)
    for model, teacher, message in ((biased, small_model("llama-gqa"), "the model .*head"), (small_model("llama-gqa"), biased, "the teacher .*head"),
                                    (small_model("llama-gqa"), larger, f"vocabulary of {VOCABULARY + 8} tokens, the pruned model one of {VOCABULARY}")):
        with pytest.raises(ValueError, match=message):
            train(model, random_blocks(4, 12), teacher=teacher, distillation=0.5)


def test_finished_training_is_not_repeated(tmp_path):
    "Calling a finished run again returns its result and weights without a step."
    blocks, path = random_blocks(8, 12), tmp_path / "checkpoint.safetensors"
    model, again = small_model("llama-gqa"), small_model("llama-gqa")
    result = train(model, blocks, Training(batch_size=2), checkpoint=path, checkpoint_every=2)
    assert train(again, blocks, Training(batch_size=2), checkpoint=path, checkpoint_every=2) == result
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_non_finite_loss_is_reported():
    "A loss that is not finite ends the loop and is in the result; it is no exception, and no later block is seen."
    model = small_model("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    result = train(model, random_blocks(8, 12), Training(batch_size=2))
    assert not result.finite and len(result.losses) == 1 and result.tokens == 24


@pytest.mark.parametrize("options, message", [
    (dict(optimizer="AdamWW"), "'AdamWW' is not usable here"), (dict(optimizer="LBFGS"), "'LBFGS' is not usable"), (dict(optimizer="Optimizer"), "not usable"),
    (dict(optimizer="Rprop"), "'Rprop' is not usable"), (dict(optimizer="Muon"), "'Muon' is not usable"), (dict(optimizer="lr_scheduler"), "not usable"),
    (dict(schedule="linear"), "use one of constant, cosine"), (dict(lr=0), "lr must be .* got 0"), (dict(lr=float("nan")), "lr must be .* got nan"), (dict(batch_size=0), "batch_size must be .* got 0"),
    (dict(warmup=1.0), "warmup must be .* got 1.0"), (dict(warmup=-0.1), "warmup must be .* got -0.1"), (dict(weight_decay=-1.0), "weight_decay must be .* got -1"), (dict(max_grad_norm=0.0), "max_grad_norm must be .* got 0"),
])
def test_bad_settings_are_named(options, message):
    "Settings that cannot work are errors with the value seen, when they are written down and not when training starts."
    with pytest.raises(ValueError, match=message):
        Training(**options)


@pytest.mark.parametrize("settings, expected", [
    (Training(lr=1.0), [1.0] * 10), (Training(lr=1.0, warmup=0.4), [0.25, 0.5, 0.75, 1.0] + [1.0] * 6), (Training(lr=2.0, schedule="cosine"), None)])
def test_learning_rate_schedules(settings, expected):
    "Warm-up rises linearly to lr; cosine falls from lr to a tenth of it, and never rises."
    rates = [settings.lr_at(step, 10) for step in range(10)]
    if expected:
        assert rates == pytest.approx(expected)
    else:
        assert rates[0] == 2.0 and rates == sorted(rates, reverse=True) and settings.lr_at(10, 10) == pytest.approx(0.2)


def test_frozen_parameters_are_trained_too():
    "Candidates come from models that may have frozen parameters; training reaches every one of them."
    model = small_model("llama-gqa").requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    train(model, random_blocks(8, 16), Training(lr=1e-2))
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_training_draws_no_random_numbers():
    "Two runs on the same blocks end with the same weights, whatever torch's generator is doing, and leave it alone."
    runs, state = [small_model("qwen3"), small_model("qwen3")], torch.get_rng_state()
    for seed, model in enumerate(runs):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train(model, random_blocks(8, 16))
        assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in runs)))


def test_post_training_draws_from_the_pool():
    "Post-training sees n_tokens of the pool, another order with another seed, and refuses before the first step what the pool cannot give."
    pool = TokenPool("tuning", random_blocks(12, 16).int())
    first, again, other = (post_train(small_model("llama-gqa"), pool, 160, seed=seed, progress="") for seed in (0, 0, 1))
    assert first.tokens == 160 and first == again and first.losses != other.losses
    model = small_model("llama-gqa")
    with pytest.raises(ValueError, match=r"asked for 400 tuning tokens, but there are 192"):
        post_train(model, pool, 400, progress="")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_model("llama-gqa").parameters()))
    assert post_train(model, pool, 380, epochs=2, progress="").tokens == 368
