"Survival in stages is fair, and stages that cannot be are refused."
import math

import pytest
from helpers import short_config
from hypothesis import given
from hypothesis import strategies as st

from evoprune_nb.genome import Genome
from evoprune_nb.selection import PUBLISHED_STAGES, Elimination, Evaluation, OneByOne, Stage, check_stages, select

INF = math.inf
STAGES = (Stage(2, 0, 32), Stage(1, 64, 48))


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

    happened, selecting = [], select(genomes[n], genomes[:n], stages, OneByOne(evaluate).evaluate_stage, 7)
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


@pytest.mark.parametrize("stages, offspring", [((), 4), ((Stage(2, 0, 32),), 4), ((Stage(2, 0, 32), Stage(3, 0, 32), Stage(1, 0, 32)), 4), (STAGES, 1)])
def test_stages_must_narrow_down_to_one(stages, offspring):
    "Stages that widen, start too wide, or do not end with one survivor are refused with their numbers."
    with pytest.raises(ValueError, match=rf"narrow {offspring} offspring down to 1 survivor; got survivors \[{', '.join(str(s.survivors) for s in stages)}\]"):
        check_stages(stages, offspring)
    with pytest.raises(ValueError, match="narrow"):
        short_config(stages=stages, offspring=offspring)


@pytest.mark.parametrize("wrong, message", [
    ((0, 0, 32), "survivors .*at least 1; got 0"), ((1, -1, 32), "tuning_tokens .*at least 0; got -1"), ((1, 0, 0), "scoring_tokens .*at least 1; got 0"),
    ((1, math.nan, 32), "tuning_tokens .*got nan"), ((1, 0, 1e3), "scoring_tokens .*got 1000.0"), ((True, 0, 32), "survivors .*got True")])
def test_stages_need_sensible_tokens(wrong, message):
    "Negative tuning and absent scoring are refused; no tuning is fine, and so is the published schedule."
    with pytest.raises(ValueError, match=message):
        Stage(*wrong)
    check_stages([Stage(1, 0, 1)], 1)
    check_stages(PUBLISHED_STAGES, 16)
