"""What more devices bring is what scheduling the evaluations one by one says."""
import heapq

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from evoprune_nb.config import ActiveConfig, SearchConfig
from evoprune_nb.paper.planning import Device, plan
from evoprune_nb.paper.scaling import CandidateCost, generation_seconds, scaling_figure, side_by_side_limit
from evoprune_nb.selection import PUBLISHED_STAGES, Stage

PUBLISHED = ActiveConfig.of(SearchConfig(offspring=16, stages=PUBLISHED_STAGES))


def scheduled(config: ActiveConfig, cost: CandidateCost, groups: int, width: int) -> float:
    "Time of a generation, each candidate going to the group that is free first; stages wait for each other."
    now = 0.0
    for n, stage in zip(config.candidates, config.stages):
        free = [now] * groups
        for _ in range(n):
            heapq.heapreplace(free, free[0] + cost.seconds(stage.tuning_tokens, stage.scoring_tokens, width))
        now = max(free)
    return now


@given(st.integers(1, 20), st.integers(1, 8), st.floats(0, 1e-3), st.integers(4, 40))
def test_a_generation_takes_as_long_as_its_schedule(groups, width, transfer, offspring):
    config = ActiveConfig.of(SearchConfig(offspring=offspring, stages=(Stage(4, 0, 512), Stage(2, 4096, 512), Stage(1, 8192, 1024))))
    cost = CandidateCost(1e-4, 128, 4, transfer, 1.0)
    assert generation_seconds(config, cost, groups * width, width) == pytest.approx(scheduled(config, cost, groups, width))


def test_published_stages_limit_candidates_side_by_side():
    "1.56 million tuning tokens, 360 thousand one after another: 4.3 times, also counted with scoring."
    assert side_by_side_limit(PUBLISHED) == pytest.approx(4.3, abs=0.1)
    free = CandidateCost(1e-5, 512, 8, 0, 1)
    assert generation_seconds(PUBLISHED, free, 1, 1) / generation_seconds(PUBLISHED, free, 1000, 1) == pytest.approx(side_by_side_limit(PUBLISHED))
    with pytest.raises(ValueError, match="per_candidate must be a whole number from 1 to 4; got 8"):
        generation_seconds(PUBLISHED, free, 4, 8)


def test_wider_than_the_batch_brings_nothing():
    "Eight blocks on sixteen devices: half of them wait, and transfers cost more."
    cost = CandidateCost(1e-5, 512, 8, 1e6, 1e9)
    assert cost.seconds(8192, 1024, 16) > cost.seconds(8192, 1024, 8)


def test_devices_that_a_job_needs():
    "The smallest power of two on which the search fits; the dense model is on each of them. A figure has a panel for each model and number of devices."
    configuration = transformers.LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, vocab_size=1000, dtype="float32")
    planned = lambda memory: plan(configuration, SearchConfig(), 4096, 128, device=Device("small", memory, 1e12, 1e12))
    (_, search), dense = planned(10**12).phases, planned(10**12).dense_params * 4
    assert planned(search.memory_bytes).devices_per_candidate() == 1
    for n in (2, 4):
        fits = round(search.memory_on(n)) + 1
        assert planned(fits).devices_per_candidate() == n and search.memory_on(n) > dense
        assert f"search needs {search.memory_bytes / 1e9:,.1f} GB" in "".join(planned(fits).too_large()) and f"fits {n} that share each candidate" in "".join(planned(fits).too_large())
    assert planned(dense).devices_per_candidate() is None and "share" not in "".join(planned(dense).too_large())
    figure = scaling_figure({"a": CandidateCost(1e-5, 512, 8, 1e6, 1e9)}, {"16 offspring": PUBLISHED}, (2, 8))
    assert [axes.get_title() for axes in figure.axes] == ["a, 2 devices", "a, 8 devices"]
