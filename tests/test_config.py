"""Settings that make no sense are refused when they are written down."""
import json
import math
from dataclasses import asdict

import pytest
from helpers import short_config

from evoprune_nb.config import ActiveConfig, SearchConfig, present_event, present_settings
from evoprune_nb.target import Target


@pytest.mark.parametrize("wrong, message", [
    (dict(generations=0), "generations must be a whole number of at least 1; got 0"), (dict(generations=2.5), "of at least 1; got 2.5"), (dict(generations=math.nan), "got nan"), (dict(offspring=0), "offspring must be .*from 1 to 10,000; got 0"),
    (dict(offspring=True), "got True"), (dict(max_swaps=0), "max_swaps must be .*of at least 1; got 0"), (dict(max_swaps="3"), "got '3'"), (dict(n_jobs=0), "n_jobs must be .*of at least 1; got 0"), (dict(heldout_tokens=-1), "heldout_tokens must be .*of at least 0; got -1"),
    (dict(seed=math.nan), "seed must be a whole number; got nan"), (dict(seed="lucky"), "got 'lucky'"), (dict(target=0.5), "target must be a Target; got 0.5"), (dict(training={"lr": 1e-4}), "must be a Training"),
    (dict(stages=((4, 0, 32), (1, 64, 48))), "must be a tuple of `Stage`s; got"), (dict(stages=None), "a tuple of `Stage`s; got None"),
    (dict(warm_start="continue"), "True or False; got 'continue'"), (dict(fitness="bleu"), "'bleu' is unknown"), (dict(operator="crossover"), "'crossover' is unknown")])
def test_wrong_settings_are_refused_at_once(wrong, message):
    "Wrong types, NaN, negative numbers, unknown names: by `SearchConfig` itself, and so by the settings in force."
    for kind in (SearchConfig, ActiveConfig):
        with pytest.raises(ValueError, match=message):
            kind(**wrong)


@pytest.mark.parametrize("old, new", [
    (dict(sparsity=0.5, params=None, limits=None, caps=None, tolerance=0.01), SearchConfig()), (dict(sparsity=None, params=50_000, tolerance=0.1), SearchConfig(Target(params=50_000, tolerance=0.1))),
    (dict(sparsity=None, limits={"flops": 0.5}, caps={"min_heads": 1}), SearchConfig(Target(limits={"flops": 0.5}, caps={"min_heads": 1}))),
    (dict(restart="continue", max_flips=2, at_once=3), SearchConfig(warm_start=True, max_swaps=2, n_jobs=3)), (dict(restart="restart"), SearchConfig())])
def test_settings_of_version_0_1(old, new):
    "Flat sizes and old names mean what they meant; settings of today pass through."
    assert SearchConfig.from_dict(old) == new
    row = json.loads(json.dumps(asdict(new)))
    assert present_settings(row) == row and SearchConfig.from_dict(row) == new


def test_events_of_version_0_1():
    "Only the name of a setting changes; all else in an event stays."
    old = {"event": "command", "n": 1, "command": {"command": "set", "setting": "max_flips", "value": 2, "when": "next"}}
    assert present_event(old) == old | {"command": old["command"] | {"setting": "max_swaps"}}
    for row in ({"event": "generation", "offspring": ["max_flips"]}, {"event": "command", "command": {"command": "note", "text": "max_flips"}}):
        assert present_event(row) == row


def test_config_from_json_is_the_config():
    config = short_config(params=60_000, caps={"max_width": 40}, warm_start=True)
    assert SearchConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(TypeError, match="colour"):
        SearchConfig.from_dict({"colour": "red"})
