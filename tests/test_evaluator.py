"Fitness is the divergence it claims to be, and a pure function of genome, generation and stage."
import math

import pytest
import torch
from helpers import peak_of_tensors, random_blocks, small_model, small_pools
from torch.nn import functional as F

from evoprune_nb import evaluator as evaluator_module, warm_start
from evoprune_nb.candidates import materialize
from evoprune_nb.config import SearchConfig
from evoprune_nb.data import TokenPool, derive_seed, load_pools
from evoprune_nb.genome import Genome
from evoprune_nb.models import decoder_layers, load_model, model_fingerprint
from evoprune_nb.database import build_database
from evoprune_nb.selection import FITNESS, Evaluation, Stage, select
from evoprune_nb.evaluator import Evaluator, SharedHead, first_own_layer, most_common, score, score_blocks, start_from_reference
from evoprune_nb.training import Training, TrainingResult, train
from test_losses import direct_kl

STAGES = (Stage(2, 0, 32), Stage(1, 64, 48))
INF = math.inf


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


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_own_fitness(small, monkeypatch, n_jobs):
    "A function under a name in `FITNESS` gets the candidate, tuned or not, and the text of its stage; the default's text is scored as ever."
    model, database = small
    monkeypatch.setitem(FITNESS, "worst block", lambda candidate, text: max(score_blocks(candidate, text)))
    genomes = [database.space.genome(levels) for levels in ([3, 3, 3, 5, 5, 5], [2, 4, 3, 5, 5, 5])]
    own, usual = (Evaluator(model, database, small_pools(), STAGES, fitness=name, n_jobs=n_jobs, by_block=name == "kl") for name in ("worst block", "kl"))
    for stage in (0, 1):
        found, expected = (list(evaluator.evaluate_stage(genomes, 0, stage)) for evaluator in (own, usual))
        assert [e.fitness for e in found] == pytest.approx([max(e.blocks) for e in expected], abs=2e-6)
    assert max(expected[0].blocks) > expected[0].fitness  # so that the two differ


def test_own_fitness_that_is_no_number_disqualifies(small, monkeypatch):
    model, database = small
    monkeypatch.setitem(FITNESS, "nothing", lambda candidate, text: math.nan)
    evaluation = Evaluator(model, database, small_pools(), STAGES, fitness="nothing")(database.space.genome([3, 3, 3, 5, 5, 5]), 0, 0)
    assert evaluation.fitness == INF and evaluation.disqualified == "non-finite fitness"


def test_own_fitness_has_no_blocks(small, monkeypatch):
    "Where candidates are compared block by block, it is refused by name."
    model, database = small
    monkeypatch.setitem(FITNESS, "mine", lambda candidate, text: 0.0)
    with pytest.raises(ValueError, match="'mine' gives one number.*kl or perplexity"):
        Evaluator(model, database, small_pools(), STAGES, fitness="mine", by_block=True)
    with pytest.raises(ValueError, match="'mine' gives one number.*kl or perplexity"):
        SearchConfig(fitness="mine", method="elastic")


def test_candidates_of_a_stage_see_the_same_tokens(small, monkeypatch):
    "Within a stage all are tuned and scored on the same blocks in the same order; other stages and generations get others."
    model, database = small
    tuned, scored, real_hidden = {}, {}, evaluator_module.final_hidden
    evaluate = Evaluator(model, database, small_pools(), (Stage(2, 64, 64), Stage(1, 64, 64)))
    monkeypatch.setattr(warm_start, "train", lambda candidate, blocks, settings, **_: tuned[now].append(blocks.tolist()) or TrainingResult(blocks.numel(), [1.0]))
    monkeypatch.setattr(evaluator_module, "final_hidden", lambda m, blocks: (scored[now].append(blocks.tolist()) if m is not model else None, real_hidden(m, blocks))[1])
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
            assert evaluation.fitness == fresh(genome, 5, stage).fitness == score(candidate, fresh.scoring_text(5, stage))
            assert evaluation.tuning_tokens == CONTINUED[stage].tuning_tokens


