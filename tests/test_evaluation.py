"""Held-out numbers are what their names say."""
import math

import pytest
import torch
from helpers import random_blocks, small_model

from evoprune_nb.candidates import materialize
from evoprune_nb.data import TokenPool
from evoprune_nb.evaluation import evaluate


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "qwen3"])
def test_nats_are_transformers_loss(family, tokenizer):
    "Cross-entropy per predicted token and its exponential are transformers' own; blocks have one predicted token less than they have tokens."
    model, blocks = small_model(family), random_blocks(5, 20)
    with torch.no_grad():
        loss = model(blocks, labels=blocks).loss.item()
    found = evaluate(model, TokenPool("heldout", blocks.int()), tokenizer, batch_size=2)
    assert found.nats == pytest.approx(loss, rel=1e-5) and found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.n_tokens == 5 * 19 and found.n_params == sum(p.numel() for p in model.parameters())


def test_bits_per_byte_by_hand(tiny, tokenizer):
    "The bits of all predicted tokens over the bytes of their text: accents count as two, document ends as none."
    text, end = "Zürich, a café, naïve résumés. " * 4, tokenizer.eos_token_id
    tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] + [end]) * 3
    blocks = torch.tensor(tokens).view(3, -1)
    with torch.no_grad():
        log_p = tiny(blocks).logits[:, :-1].double().log_softmax(-1).gather(-1, blocks[:, 1:, None])
    n_bytes = 3 * len(text.removeprefix(tokenizer.decode(blocks[0, :1])).encode())
    found = evaluate(tiny, TokenPool("heldout", blocks.int()), tokenizer)
    assert found.bits_per_byte == pytest.approx(-log_p.sum().item() / math.log(2) / n_bytes, rel=1e-4)


def test_candidate_of_level_0_is_the_dense_model(tiny, tokenizer, database, pools):
    "With nothing removed, every number is exactly the dense model's."
    dense = database.space.genome([0] * len(database.units))
    for trainable in (True, False):
        assert evaluate(materialize(tiny, database, dense, trainable), pools["heldout"], tokenizer) == evaluate(tiny, pools["heldout"], tokenizer)


def test_a_share_of_the_pool(tiny, tokenizer, pools, capsys):
    "n_tokens takes the pool's first blocks; the batch size changes nothing but rounding; too many tokens are refused; no bar is shown unless asked for."
    pool = pools["heldout"]
    some, again = evaluate(tiny, pool, tokenizer, 500), evaluate(tiny, TokenPool("heldout", pool.blocks[:7]), tokenizer, batch_size=3)
    assert some.n_tokens == again.n_tokens == 7 * 63 and some.nats == pytest.approx(again.nats, rel=1e-6)
    assert some.bits_per_byte == pytest.approx(again.bits_per_byte, rel=1e-6)
    with pytest.raises(ValueError, match="asked for 5,000 heldout tokens, but there are 1,024"):
        evaluate(tiny, pool, tokenizer, 5000)
    assert capsys.readouterr().err == ""
    evaluate(tiny, pool, tokenizer, 500, progress="evaluating dense")
    assert "evaluating dense: 100%" in capsys.readouterr().err
