"""Fitness is the divergence it claims to be, and survival in stages is fair."""
import math
import time

import pytest
import torch
from helpers import peak_of_tensors, random_blocks, short_config, small_model, small_pools
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from evoprune_nb import selection
from evoprune_nb.candidates import materialize
from evoprune_nb.data import TokenPool, derive_seed, load_pools
from evoprune_nb.genome import Genome
from evoprune_nb.models import decoder_layers, load_model, model_fingerprint
from evoprune_nb.database import build_database
from evoprune_nb.selection import PUBLISHED_STAGES, Elimination, Evaluation, Stage, check_stages, select
from evoprune_nb.evaluator import Evaluator, CandidatePool
from evoprune_nb.losses import cross_entropy, kl_divergence
from evoprune_nb.training import Training, TrainingResult, train

STAGES = (Stage(2, 0, 32), Stage(1, 64, 48))
INF = math.inf


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


def test_perplexity_fitness_is_transformers_loss(small):
    "Fitness `perplexity` is exp(transformers' loss) of the candidate on the stage's scoring text."
    model, database = small
    genome, pools = database.space.genome([1, 2, 3, 3, 5, 1]), small_pools()
    candidate = materialize(model, database, genome)
    blocks = pools["scoring"].draw(32, derive_seed(0, 4, 0, "scoring"))
    with torch.no_grad():
        expected = candidate(blocks, labels=blocks).loss.exp().item()
    assert Evaluator(model, database, pools, STAGES, fitness="perplexity")(genome, 4, 0).fitness == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family, dtype", [("llama-gqa", torch.float32), ("llama-gqa", torch.bfloat16), ("qwen2-tied", torch.float32)])
def test_kl_fitness_of_models(tmp_path, family, dtype):
    "Fitness `kl` is the divergence of the two models' logits; the dense model's own is exactly zero."
    model, pools = small_model(family).to(dtype), small_pools()
    database = build_database(model, random_blocks(), tmp_path / "database", progress=False)
    evaluate, genome = Evaluator(model, database, pools, STAGES), database.space.genome([1, 2, 3, 3, 5, 1])
    blocks = pools["scoring"].draw(32, derive_seed(0, 0, 0, "scoring"))
    with torch.no_grad():
        expected = direct_kl(model(blocks).logits.float(), materialize(model, database, genome)(blocks).logits.float())
    assert evaluate(genome, 0, 0).fitness == pytest.approx(expected, rel=1e-4)
    assert evaluate(database.space.genome([0] * 6), 0, 0).fitness == 0


def test_candidates_of_a_stage_see_the_same_tokens(small, monkeypatch):
    "Within a stage all are tuned and scored on the same blocks in the same order; other stages and generations get others."
    model, database = small
    tuned, scored, real_hidden = {}, {}, selection.final_hidden
    evaluate = Evaluator(model, database, small_pools(), (Stage(2, 64, 64), Stage(1, 64, 64)))
    monkeypatch.setattr(selection, "train", lambda candidate, blocks, settings, **_: tuned[now].append(blocks.tolist()) or TrainingResult(blocks.numel(), [1.0]))
    monkeypatch.setattr(selection, "final_hidden", lambda m, blocks: (scored[now].append(blocks.tolist()) if m is not model else None, real_hidden(m, blocks))[1])
    genomes = [database.space.genome(levels) for levels in ([3, 3, 3, 5, 5, 5], [2, 4, 3, 5, 5, 5], [3, 3, 3, 4, 6, 5])]
    for now in ((0, 0), (0, 1), (1, 0), (1, 1)):
        tuned[now], scored[now] = [], []
        for genome in genomes:
            evaluate(genome, *now)
    for seen in (tuned, scored):
        assert all(len(draws) == 3 and draws[0] == draws[1] == draws[2] for draws in seen.values())
        assert len({str(draws[0]) for draws in seen.values()}) == 4


