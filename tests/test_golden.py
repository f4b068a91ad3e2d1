"""Speed changes no result: a plain evaluation without any shortcut selects the same genomes, and they are those of before the shortcuts."""
import json

import pytest
import torch
from helpers import by, random_blocks, small_model, small_pools
from torch.nn import functional as F

from evoprune_nb.candidates import materialize
from evoprune_nb.data import derive_seed
from evoprune_nb.database import build_database
from evoprune_nb.search import Search, SearchConfig
from evoprune_nb.selection import Evaluation, Stage
from evoprune_nb.training import Training

CONFIG = SearchConfig(generations=5, offspring=6, stages=(Stage(3, 64, 48), Stage(2, 128, 96), Stage(1, 256, 96)), training=Training(lr=3e-3, batch_size=2), seed=3)
GOLDEN = {  # survivors by generation, of the revision before any of the shortcuts (cfd73f5)
    "llama-gqa": ["234/555", "144/546", "144/447", "144/348", "144/249"],
    "qwen3": ["234/555", "144/546", "144/447", "144/348", "144/357"],
}


class Plain:
    "Tunes with torch's own loss and optimizer and scores with whole logits; keeps nothing."

    def __init__(self, model, database, pools):
        self.model, self.database, self.pools = model, database, pools

    def tuned(self, genome, generation, stage):
        candidate = materialize(self.model, self.database, genome)
        optimizer = torch.optim.AdamW(candidate.parameters(), lr=CONFIG.training.lr, weight_decay=0.0)
        for batch in self.pools["tuning"].draw(CONFIG.stages[stage].tuning_tokens, derive_seed(CONFIG.seed, generation, stage, "tuning")).split(2):
            logits = candidate(input_ids=batch, use_cache=False).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(candidate.parameters(), CONFIG.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return candidate

    def __call__(self, genome, generation, stage):
        candidate = self.tuned(genome, generation, stage)
        blocks = self.pools["scoring"].draw(CONFIG.stages[stage].scoring_tokens, derive_seed(CONFIG.seed, generation, stage, "scoring"))
        with torch.no_grad():
            dense, pruned = (model(input_ids=blocks, use_cache=False).logits.double().log_softmax(-1).flatten(0, 1) for model in (self.model, candidate))
        return Evaluation(generation, stage, genome.code, F.kl_div(pruned, dense, log_target=True, reduction="batchmean").item(), None, CONFIG.stages[stage].tuning_tokens, blocks.numel(), 0.0)


@pytest.mark.parametrize("family", GOLDEN)
def test_same_genomes_as_before_and_as_without_shortcuts(tmp_path, family):
    "Survivors of five generations in three tuned stages; fitness agrees with the plain evaluation to float32 rounding."
    model, pools = small_model(family), small_pools()
    database = build_database(model, random_blocks(), tmp_path / "database", progress=False)
    survivors, fitness = {}, {}
    for way, evaluator in (("fast", None), ("plain", by(Plain(model, database, pools)))):
        Search(tmp_path / way, model, database, pools, CONFIG, evaluator=evaluator).run(progress=False)
        rows = [json.loads(line) for line in (tmp_path / way / "events.jsonl").read_text().splitlines()]
        survivors[way] = [row["genome"] for row in rows if row["event"] == "survivor"]
        fitness[way] = [row["fitness"] for row in rows if row["event"] == "evaluation"]
    assert survivors["fast"] == survivors["plain"] == GOLDEN[family]
    assert fitness["fast"] == pytest.approx(fitness["plain"], rel=1e-4)
