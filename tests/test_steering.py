"""Commands are checked before they are queued, change the rules as they say, are logged where they took effect, and leave a search that can be resumed."""
import json
import os
from dataclasses import asdict

import pytest
from helpers import by, events, made_up, short_config, small_pools, spaces
from hypothesis import given
from hypothesis import strategies as st

from evoprune_nb.genome import Genome
from evoprune_nb.history import History
from evoprune_nb.mutation import make_offspring
from evoprune_nb.runlog import RunDiverged
from evoprune_nb.search import Search
from evoprune_nb.source import Source
from evoprune_nb.selection import Elimination, Evaluation, Stage
from evoprune_nb.steering import COMMANDS, SETTINGS, apply_command, check_command, describe
from evoprune_nb.config import ActiveConfig, SearchConfig, generation_tokens
from evoprune_nb.target import Target, plan_budget
from evoprune_nb.training import Training


def fake(run_dir, small, config=None, evaluator=made_up, **options) -> Search:
    return Search(run_dir, *small, small_pools(), config or short_config(), by(evaluator), **options)


def steps(search: Search, n: int) -> list:
    return [search.step() for _ in range(n)]


def set_(setting: str, value, when: str = "next") -> dict:
    return {"command": "set", "setting": setting, "value": value, "when": when}


def kinds(run_dir) -> list[str]:
    "Events of a run as words."
    return [row["event"] + (":" + row["command"]["command"] if row["event"] == "command" else "") for row in events(run_dir)]


def generations(run_dir) -> list[dict]:
    return [row for row in events(run_dir) if row["event"] == "generation"]


WRONG = [
    ("pause", "a command is a dict"), ({}, "a command is a dict"), ({"command": "reverse"}, "'reverse' is unknown; use one of pause"), ({"command": "pause", "for": 3}, "'pause' has no field 'for'"),
    ({"command": "set", "setting": "offspring"}, "'set' needs value"), (set_("lambda", 3), "setting 'lambda' is unknown; use one of offspring"),
    (set_("offspring", 2.5), "offspring must be a whole number; got 2.5"), (set_("offspring", True), "whole number; got True"), (set_("offspring", "8"), "whole number; got '8'"),
    (set_("offspring", 1), r"must narrow 1 offspring down to 1 survivor; got survivors \[2, 1\]"), (set_("max_swaps", 0), "max_swaps must be .*of at least 1; got 0"), (set_("generations", 0), "generations must be .*of at least 1; got 0"),
    (set_("operator", "crossover"), "'crossover' is unknown"), (set_("operator", 3), "operator must be a name"), (set_("fitness", "bleu"), "'bleu' is unknown"),
    (set_("lr", "fast"), "lr must be a finite number"), (set_("lr", -1.0), "lr must be .*above 0; got -1.0"), (set_("sparsity", 1.5), "sparsity, a share of the structures, must be .*from 0 to 1; got 1.5"), (set_("params", 10), "10 parameters are outside"),
    (set_("limits", 0.5), "limits must be like"), (set_("limits", {"beauty": 0.5}), "beauty"), (set_("limits", {"flops": 3.0}), "flops"), (set_("sparsity", None), "nothing limits the size"),
    (set_("stages", [[2, 0]]), "rows of three whole numbers"), (set_("stages", []), "rows of three"), (set_("stages", 3), "rows of three"), (set_("stages", [{"survivors": 1, "tokens": 3}]), "rows of three"),
    (set_("stages", [[2, 0, 32]]), "must narrow"), (set_("stages", [[1, 5000, 32]]), "asked for 5,000 tuning tokens, but there are"), (set_("stages", [[1, 0, 5000]]), "asked for 5,000 scoring tokens"),
    (set_("offspring", 6, when="soon"), "when 'soon' is unknown; use one of next, now"), ({"command": "step", "what": "day"}, "what 'day' is unknown"),
    ({"command": "freeze", "units": ["attn.99"]}, r"from attn.00 to mlp.02; got \['attn.99'\]"), ({"command": "thaw", "units": "attn.00"}, "units must be names"), ({"command": "freeze", "units": []}, "units must be names"),
    ({"command": "freeze", "units": [f"{kind}.0{i}" for kind in ("attn", "mlp") for i in range(3)]}, r"0 of 4 distinct offspring .*6 of 6 units frozen"),
    ({"command": "inject", "genome": "x"}, "is no genome"), ({"command": "inject", "genome": "33/555"}, "2 attention and 3 MLP levels"), ({"command": "inject", "genome": "000/000"}, "genome 000/000 has .* parameters; the budget is"),
    ({"command": "inject", "genome": "339/555"}, "attn.02 at level 9"), ({"command": "branch", "generation": 1}, "has not begun yet"), ({"command": "branch", "generation": -1}, "whole number from 0"),
    ({"command": "branch", "generation": 1.0}, "whole number"), ({"command": "note", "text": " "}, "a note needs text"), ({"command": "note", "text": 3}, "a note needs text"), ({"command": "note", "text": "half of a pair: \ud83d"}, r"UTF-8 can hold; got .*ud83d"),
    (set_("lr", float("nan")), "lr must be a finite number; got nan"), (set_("sparsity", float("nan")), "sparsity must be a finite number; got nan"), (set_("params", -3), "params.* must be .*of at least 0; got -3"), (set_("limits", {"flops": float("nan")}), "got nan"),
]