def test_evaluations_do_not_depend_on_order_or_surroundings(small):
    "An evaluation is a function of genome, generation and stage: bitwise the same in any order and with any global random state, which it leaves alone."
    model, database = small
    before, tasks = model_fingerprint(model), [(database.space.genome([3, 3, 3, 5, 5, 5 + i]), generation, stage) for i in (0, 1) for generation in (0, 1) for stage in (0, 1)]

    def results(order, seed):
        evaluate = Evaluator(model, database, small_pools(), STAGES, Training(lr=1e-3, batch_size=2))
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        done = {task: evaluate(*task) for task in order}
        assert torch.equal(torch.get_rng_state(), state)
        return {task: (e.fitness, e.tuning_loss, e.tuning_tokens, e.scoring_tokens) for task, e in done.items()}

    first = results(tasks, 1)
    assert first == results(tasks[::-1], 2) == results(tasks[1::2] + tasks[::2], 3)
    assert len({fitness for fitness, *_ in first.values()}) == len(tasks)
    assert model_fingerprint(model) == before


def test_tuning_is_part_of_a_stage(small):
    "A stage with tuning tokens scores the tuned candidate and counts the tokens; one without scores it as it is."
    model, database = small
    genome, training = database.space.genome([3, 3, 3, 5, 5, 5]), Training(lr=1e-2, batch_size=2)
    tuned, plain = (Evaluator(model, database, small_pools(), [Stage(1, tokens, 48)], training)(genome, 0, 0) for tokens in (128, 0))
    assert (tuned.tuning_tokens, plain.tuning_tokens) == (128, 0) and tuned.scoring_tokens == plain.scoring_tokens == 48
    assert plain.tuning_loss is None and tuned.tuning_loss > 0 and tuned.fitness != plain.fitness


