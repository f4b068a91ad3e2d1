"""Run by `make vllm`: vLLM's Transformers backend serves an export with the tokens and log-probabilities of transformers.

vLLM is large and pins its own torch and transformers, so CI does without it, and this is no test of pytest."""
import sys
import tempfile
from pathlib import Path

import torch

from evoprune_nb.candidates import materialize
from evoprune_nb.data import load_pools
from evoprune_nb.database import build_database
from evoprune_nb.models import load_model
from evoprune_nb.ship.export import check_vllm, export_hf

NEW_TOKENS = 16


def exported(directory: str) -> tuple[Path, torch.nn.Module]:
    "The embedded model with fewer heads and channels, other ones in each layer, and where it was written."
    model, tokenizer = load_model("tiny")
    blocks = load_pools("wikipedia-sample", tokenizer, 128, {"calibration": 2048})["calibration"].blocks.long()
    database = build_database(model, blocks, f"{directory}/database", heads="query", progress=False)
    small = materialize(model, database, database.space.genome([0, 1, 2, 1, 0, 2, 1, 0] + [0, 3, 9, 5, 7, 8, 1, 4]))
    check_vllm(small)
    small.set_attn_implementation("sdpa")
    return export_hf(small, tokenizer, f"{directory}/export"), small


def main() -> int:
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as directory:
        path, model = exported(directory)
        prompts = torch.randint(model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
        wanted = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        with torch.no_grad():
            logprobs = model(wanted).logits.log_softmax(-1)[:, 11:-1].gather(2, wanted[:, 12:, None])[..., 0]
        server = LLM(str(path), trust_remote_code=True, model_impl="transformers", dtype="float32", enforce_eager=True, max_model_len=64, gpu_memory_utilization=0.2)  # of main memory, too
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
        answers = [answer.outputs[0] for answer in server.generate([{"prompt_token_ids": row} for row in prompts.tolist()], sampling)]
    same = [list(answer.token_ids) == row for answer, row in zip(answers, wanted[:, 12:].tolist())]
    theirs = torch.tensor([[step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids)] for answer in answers])
    furthest = (theirs - logprobs).abs().max().item()
    print(f"greedy tokens agree in {sum(same)} of {len(same)} prompts; log-probabilities differ by at most {furthest:.2g}")
    return 0 if all(same) and furthest < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