@pytest.mark.parametrize("command, message", WRONG)
def test_wrong_commands_are_refused_before_they_are_queued(small, tmp_path, command, message):
    "The error says what was seen and what would be right; neither queue nor log has anything of it."
    search = fake(tmp_path / "run", small)
    with pytest.raises(ValueError, match=message):
        search.send(command)
    search.step()
    assert not any("command" in kind for kind in kinds(tmp_path / "run"))


def test_the_check_answers_with_the_command_in_full(small):
    "Defaults are filled in, stages become rows with names, units are sorted, and the given dict stays as it was."
    space, rules = small[1].space, ActiveConfig.of(short_config())
    given_ = {"command": "set", "setting": "stages", "value": [(2, 0, 32), [1, 64, 48]]}
    before = json.dumps(given_)
    assert check_command(given_, rules, space) == {"command": "set", "when": "next", "setting": "stages", "value": [asdict(Stage(2, 0, 32)), asdict(Stage(1, 64, 48))]}
    assert json.dumps(given_) == before
    assert check_command({"command": "step"}, rules, space) == {"command": "step", "what": "evaluation"}
    assert check_command({"command": "freeze", "units": ("mlp.01", "attn.00", "mlp.01")}, rules, space)["units"] == ["attn.00", "mlp.01"]
    assert check_command({"command": "set", "setting": "lr", "value": 1}, rules, space)["value"] == 1.0
    for name, command in COMMANDS.items():
        assert command.help and all(command.fields.values()), name


@pytest.mark.parametrize("setting, value, expected", [
    ("offspring", 6, dict(offspring=6)), ("max_swaps", 1, dict(max_swaps=1)), ("generations", 9, dict(generations=9)), ("n_jobs", 2, dict(n_jobs=2)), ("fitness", "perplexity", dict(fitness="perplexity")),
    ("lr", 0.5, dict(training=Training(lr=0.5, batch_size=2))), ("sparsity", 0.3, dict(sparsity=0.3)), ("params", 50_000, dict(params=50_000)),
    ("limits", {"flops": 0.9}, dict(sparsity=0.5, limits={"flops": 0.9})), ("stages", [{"survivors": 1, "tuning_tokens": 0, "scoring_tokens": 64}], dict(stages=(Stage(1, 0, 64),))), ("operator", "level_swap", {})])
def test_each_setting_can_be_changed(setting, value, expected):
    "The rules after a command are the old ones but for what it names; and they are settings, checked like those."
    config = short_config()
    changed = apply_command(ActiveConfig.of(config), set_(setting, value))
    assert changed == ActiveConfig.of(short_config(**expected)) and setting in SETTINGS
    assert isinstance(changed, SearchConfig) and changed.lr == changed.training.lr
    assert describe(set_(setting, value)).startswith(f"{setting} → ") and describe(set_(setting, value, "now")).endswith(" (now)")


@given(frozen=st.lists(st.tuples(st.sampled_from(("freeze", "thaw")), st.sets(st.sampled_from("abcdef"), min_size=1)), max_size=8))
def test_freeze_and_thaw_are_set_operations(frozen):
    "What is frozen is the union of what was frozen, less what was thawed since."
    rules, expected = ActiveConfig.of(short_config()), set()
    for name, units in frozen:
        rules = apply_command(rules, {"command": name, "units": sorted(units)})
        expected = expected | units if name == "freeze" else expected - units
    assert set(rules.frozen) == expected and list(rules.frozen) == sorted(expected)