CONTINUED = (Stage(3, 32, 48), Stage(2, 64, 48), Stage(1, 128, 48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continued_stages_are_one_uninterrupted_training(tmp_path, dtype):
    "With warm starts, a survivor scored in a stage is bitwise the candidate trained in one go on all tokens up to there, whether its tuned weights were kept or (as after a resume) not."
    model, pools, training = small_model("llama-gqa").to(dtype), small_pools(), Training(lr=1e-2, batch_size=2)
    database = build_database(model, random_blocks(), tmp_path / "database", progress=False)
    genomes = [database.space.genome([3, 3, 3, 5, 5, 4 + i]) for i in range(3)]
    kept = Evaluator(model, database, pools, CONTINUED, training, warm_start=True)
    found = [[kept(genome, 5, stage) for genome in genomes] for stage in range(3)]
    blocks = pools["tuning"].draw(128, derive_seed(0, 5, "tuning"))
    for stage, evaluations in enumerate(found):
        for genome, evaluation in zip(genomes, evaluations):
            fresh = Evaluator(model, database, pools, CONTINUED, training, warm_start=True)
            candidate = materialize(model, database, genome)
            train(candidate, blocks[: CONTINUED[stage].tuning_tokens // pools["tuning"].seq_len], training)
            assert evaluation.fitness == fresh(genome, 5, stage).fitness == fresh.score(candidate, 5, stage)[0]
            assert evaluation.tuning_tokens == CONTINUED[stage].tuning_tokens


def test_continued_survivors_train_on_the_additional_tokens_only(small, monkeypatch):
    "Survivors of the stage before are not trained again on what they have seen; no more candidates are held than can survive."
    model, database = small
    genomes, trained, real = [database.space.genome([3, 3, 3, 5, 5, 3 + i]) for i in range(4)], [], selection.train
    monkeypatch.setattr(selection, "train", lambda candidate, blocks, *args, **options: trained.append(blocks.numel()) or real(candidate, blocks, *args, **options))
    evaluate = Evaluator(model, database, small_pools(), CONTINUED, Training(batch_size=2), warm_start=True)
    first = sorted((evaluate(genome, 0, 0) for genome in genomes), key=lambda evaluation: evaluation.fitness)
    assert trained == [32] * 4 and sorted(code for _, code in evaluate._kept) == sorted(e.genome for e in first[:3])
    for evaluation in first[:3]:
        evaluate(Genome.parse(evaluation.genome), 0, 1)
    assert trained[4:] == [32] * 3 and len(evaluate._kept) == 2
    parent = database.space.genome([3, 3, 3, 5, 4, 6])
    evaluate(parent, 0, 2)
    assert trained[7:] == [32, 32, 64]  # the parent joins last and catches up
    evaluate(genomes[0], 1, 0)
    assert {generation for generation, _ in evaluate._kept} == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("warm_start, stages", [(False, (Stage(3, 0, 48), Stage(3, 96, 48))), (True, CONTINUED)])
def test_side_by_side_changes_no_bit(tmp_path, dtype, warm_start, stages):
    "However many are evaluated at once, with a core each: the same fitness, losses and tokens, with tuning and without, whether survivors keep their weights or not. With more cores each, the same from any place in a stage."
    model, pools = small_model("llama-gqa").to(dtype), small_pools()
    database = build_database(model, random_blocks(), tmp_path / "database", progress=False)
    family = [database.space.genome([3, 3, 3, 5, 5, 3 + i]) for i in range(5)]
    threads = torch.get_num_threads()

    def evaluator(n_jobs: int, n_cores: int) -> Evaluator:
        evaluate = Evaluator(model, database, pools, stages, Training(lr=1e-2, batch_size=2), warm_start=warm_start, n_jobs=n_jobs)
        evaluate.reference = family[0]
        torch.set_num_threads(n_cores)
        return evaluate

    def results(n_jobs: int, n_cores: int) -> list:
        evaluate = evaluator(n_jobs, n_cores)
        happened = list(select(family[-1], family[:4], stages, evaluate, 2, evaluate.announce))
        assert torch.get_num_threads() == n_cores
        return [(e.genome, e.stage, e.fitness, e.tuning_loss, e.tuning_tokens, e.scoring_tokens) if isinstance(e, Evaluation) else e for e in happened]

    try:
        assert results(1, 1) == results(2, 1) == results(3, 1) == results(8, 1)
        whole = results(3, 6)
        for begin in range(4):
            evaluate = evaluator(3, 6)
            evaluate.announce(family[:4], 2, 0)
            assert [evaluate(genome, 2, 0).fitness for genome in family[begin:4]] == [row[2] for row in whole[begin:4]]
    finally:
        torch.set_num_threads(threads)


def test_side_by_side_shares_the_cores_in_order():
    "Full rows share the cores, what is left over shares them anew, a single one has them all; that depends on the place alone, wherever one begins. Results come in order; at most one more than there are threads has begun."
    cores, begun, threads = {}, [], torch.get_num_threads()

    def work(item, n):
        begun.append(item)
        cores[item] = (n, torch.get_num_threads())
        time.sleep(0.01 * (9 - item))
        return item

    try:
        torch.set_num_threads(6)
        for n_jobs, first, expected in ((3, 0, {**dict.fromkeys(range(6), (3, 2)), 6: (2, 3), 7: (2, 3)}), (3, 4, {4: (3, 2), 5: (3, 2), 6: (2, 3), 7: (2, 3)}), (3, 7, {7: (2, 3)}), (1, 0, dict.fromkeys(range(8), (1, 6))), (7, 0, {**dict.fromkeys(range(7), (7, 1)), 7: (1, 6)}), (20, 0, dict.fromkeys(range(8), (8, 1)))):
            cores.clear()
            side = CandidatePool(work, n_jobs)
            side.announce(range(8))
            for item in range(first, 8):
                begun.clear()
                assert side.result(item) == item and torch.get_num_threads() == 6 and len(begun) <= n_jobs + 1
            assert cores == expected
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="n_jobs must be a whole number from 1; got 0"):
        CandidatePool(work, 0)


def test_work_side_by_side_ends_when_it_is_not_wanted():
    "An error in one, an announcement or a halt ends the others at their next step; what is asked for again begins anew."
    begun, finished = [], []

    def work(item, n):
        begun.append(item)
        if item == "bad":
            raise RuntimeError("out of memory")
        for _ in range(500 if item == "long" else 1):
            side.check_cancelled()
            time.sleep(0.01)
        finished.append(item)
        return item

    side = CandidatePool(work, 2)
    for end in (side.halt, lambda: side.announce(["other"])):
        side.announce(["short", "long", "x", "y"])
        assert side.result("short") == "short"
        end()
        assert "long" in begun and "long" not in finished
        begun.clear()
    side.announce(["bad", "long"])
    with pytest.raises(RuntimeError, match="out of memory"):
        side.result("bad")
    assert "long" not in finished and side.result("unannounced") == "unannounced"
    side.announce(["short", "short2"])
    assert [side.result(item) for item in ("short", "short2")] == ["short", "short2"]


def test_continue_refuses_schedules_that_shrink(small):
    "Training cannot go on to fewer tokens; warm_start is a yes or no."
    model, database = small
    with pytest.raises(ValueError, match=r"never fall.*\[64, 32\]"):
        Evaluator(model, database, small_pools(), (Stage(2, 64, 32), Stage(1, 32, 32)), warm_start=True)
    with pytest.raises(ValueError, match="True or False; got 'continue'"):
        Evaluator(model, database, small_pools(), STAGES, warm_start="continue")


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "mistral"])
@pytest.mark.parametrize("fitness", ["kl", "perplexity"])
def test_reusing_the_reference_changes_no_bit(tmp_path, family, fitness):
    "Scoring from the reference's hidden states gives the same fitness to the last bit, runs no layer in front of the first changed one, and is not used for tuned candidates."
    model, pools = small_model(family), small_pools()
    database = build_database(model, random_blocks(), tmp_path / "database", progress=False)
    stages = (Stage(1, 0, 96),)
    plain, reusing = (Evaluator(model, database, pools, stages, fitness=fitness, batch_size=2) for _ in range(2))
    reusing.reference = database.space.genome([2, 3, 3, 5, 5, 5])
    changes = {0: [3, 3, 3, 5, 5, 5], 1: [2, 3, 3, 5, 10, 5], 2: [2, 3, 3, 5, 5, 10]}
    for first, levels in changes.items():
        genome = database.space.genome(levels)
        assert reusing._first_own_layer(genome) == first
        assert reusing(genome, 0, 0).fitness == plain(genome, 0, 0).fitness
    assert reusing(reusing.reference, 0, 0).fitness == plain(reusing.reference, 0, 0).fitness
    calls, (_, layers) = [], decoder_layers(candidate := materialize(model, database, genome))
    layers[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    reusing.score(candidate, 0, 0, genome)
    assert not calls and reusing.score(candidate, 0, 0)[0] == plain(genome, 0, 0).fitness and calls
    tuning = Evaluator(model, database, pools, (Stage(1, 64, 96),))
    before = tuning(genome, 0, 0).fitness
    tuning.reference = reusing.reference
    assert tuning(genome, 0, 0).fitness == before


def test_a_candidate_costs_its_own_size_and_no_more(tokenizer, corpus, tmp_path):
    "In training: its weights and gradients, masters and two moments. Without: its own smaller layers at most. With warm starts, the survivors wait with theirs, but for the gradients."
    model, _ = load_model("tiny", dtype="bfloat16")
    database = build_database(model, random_blocks(4, 16), tmp_path / "database", progress=False)
    pools = load_pools(corpus, tokenizer, 8, {"tuning": 64, "scoring": 64})
    genomes = [database.space.genome([5] * 16), database.space.genome([4, 6, *[5] * 14]), database.space.genome([6, 4, *[5] * 14])]
    size, own = database.space.n_params(genomes[0]), database.space.n_params(genomes[0]) - database.space.fixed_params

    def peak(warm_start: bool, stage: int) -> int:
        evaluate = Evaluator(model, database, pools, (Stage(2, 0, 8), Stage(2, 32, 8), Stage(1, 64, 8)), Training(batch_size=1), warm_start=warm_start)
        evaluate(genomes[0], 0, stage)
        return peak_of_tensors(lambda: [evaluate(genome, 0, stage) for genome in genomes[1:]])

    assert peak(False, 0) < 1.1 * 2 * own
    assert peak(False, 1) < 1.05 * size * (2 + 4 + 8 + 4)  # so small a model has gradients in float32 all at once, and none in bfloat16 by then
    assert peak(True, 1) < 1.05 * size * (2 + 4 + 8 + 4 + 2 + 4 + 8)  # one more survives and waits


@st.composite
def tournaments(draw):
    "Stages that narrow down, as many offspring as enter, and a fitness (infinite: disqualified) per candidate and stage; the parent is last."
    survivors = sorted(draw(st.lists(st.integers(1, 6), max_size=3)), reverse=True) + [1]
    n = draw(st.integers(survivors[0], 8))
    fitness = draw(st.lists(st.lists(st.integers(0, 9) | st.just(INF), min_size=n + 1, max_size=n + 1), min_size=len(survivors), max_size=len(survivors)))
    return [Stage(s, 0, 16) for s in survivors], n, fitness


@given(tournaments())
def test_survivors_are_the_best_of_their_stage(tournament):
    "Every stage keeps its best, in order; the parent joins the last stage only; nobody disqualified goes on; and if nobody is left, the parent stays."
    stages, n, fitness = tournament
    genomes = [Genome((i,), (0,)) for i in range(n + 1)]

    def evaluate(genome, generation, stage):
        value = fitness[stage][genome.attn[0]]
        return Evaluation(generation, stage, genome.code, value, None, 0, 16, 0.0, "" if value < INF else "unlucky")

    happened, selecting = [], select(genomes[n], genomes[:n], stages, evaluate, 7)
    while True:
        try:
            happened.append(next(selecting))
        except StopIteration as stop:
            survivor, evaluation = stop.value
            break
    entered = list(range(n))
    for index, stage in enumerate(stages):
        entered += [n] * (index == len(stages) - 1)
        seen = [e.genome for e in happened if isinstance(e, Evaluation) and e.stage == index]
        assert seen == [genomes[i].code for i in entered]
        ranking = sorted((i for i in entered if fitness[index][i] < INF), key=lambda i: fitness[index][i])
        (end,) = [e for e in happened if isinstance(e, Elimination) and e.stage == index]
        assert end.survivors == tuple(genomes[i].code for i in ranking[: stage.survivors])
        assert sorted(end.survivors + end.eliminated) == sorted(seen)
        entered = ranking[: stage.survivors]
    assert survivor == (genomes[entered[0]] if entered else genomes[n])
    assert (evaluation is None) == (not entered) and (evaluation is None or evaluation.fitness == fitness[-1][entered[0]])


@pytest.mark.parametrize("tuning_tokens, why, seen", [(96, "non-finite training loss", 64), (32, "non-finite fitness", 32)])
def test_a_candidate_that_diverges_is_disqualified(small, tuning_tokens, why, seen):
    "Weights that explode give no exception and no NaN, but an infinite fitness with the reason, and the tokens really used."
    model, database = small
    evaluate = Evaluator(model, database, small_pools(), [Stage(1, tuning_tokens, 32)], Training(lr=1e30, batch_size=2))
    found = evaluate(database.space.genome([3, 3, 3, 5, 5, 5]), 0, 0)
    assert (found.fitness, found.disqualified, found.tuning_tokens) == (INF, why, seen)
    assert found.tuning_loss is None or math.isfinite(found.tuning_loss)


@pytest.mark.parametrize("stages, offspring", [((), 4), ((Stage(2, 0, 32),), 4), ((Stage(2, 0, 32), Stage(3, 0, 32), Stage(1, 0, 32)), 4), (STAGES, 1), ((Stage(0, 0, 32),), 4)])
def test_stages_must_narrow_down_to_one(stages, offspring):
    "Stages that widen, start too wide, or do not end with one survivor are refused with their numbers."
    with pytest.raises(ValueError, match=rf"narrow {offspring} offspring down to 1 survivor; got survivors \[{', '.join(str(s.survivors) for s in stages)}\]"):
        check_stages(stages, offspring)
    with pytest.raises(ValueError, match="narrow"):
        short_config(stages=stages, offspring=offspring)


@pytest.mark.parametrize("stage", [Stage(1, -1, 32), Stage(1, 0, 0)])
def test_stages_need_sensible_tokens(stage):
    "Negative tuning and absent scoring are refused; no tuning is fine, and so is the published schedule."
    with pytest.raises(ValueError, match="scoring_tokens ≥ 1 and tuning_tokens ≥ 0"):
        check_stages([stage], 4)
    check_stages([Stage(1, 0, 1)], 1)
    check_stages(PUBLISHED_STAGES, 16)


@pytest.mark.parametrize("fitness", ["kl", "perplexity"])
def test_less_than_a_block_is_scored_on_a_shorter_one(small, fitness):
    "A stage that asks for less than a block scores the beginning of one, tuned or not; the tokens are those that `drawn` says."
    model, database = small
    pools = small_pools()
    genome = database.space.genome([1] * len(database.units))
    for tuning in (0, 40):
        stage = Stage(1, tuning, 10)
        evaluation = Evaluator(model, database, pools, (stage,), fitness=fitness)(genome, 0, 0)
        assert (evaluation.tuning_tokens, evaluation.scoring_tokens) == (stage.drawn(16).tuning_tokens, stage.drawn(16).scoring_tokens) == (tuning // 16 * 16, 10)
    block = pools["scoring"].draw(16, derive_seed(0, 0, 0, "scoring"))[:, :10]
    candidate = materialize(model, database, genome, trainable=False)
    with torch.no_grad():
        logits, dense = candidate(block).logits[0], model(block).logits[0]
    expected = F.kl_div(logits.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum").item() / 10 if fitness == "kl" else F.cross_entropy(logits[:-1], block[0, 1:]).exp().item()
    assert Evaluator(model, database, pools, (Stage(1, 0, 10),), fitness=fitness)(genome, 0, 0).fitness == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage, message", [
    (Stage(1, 2048, 32), "asked for 2,048 tuning tokens, but there are 1,024"), (Stage(1, 0, 2048), "asked for 2,048 scoring tokens, but there are 1,024"),
    (Stage(1, 15, 32), "15 tuning tokens do not fill one block of 16"), (Stage(1, 0, 1), "not to 1")])
def test_too_little_text_is_noticed_at_once(small, stage, message):
    "An evaluator that could not draw its tokens is not made."
    with pytest.raises(ValueError, match=message):
        Evaluator(*small, small_pools(), (Stage(1, 0, 32), stage))


def test_what_cannot_be_scored_is_refused(small):
    "An unknown fitness, and a model whose logits are not its head's, are errors when the evaluator is made."
    with pytest.raises(ValueError, match="'bleu' is unknown; use one of kl, perplexity"):
        Evaluator(*small, small_pools(), STAGES, fitness="bleu")
    with pytest.raises(ValueError, match="Granite.* scales or caps its logits"):
        Evaluator(small_model("granite"), small[1], small_pools(), STAGES)


def test_an_evaluator_needs_tuning_text_only_if_it_tunes(small):
    "Without tuning in any stage there need be no tuning pool."
    pools = {"scoring": TokenPool("scoring", random_blocks(4, 16).int())}
    assert Evaluator(*small, pools, [Stage(1, 0, 32)])(small[1].space.genome([1] * 6), 0, 0).fitness > 0


def test_perplexity_keeps_what_is_not_finite():
    """A diverged candidate must not come out with a large but finite perplexity."""
    from evoprune_nb.losses import perplexity

    assert math.isnan(perplexity(math.nan)) and math.isinf(perplexity(math.inf)) and math.isinf(perplexity(1e4))
    assert perplexity(0.0) == 1.0


def test_a_shared_result_that_failed_is_tried_again():
    "What could not be computed once, for want of memory say, is computed when it is asked for again."
    answers = [RuntimeError("not enough memory"), torch.ones(1)]

    def head(_):
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    shared, x = selection._Shared(head), torch.zeros(1)
    with pytest.raises(RuntimeError, match="not enough memory"):
        shared(x)
    assert shared(x) is shared(x) and not answers