def test_continued_survivors_train_on_the_additional_tokens_only(small, monkeypatch):
    "Survivors of the stage before are not trained again on what they have seen; no more candidates are held than can survive."
    model, database = small
    genomes, trained, real = [database.space.genome([3, 3, 3, 5, 5, 3 + i]) for i in range(4)], [], warm_start.train
    monkeypatch.setattr(warm_start, "train", lambda candidate, blocks, *args, **options: trained.append(blocks.numel()) or real(candidate, blocks, *args, **options))
    evaluate = Evaluator(model, database, small_pools(), CONTINUED, Training(batch_size=2), warm_start=True)
    first = sorted((evaluate(genome, 0, 0) for genome in genomes), key=lambda evaluation: evaluation.fitness)
    assert trained == [32] * 4 and sorted(code for _, code in evaluate.tuner.kept.tuned) == sorted(e.genome for e in first[:3])
    for evaluation in first[:3]:
        evaluate(Genome.parse(evaluation.genome), 0, 1)
    assert trained[4:] == [32] * 3 and len(evaluate.tuner.kept.tuned) == 2
    parent = database.space.genome([3, 3, 3, 5, 4, 6])
    evaluate(parent, 0, 2)
    assert trained[7:] == [32, 32, 64]  # the parent joins last and catches up
    evaluate(genomes[0], 1, 0)
    assert {generation for generation, _ in evaluate.tuner.kept.tuned} == {1}


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
        torch.set_num_threads(n_cores)
        return evaluate

    def results(n_jobs: int, n_cores: int) -> list:
        evaluate = evaluator(n_jobs, n_cores)
        happened = list(select(family[-1], family[:4], stages, evaluate.evaluate_stage, 2))
        assert torch.get_num_threads() == n_cores
        return [(e.genome, e.stage, e.fitness, e.tuning_loss, e.tuning_tokens, e.scoring_tokens) if isinstance(e, Evaluation) else e for e in happened]

    try:
        assert results(1, 1) == results(2, 1) == results(3, 1) == results(8, 1)
        whole = results(3, 6)
        for begin in range(4):
            evaluate = evaluator(3, 6)
            assert [e.fitness for e in evaluate.evaluate_stage(family[:4], 2, 0, start=begin)] == [row[2] for row in whole[begin:4]]
    finally:
        torch.set_num_threads(threads)


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
    reference = database.space.genome([2, 3, 3, 5, 5, 5])
    changes = {0: [3, 3, 3, 5, 5, 5], 1: [2, 3, 3, 5, 10, 5], 2: [2, 3, 3, 5, 5, 10]}
    genomes = [database.space.genome(levels) for levels in changes.values()]
    assert most_common(genomes) == most_common([*genomes, reference]) == reference
    assert [first_own_layer(database, genome, reference) for genome in genomes] == list(changes)
    for candidates in (genomes, [*genomes, reference], genomes[:2]):
        found = list(reusing.evaluate_stage(candidates, 0, 0))
        assert reusing.scoring_text(0, 0).reference == most_common(candidates)
        assert [e.fitness for e in found] == [plain(genome, 0, 0).fitness for genome in candidates]
    genome, text = genomes[2], reusing.scoring_text(0, 0)
    start_from_reference(text, model, database, reference)
    calls, (_, layers) = [], decoder_layers(candidate := materialize(model, database, genome))
    layers[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    score(candidate, text, first_own_layer(database, genome, reference))
    assert not calls and score(candidate, text) == plain(genome, 0, 0).fitness and calls
    tuning = Evaluator(model, database, pools, (Stage(1, 64, 96),))
    before = [tuning(genome, 0, 0).fitness for genome in genomes]
    start_from_reference(tuning.scoring_text(0, 0), model, database, reference)
    assert [e.fitness for e in tuning.evaluate_stage(genomes, 0, 0)] == before


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


@pytest.mark.parametrize("tuning_tokens, why, seen", [(96, "non-finite training loss", 64), (32, "non-finite fitness", 32)])
def test_a_candidate_that_diverges_is_disqualified(small, tuning_tokens, why, seen):
    "Weights that explode give no exception and no NaN, but an infinite fitness with the reason, and the tokens really used."
    model, database = small
    evaluate = Evaluator(model, database, small_pools(), [Stage(1, tuning_tokens, 32)], Training(lr=1e30, batch_size=2))
    found = evaluate(database.space.genome([3, 3, 3, 5, 5, 5]), 0, 0)
    assert (found.fitness, found.disqualified, found.tuning_tokens) == (INF, why, seen)
    assert found.tuning_loss is None or math.isfinite(found.tuning_loss)


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


def test_a_shared_result_that_failed_is_tried_again():
    "What could not be computed once, for want of memory say, is computed when it is asked for again."
    answers = [RuntimeError("not enough memory"), torch.ones(1)]

    def head(_):
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    shared, x = SharedHead(head), torch.zeros(1)
    with pytest.raises(RuntimeError, match="not enough memory"):
        shared(x)
    assert shared(x) is shared(x) and not answers