@given(space=spaces(), sparsity=st.sampled_from((0.3, 0.5, 0.6)))
def test_injected_genomes_must_meet_the_budget(space, sparsity):
    "The uniform genome of the target is accepted, one of another size is not."
    rules = ActiveConfig.of(SearchConfig(Target(sparsity)))
    budget, start = plan_budget(space, rules.target)
    assert check_command({"command": "inject", "genome": start}, rules, space)["genome"] == start.code
    dense = space.genome([0] * len(space.units))
    if not budget.contains(space, dense):
        with pytest.raises(ValueError, match="the budget is"):
            check_command({"command": "inject", "genome": dense.code}, rules, space)


@pytest.mark.parametrize("warm_start", [False, True])
def test_planned_tokens_are_those_that_a_generation_takes(small, tmp_path, warm_start):
    "Counted off real evaluations: tokens actually trained on and scored, in whole blocks."
    config = short_config(generations=1, warm_start=warm_start, stages=(Stage(3, 40, 32), Stage(2, 64, 50), Stage(1, 150, 48)))
    search = Search(tmp_path / "run", *small, small_pools(), config)
    search.run(progress=False)
    assert History(tmp_path / "run").tokens == generation_tokens(ActiveConfig.of(config), seq_len=16)


# --- commands in a search


def test_every_command_is_logged_where_it_came(small, tmp_path):
    "Before the next evaluation, in order, numbered, with generation and branch; pause, resume and step too."
    search = fake(tmp_path / "run", small)
    search.send({"command": "note", "text": "before"})
    steps(search, 2)
    sent = [{"command": "pause"}, {"command": "resume"}, {"command": "step", "what": "generation"}, {"command": "note", "text": "ünï\ncode"}, {"command": "stop"}]
    for command in sent:
        search.send(command)
    assert kinds(tmp_path / "run")[:4] == ["run_started", "command:note", "generation", "evaluation"]
    search.step()
    assert kinds(tmp_path / "run") == ["run_started", "command:note", "generation", "evaluation", "evaluation", *[f"command:{command['command']}" for command in sent], "evaluation"]
    rows = [row for row in events(tmp_path / "run") if row["event"] == "command"]
    assert [row["n"] for row in rows] == list(range(6)) and [row["command"] for row in rows[1:]] == sent and all(row["generation"] == 0 and "refused" not in row for row in rows)


def test_next_and_now(small, tmp_path):
    "`next` leaves the generation under way alone; `now` abandons it and begins it anew, by the new rules, from the same parent."
    search = fake(tmp_path / "run", small, short_config(generations=2))
    search.step()
    search.send(set_("offspring", 6))
    steps(search, 3)
    search.send(set_("max_swaps", 1, when="now"))
    search.step()
    search.run(progress=False)
    first, again, second = generations(tmp_path / "run")
    assert (len(first["offspring"]), len(again["offspring"]), len(second["offspring"])) == (4, 6, 6)
    assert first["parent"] == again["parent"] and first["generation"] == again["generation"] == 0 and second["generation"] == 1
    words = kinds(tmp_path / "run")
    assert words[:9] == ["run_started", "generation", "evaluation", "command:set", "evaluation", "evaluation", "evaluation", "command:set", "abandoned"] and words.count("abandoned") == 1
    parent = Genome.parse(again["parent"])
    assert all(Genome.parse(code).distance(parent) == 2 for code in again["offspring"])  # one flip


def test_now_between_generations_abandons_nothing(small, tmp_path):
    "When no generation is under way, there is nothing to abandon."
    search = fake(tmp_path / "run", small)
    while not isinstance(happened := search.step(), Elimination) or happened.stage == 0:
        pass
    search.send(set_("offspring", 5, when="now"))
    search.run(progress=False)
    assert "abandoned" not in kinds(tmp_path / "run") and [len(row["offspring"]) for row in generations(tmp_path / "run")] == [4, 5, 5]


