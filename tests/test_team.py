"""Two processes that share a model train it, and score with it, as one does alone."""
import json

import pytest
import torch
import torch.multiprocessing as processes

from evoprune_nb.cluster.workers import ModelProcess
from evoprune_nb.data import TokenPool
from evoprune_nb.evaluator import draw_scoring_text, score, score_blocks
from evoprune_nb.machine.team import Team, join, spread
from evoprune_nb.models import decoder_layers, load_model
from evoprune_nb.selection import Stage
from evoprune_nb.training import MasterOptimizer, Training, train


def trained(rank: int, address: str, size: int, dtype: str, out: str) -> None:
    "Train the embedded model on eight steps, in one process or a team; the first writes what came out."
    torch.set_num_threads(1)
    team, (model, _), (dense, _) = join(address, rank, size), load_model("tiny", dtype=dtype), load_model("tiny", dtype=dtype)
    blocks = torch.randint(dense.config.vocab_size, (36, 32), generator=torch.Generator().manual_seed(0))
    spread(model, decoder_layers(model)[1], team)
    settings = Training(lr=1e-3, batch_size=4, schedule="cosine", warmup=0.25, max_grad_norm=0.5)
    result = train(model, blocks[:32], settings, optimizer=MasterOptimizer(model.requires_grad_(True), settings))
    text = draw_scoring_text(dense, {"scoring": TokenPool("scoring", blocks.int())}, Stage(1, 0, 320), 0, team=team)
    found = {"losses": result.losses, "tokens": result.tokens, "fitness": score(model, text), "blocks": score_blocks(model, text), "scored": text.n_tokens}
    if rank == 0:
        with open(out, "w") as file:
            json.dump(found, file)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_a_team_trains_and_scores_as_one_process(dtype, error, tmp_path):
    "Losses of all steps, the fitness, and the score of each block, in the same order; so many tokens in all."
    found = []
    for size in (1, 2):
        out = tmp_path / f"{size}.json"
        processes.spawn(trained, (ModelProcess(None, 1).meeting(), size, dtype, str(out)), nprocs=size)
        found.append(json.loads(out.read_text()))
    alone, team = found
    assert team["tokens"] == alone["tokens"] == 1024 and team["scored"] == alone["scored"] == 320
    for name in ("losses", "blocks"):
        assert team[name] == pytest.approx(alone[name], rel=error)
    assert team["fitness"] == pytest.approx(alone["fitness"], rel=error)
    assert alone["losses"][-1] < alone["losses"][0]


def test_optimizers_that_look_at_whole_matrices_are_refused():
    "A slice of a matrix is not the matrix."
    model, _ = load_model("tiny")
    model.team = Team(0, 2)
    with pytest.raises(ValueError, match="Adafactor looks at whole matrices"):
        MasterOptimizer(model.requires_grad_(True), Training(optimizer="Adafactor"))
