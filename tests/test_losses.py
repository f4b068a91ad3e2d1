"Chunked losses are the plain ones, whatever the chunk."
import math

import pytest
import torch
from helpers import random_blocks, small_model
from torch import nn

from evoprune_nb.losses import block_losses, cross_entropy, kl_divergence, perplexity


def direct_kl(logits: torch.Tensor, student_logits: torch.Tensor) -> float:
    "Mean over positions of Σ p·log(p/q), all at once in float64."
    log_p, log_q = logits.double().log_softmax(-1), student_logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("vocabulary", [100, 60_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_kl_is_the_kl(dtype, vocabulary, chunk):
    "Whatever the chunk, vocabulary and dtype of the heads, the result is the plain sum."
    heads = [nn.Linear(32, vocabulary, bias=False, dtype=dtype) for _ in range(2)]
    hidden = [(3 * torch.randn(65, 32)).to(dtype) for _ in range(2)]
    with torch.no_grad():
        found = kl_divergence(heads[0], hidden[0], heads[1], hidden[1], chunk)
        assert found == pytest.approx(direct_kl(heads[0](hidden[0]), heads[1](hidden[1])), rel=2e-5)
        assert kl_divergence(heads[0], hidden[0], heads[0], hidden[0], chunk) == 0
    assert kl_divergence(heads[0], hidden[0], heads[1], hidden[1], chunk) == found  # autograd, where it is on, does not mind


def test_near_zero_kl_keeps_its_digits():
    "Nearly equal distributions are where candidates are compared; float32 does not drown the difference."
    head, hidden = nn.Linear(32, 5000, bias=False), torch.randn(200, 32)
    with torch.no_grad():
        nearby = hidden + 0.01 * torch.randn(200, 32)
        assert kl_divergence(head, hidden, head, nearby) == pytest.approx(direct_kl(head(hidden), head(nearby)), rel=0.02)


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_cross_entropy_is_transformers_loss(chunk):
    "Chunked cross-entropy is the loss that transformers computes."
    model, blocks = small_model("qwen3"), random_blocks(3, 20)
    with torch.no_grad():
        hidden = model.model(blocks).last_hidden_state
        assert cross_entropy(model.lm_head, hidden, blocks, chunk) == pytest.approx(model(blocks, labels=blocks).loss.item(), rel=1e-5)


def test_perplexity_keeps_what_is_not_finite():
    "A diverged candidate must not come out with a large but finite perplexity."
    assert math.isnan(perplexity(math.nan)) and math.isinf(perplexity(math.inf)) and math.isinf(perplexity(1e4))
    assert perplexity(0.0) == 1.0


@pytest.mark.parametrize("family", ["qwen3", "granite"])
def test_the_loss_of_each_block_is_transformers_loss(family):
    "Also where a block ends inside a chunk, and where logits are more than the head's output; the batch size changes rounding only."
    model, blocks = small_model(family), random_blocks(5, 90)
    with torch.no_grad():
        expected = [model(block[None], labels=block[None]).loss.item() for block in blocks]
    for batch_size in (2, 8):
        assert block_losses(model, blocks.int(), batch_size) == pytest.approx(expected, rel=1e-5)