def test_frozen_units_keep_their_level(small, tmp_path):
    "From the next generation on no offspring changes them, until they are thawed."
    search = fake(tmp_path / "run", small, short_config(generations=12))
    steps(search, 1)
    search.send({"command": "freeze", "units": ["attn.00", "mlp.02"]})
    while search.generation < 8:
        search.step()
    search.send({"command": "thaw", "units": ["attn.00", "mlp.02"]})
    search.run(progress=False)
    levels = lambda code: (Genome.parse(code).attn[0], Genome.parse(code).mlp[2])
    rows = generations(tmp_path / "run")
    frozen = [row for row in rows if 1 <= row["generation"] <= 7]
    assert len({levels(code) for row in frozen for code in (row["parent"], *row["offspring"])}) == 1
    assert len({levels(code) for row in rows[8:] for code in row["offspring"]}) > 1


def test_injected_genome_competes_once(small, tmp_path):
    "It joins the next generation beside λ offspring, is evaluated, and the event says so; twice the same, the parent, or a change of frozen units is refused."
    search = fake(tmp_path / "run", small)
    steps(search, 1)
    others = make_offspring(search.start, search.space, search.budget, 40, search_rng(7))
    mine = next(genome for genome in others if genome.levels[0] == search.start.levels[0] and genome.code not in generations(tmp_path / "run")[0]["offspring"])
    search.send({"command": "inject", "genome": mine.code})
    for wrong, message in ((mine.code, "waits already"), (search.start.code, "is the parent")):
        with pytest.raises(ValueError, match=message):
            search.send({"command": "inject", "genome": wrong})
    search.send({"command": "freeze", "units": ["attn.00"]})
    moved = next(genome for genome in others if genome.levels[0] != search.start.levels[0])
    with pytest.raises(ValueError, match="changes frozen units .attn.00.; thaw them first"):
        search.send({"command": "inject", "genome": moved.code})
    search.run(progress=False)
    first, second, third = generations(tmp_path / "run")
    assert mine.code not in first["offspring"] and second["injected"] == [mine.code] and mine.code in second["offspring"] and len(second["offspring"]) in (4, 5) and "injected" not in third
    history = History(tmp_path / "run")
    assert mine.code in set(history.evaluations.query("generation == 1 and stage == 0").genome)
    assert history.generations.injected.tolist() == [[], [mine.code], []]


def search_rng(seed: int):
    import random

    return random.Random(seed)


def test_injected_into_an_abandoned_generation_it_joins_again(small, tmp_path):
    "Who was injected competes in the generation that takes the abandoned one's place."
    search = fake(tmp_path / "run", small)
    mine = make_offspring(search.start, search.space, search.budget, 1, search_rng(11))[0]
    search.send({"command": "inject", "genome": mine.code})
    steps(search, 2)
    search.send(set_("offspring", 5, when="now"))
    search.run(progress=False)
    assert [row.get("injected") for row in generations(tmp_path / "run")][:3] == [[mine.code], [mine.code], None]


def test_a_moved_target_retargets_the_parent(small, tmp_path):
    "The next generation's parent meets the new budget; the event lists the changes; all offspring meet it too, and the winner."
    search = fake(tmp_path / "run", small)
    old = search.budget
    steps(search, 2)
    search.send(set_("sparsity", 0.3))
    search.run(progress=False)
    first, second, third = generations(tmp_path / "run")
    space, survivor = search.space, next(row["genome"] for row in events(tmp_path / "run") if row["event"] == "survivor")
    assert "retarget" not in first and second["retarget"] and "retarget" not in third
    levels = dict(zip((unit.name for unit in space.units), Genome.parse(survivor).levels))
    for row in second["retarget"]:
        assert levels[row["unit"]] == row["from"] != row["to"]
        levels[row["unit"]] = row["to"]
    assert space.genome(list(levels.values())).code == second["parent"]
    assert all(search.budget.contains(space, Genome.parse(code)) for row in (second, third) for code in (row["parent"], *row["offspring"]))
    assert not old.contains(space, search.parent) and search.budget.contains(space, search.parent)
    assert History(tmp_path / "run").generations.retarget.tolist()[1] == second["retarget"]


def test_retargeting_respects_frozen_units_or_is_refused(small, tmp_path):
    "What cannot be met with the frozen units is refused when it is sent."
    search = fake(tmp_path / "run", small)
    frozen = ["attn.00", "mlp.00"]
    search.send({"command": "freeze", "units": frozen})
    with pytest.raises(ValueError, match="frozen|cannot"):
        search.send(set_("sparsity", 0.95))
    search.send(set_("sparsity", 0.4, when="now"))
    search.run(progress=False)
    start, parent = search.start, Genome.parse(generations(tmp_path / "run")[0]["parent"])
    assert [parent.levels[i] for i in (0, 3)] == [start.levels[i] for i in (0, 3)] and parent != start


def test_branch_goes_back_and_on_with_other_seeds(small, tmp_path):
    "A new branch begins with the parent of the generation, the rules stay, offspring differ from those of the old branch; a branch of a branch knows its line."
    search = fake(tmp_path / "run", small, short_config(generations=5))
    while search.generation < 3:
        search.step()
    search.send(set_("offspring", 6))
    steps(search, 2)
    search.send({"command": "branch", "generation": 1})
    while search.position.branch == 0 or search.generation < 3:
        search.step()
    search.send({"command": "branch", "generation": 2})
    search.run(progress=False)
    history = History(tmp_path / "run")
    assert history.line == [(0, 0), (1, 1), (2, 2), (2, 3), (2, 4)] and history.branch == 2 and history.winner == search.parent
    rows = {(row.get("branch", 0), row["generation"]): row for row in generations(tmp_path / "run")}
    assert rows[1, 1]["parent"] == rows[0, 1]["parent"] and rows[2, 2]["parent"] == rows[1, 2]["parent"]
    assert rows[1, 1]["offspring"][:4] != rows[0, 1]["offspring"] and len(rows[1, 1]["offspring"]) == 6
    for a, b in zip(history.line, history.line[1:]):
        survivor = history.survivors.set_index(["branch", "generation"]).genome[a]
        assert rows[b]["parent"] == survivor
    assert kinds(tmp_path / "run").count("abandoned") == 1  # the first branch began inside a generation, the second between two


def test_a_finished_search_goes_on_when_asked_to(small, tmp_path):
    "More generations, or a branch, after the end; the log has two ends then, and the reopened run is finished."
    search = fake(tmp_path / "run", small)
    first = search.run(progress=False)
    assert search.finished and search.step() is None
    search.send(set_("generations", 5))
    assert isinstance(search.step(), Evaluation) and not search.finished
    search.run(progress=False)
    search.send({"command": "branch", "generation": 4})
    winner = search.run(progress=False)
    assert kinds(tmp_path / "run").count("finished") == 3 and History(tmp_path / "run").finished and len(History(tmp_path / "run").line) == 5
    again = fake(tmp_path / "run", small, evaluator=unexpected)
    assert again.finished and again.parent == winner and again.run(progress=False) == winner and again.step() is None
    assert History(tmp_path / "run").at(2).winner == first


def unexpected(*_):
    raise AssertionError("evaluated again")


def test_fewer_generations_end_the_search(small, tmp_path):
    "Lowered below the present number, the generation under way is the last."
    search = fake(tmp_path / "run", small, short_config(generations=9))
    while search.generation < 2:
        search.step()
    search.step()
    search.send(set_("generations", 1))
    search.run(progress=False)
    assert search.finished and search.generation == 3


def test_what_no_longer_holds_when_it_is_applied_is_logged_as_refused(small, tmp_path):
    "The generation a genome was meant for may have another budget by then: nothing changes, and the log says why."
    search = fake(tmp_path / "run", small)
    mine = make_offspring(search.start, search.space, search.budget, 1, search_rng(5))[0]
    with search.driving():
        search.engine.apply(set_("sparsity", 0.3))
        row = search.engine.apply({"command": "inject", "genome": mine.code, "when": "next"})
    assert "the budget is" in row["refused"]
    search.run(progress=False)
    history = History(tmp_path / "run")
    assert history.commands.refused.notna().tolist() == [False, True] and mine.code not in history.generations.offspring[0]


def test_rules_decide_how_candidates_are_evaluated(small, tmp_path):
    "Real evaluations after `set`: tokens of the new stages, the new fitness, a fresh evaluator for each branch; frozen units and budgets hold for the real models."
    search = Search(tmp_path / "run", *small, small_pools(), short_config(generations=2))
    steps(search, 5)
    search.send(set_("stages", [[2, 32, 16], [1, 96, 32]], when="now"))
    search.send(set_("fitness", "perplexity"))
    search.send(set_("lr", 0.01))
    search.run(progress=False)
    search.send({"command": "branch", "generation": 1})
    search.run(progress=False)
    history = History(tmp_path / "run")
    frame = history.evaluations
    assert (frame.fitness > 5).all()  # a perplexity of 100 random tokens, not a KL
    assert frame.groupby("stage").tuning_tokens.unique().map(list).tolist() == [[32], [96]] and frame.groupby("stage").scoring_tokens.unique().map(list).tolist() == [[16], [32]]
    assert history.abandoned.scoring_tokens.unique().tolist() == [32] and len(history.abandoned) == 4
    parent = frame[frame.is_parent & (frame.generation == 1)].set_index("branch").fitness
    assert parent[0] != parent[1]  # the same genome on other tokens


@pytest.mark.parametrize("warm_start", [False, True])
def test_steered_real_evaluations_resume_to_the_same_numbers(small, tmp_path, warm_start):
    "A run with all kinds of commands, killed at a dozen places, its remaining commands sent again at theirs: bitwise the same events."
    from evoprune_nb.replay import commands_of, follow

    config = short_config(warm_start=warm_start, stages=(Stage(3, 32, 32), Stage(2, 64, 32), Stage(1, 128, 48)))
    search = Search(tmp_path / "run", *small, small_pools(), config)
    for command in (set_("lr", 0.01), {"command": "freeze", "units": ["mlp.00"]}, set_("sparsity", 0.4, "now"), set_("offspring", 5, "now"), {"command": "branch", "generation": 0}, set_("fitness", "perplexity")):
        steps(search, 4)
        search.send(command)
    winner = search.run(progress=False)
    expected, log = events(tmp_path / "run"), (tmp_path / "run" / "events.jsonl").read_bytes()
    for i in range(6):
        copy = tmp_path / str(i)
        copy.mkdir()
        (copy / "config.json").write_bytes((tmp_path / "run" / "config.json").read_bytes())
        (copy / "events.jsonl").write_bytes(log[: len(log) * i // 6 + 7 * i])
        assert follow(Search(copy, *small, small_pools(), config), commands_of(tmp_path / "run"), progress=False) == winner
        assert events(copy) == expected, i


def test_a_steered_run_killed_at_any_byte_continues_to_the_same_end(small, tmp_path, monkeypatch):
    "Cut anywhere after its last command, the reopened run, driven by `run` alone, writes the same events; cut anywhere at all, it does when the rest of the commands come again."
    from evoprune_nb.replay import commands_of, follow

    monkeypatch.setattr(os, "fsync", lambda _: None)
    search = fake(tmp_path / "run", small)
    steps(search, 3)
    search.send(set_("sparsity", 0.4, "now"))
    steps(search, 9)
    search.send({"command": "branch", "generation": 1})
    search.send(set_("offspring", 5))
    winner = search.run(progress=False)
    log, expected, commands = (tmp_path / "run" / "events.jsonl").read_bytes(), events(tmp_path / "run"), commands_of(tmp_path / "run")
    last = log.rindex(b'{"event": "command"')
    last = log.index(b"\n", last) + 1
    ends = [i + 1 for i, byte in enumerate(log) if byte == 10]
    for size in sorted({size + d for size in ends for d in (-1, 0, 1) if size + d <= len(log)} | set(range(0, len(log), 101))):
        copy = tmp_path / str(size)
        copy.mkdir()
        (copy / "config.json").write_bytes((tmp_path / "run" / "config.json").read_bytes())
        (copy / "events.jsonl").write_bytes(log[:size])
        again = fake(copy, small)
        assert (again.run(progress=False) if size >= last else follow(again, commands, progress=False)) == winner, size
        assert events(copy) == expected, size


def test_tampered_commands_are_noticed(small, tmp_path):
    "A record in which a command says something else does not pass: what follows from it is not what is recorded."
    search = fake(tmp_path / "run", small)
    steps(search, 2)
    search.send(set_("offspring", 6))
    search.run(progress=False)
    text = (tmp_path / "run" / "events.jsonl").read_text()
    (tmp_path / "run" / "events.jsonl").write_text(text.replace('"value": 6', '"value": 5'))
    with pytest.raises(ValueError, match="events.jsonl is damaged"):
        fake(tmp_path / "run", small)
    rows = [json.loads(line) | {"crc": None} for line in text.replace('"value": 6', '"value": 5').splitlines()]
    (tmp_path / "run" / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # without checksums, as in version 0.1
    with pytest.raises(RunDiverged, match="another .*offspring"):
        fake(tmp_path / "run", small).run(progress=False)


def test_settings_of_an_earlier_version_are_resumed(small, tmp_path):
    "A run directory without the fields that came later, and without their events' new fields, opens in History and goes on if the settings agree."
    search = fake(tmp_path / "run", small, source=Source("tiny"))
    steps(search, 6)
    path = tmp_path / "run" / "config.json"
    row = json.loads(path.read_text())
    del row["sha256"], row["format"]
    target = row["config"].pop("target")
    row["config"] |= {name: target[name] for name in ("sparsity", "params", "tolerance")}
    space = row["space"]
    row["space"] = {"units": space["units"], "removed": space["removed"], "params": space["costs"]["params"], "fixed_params": space["fixed"]["params"], "model": space["model"]}
    del row["pools"], row["source"]
    row["budget"] = {"target": row["budget"]["limits"]["params"], "tolerance": 0.1}
    path.write_text(json.dumps(row))
    history = History(tmp_path / "run")
    assert history.config == search.config and history.source is None and len(history.evaluations) == 5
    assert history.planned_tokens["tuning"] > 0 and history.progress[2] == 0.0
    fake(tmp_path / "run", small).run(progress=False)
    assert history.refresh() and history.finished
    with pytest.raises(ValueError, match=r"config.target.limits.flops \(None there, 0.9 here\)"):
        fake(tmp_path / "run", small, short_config(sparsity=0.5, limits={"flops": 0.9}))
    path.write_text(json.dumps(row | {"config": row["config"] | {"colour": "red"}}))
    with pytest.raises(ValueError, match="settings that this version does not know.*colour"):
        fake(tmp_path / "run", small)


class Recorder:
    "A custom evaluator of the user's own making: what it was made for, and what it was asked for."

    def __init__(self, rules, seed, asked):
        self.rules, self.seed, self.asked = rules, seed, asked

    def evaluate_stage(self, candidates, generation, stage, start=0):
        for genome in candidates[start:]:
            self.asked.append((self.rules.stages, self.rules.lr, self.rules.fitness, self.seed, generation, stage, genome.code))
            yield made_up(genome, generation, stage)


def test_steering_reaches_a_custom_evaluator(small, tmp_path):
    "Changed stages, learning rate and fitness, and the seed of a branch, are in what the factory makes; on resume it is asked for what the log lacks only."
    asked = []
    make = lambda rules, seed: Recorder(rules, seed, asked)
    search = Search(tmp_path / "run", *small, small_pools(), short_config(generations=2), make)
    steps(search, 2)
    search.send(set_("stages", [[1, 0, 16]], when="now"))
    search.send(set_("lr", 0.01))
    search.send(set_("fitness", "perplexity"))
    steps(search, 5)
    search.send({"command": "branch", "generation": 0})
    steps(search, 3)
    n, before = len(asked), asked[-1]
    assert asked[1][1:4] == (1e-3, "kl", 0) and asked[3][0] == (Stage(1, 0, 16),) and asked[3][1:4] == (0.01, "perplexity", 0)
    assert before[3] == search.inputs.seed(1) != 0
    resumed = Search(tmp_path / "run", *small, small_pools(), short_config(generations=2), make)
    while len(asked) == n:
        resumed.step()
    assert len(asked) == n + 1 and asked[-1][:6] == before[:6] and asked[-1][6] != before[6]


def test_an_evaluator_that_loses_the_thread_is_stopped(small, tmp_path):
    "One that yields too few evaluations, or those of other candidates, is an error that names the candidate."
    class Confused:
        def evaluate_stage(self, candidates, generation, stage, start=0):
            yield from (made_up(genome, generation, stage) for genome in candidates[start:][::step])

    for step in (-1, 2):
        search = Search(tmp_path / str(step), *small, small_pools(), short_config(), lambda *_: Confused())
        with pytest.raises(ValueError, match="must yield the evaluation of .* next"):
            search.run(progress=False)
