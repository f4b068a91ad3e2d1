"""The elastic model, what is learnt in it, and the search that uses both."""
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import events, short_config, small_pools, word_tokenizer

import evoprune_nb.elastic
from evoprune_nb.ship import export
from evoprune_nb.candidates import materialize
from evoprune_nb.config import ActiveConfig, ElasticSearch, SearchConfig
from evoprune_nb.elastic import Elastic, ElasticTraining, draw_genome, elastic_model, elastic_step, train_elastic
from evoprune_nb.genome import Genome, Grid
from evoprune_nb.history import History
from evoprune_nb.losses import next_token_loss
from evoprune_nb.mutation import make_offspring
from evoprune_nb.paper.figures import _tokens_used, fitness_figure
from evoprune_nb.replay import replay
from evoprune_nb.runlog import plain_json
from evoprune_nb.search import Search, profiled
from evoprune_nb.selection import Evaluation, Stage, paired_difference, ranked_by_blocks
from evoprune_nb.surrogate import Observation, archive, fit_losses, neighbours, one_unit_genomes, one_unit_scores, propose_genomes
from evoprune_nb.target import Budget, Target, plan_budget
from evoprune_nb.training import Training
from evoprune_nb.ui.gallery import level_losses
from evoprune_nb.ui.importance import importance_figure

SETTINGS = ElasticTraining(tokens=16 * 16, training=Training(lr=1e-3, batch_size=2))


def elastic_config(**changes) -> SearchConfig:
    "A short search by the elastic method."
    race = (Stage(2, 32, 32), Stage(1, 64, 48))
    elastic = ElasticSearch(SETTINGS, scan_tokens=128, scoring_tokens=128, entrants=3)
    defaults = dict(generations=4, offspring=4, stages=race, warm_start=True, fitness="perplexity")
    return short_config(**defaults | dict(method="elastic", elastic=elastic) | changes)


@pytest.fixture
def parts(small):
    model, database = small
    budget, uniform = plan_budget(database.space, elastic_config().target)
    return model, database, small_pools(), budget, uniform


def same(a: Elastic, b: Elastic) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))


def test_a_step_has_the_gradients_of_its_candidates(parts):
    model, database, pools, budget, uniform = parts
    elastic = Elastic.of(model, database)
    elastic.model.requires_grad_(True)
    batch = pools["tuning"].draw(64, 0)
    elastic_step(elastic, [uniform], batch)
    candidate = materialize(model, database, uniform)
    next_token_loss(candidate, batch).backward()
    unit = next(i for i, unit in enumerate(database.units) if unit.kind == "mlp")
    what, kept = database.units[unit], database.kept(unit, uniform.levels[unit])
    for part, columns in (("up_proj", False), ("down_proj", True)):
        mine = elastic.model.get_submodule(what.module).get_submodule(part).weight.grad
        theirs = candidate.get_submodule(what.module).get_submodule(part).weight.grad
        assert torch.equal(mine[:, kept] if columns else mine[kept], theirs)
        gone = torch.ones(what.n_structures, dtype=bool)
        gone[kept] = False
        assert not (mine[:, gone] if columns else mine[gone]).any() and gone.any()


def test_what_is_learnt_reaches_every_level(parts):
    model, database, pools, budget, uniform = parts
    elastic, _ = train_elastic(model, database, pools["tuning"], budget, uniform, SETTINGS, progress=False)
    unit = next(i for i, unit in enumerate(database.units) if unit.kind == "mlp")
    name = database.units[unit].output
    change = elastic.model.get_submodule(name).weight - model.get_submodule(name).weight
    for level in (1, 5):
        own = elastic.database.weight(unit, level) - database.weight(unit, level)
        torch.testing.assert_close(own, change[:, database.kept(unit, level)], rtol=0, atol=1e-6)
    assert change.any()


def test_interrupted_training_continues_to_the_same_weights(parts, tmp_path, monkeypatch):
    model, database, pools, budget, uniform = parts
    monkeypatch.setattr(evoprune_nb.elastic, "CHECKPOINT_STEPS", 2)
    args = model, database, pools["tuning"], budget, uniform, SETTINGS, 3
    whole, _ = elastic_model(*args, tmp_path / "whole.safetensors", progress=False)
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    path = tmp_path / "cut.safetensors"
    with pytest.raises(KeyboardInterrupt):
        elastic_model(*args, path, progress=False, check_cancelled=interrupt)
    calls.clear()
    again, result = elastic_model(*args, path, progress=False, check_cancelled=lambda: calls.append(1))
    assert same(whole, again) and len(result.losses) == 8 and len(calls) < 8
    assert [file.name for file in tmp_path.iterdir() if "unfinished" in file.name] == []


def test_a_damaged_or_foreign_file_is_refused(parts, tmp_path):
    model, database, pools, budget, uniform = parts
    args, path = (model, database, pools["tuning"], budget, uniform, SETTINGS), tmp_path / "e.safetensors"
    elastic_model(*args, 0, path, progress=False)
    with pytest.raises(ValueError, match="of another search"):
        elastic_model(*args, 1, path, progress=False)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        elastic_model(*args, 0, path, progress=False)


def test_random_genomes_keep_the_budget(parts):
    _, database, _, budget, uniform = parts
    drawn = [draw_genome(uniform, database.space, budget, random.Random(i), 0.3) for i in range(30)]
    assert all(budget.fits(budget.costs(database.space, genome)) for genome in drawn) and len(set(drawn)) > 20


def test_one_wild_block_does_not_decide():
    calm = [0.01] * 15
    mean, error = paired_difference([*calm, -9.0], [0.0] * 16)
    assert mean == pytest.approx(0.01) and error < 1e-9
    with pytest.raises(ValueError, match="same blocks"):
        paired_difference([1.0], [1.0, 2.0])


def test_the_parent_stays_unless_beaten_beyond_the_error():
    parent, child = Genome((0,), (1,)), Genome((1,), (0,))
    noise = np.random.default_rng(0).normal(0, 0.1, 16)

    def winner(gain: float) -> Genome:
        rows = [Evaluation(0, 0, parent.code, 9, None, 0, 1, 0, blocks=(3.0,) * 16),
                Evaluation(0, 0, child.code, 8, None, 0, 1, 0, blocks=tuple(3.0 - gain + noise - noise.mean()))]
        return ranked_by_blocks(list(zip(rows, (parent, child))), parent, margin=1.0)[0][1]

    assert winner(0.001) == parent and winner(0.2) == child


def test_proposals_gain_and_leave_frozen_units_alone(parts):
    _, database, _, budget, uniform = parts
    space, rng = database.space, np.random.default_rng(0)
    slopes = rng.uniform(0.5, 3, len(space.units))

    def loss(genome):
        rows = zip(slopes, space.units, space.removed, genome.levels)
        return sum(a * (gone[level] / unit.n_structures) ** 2 for a, unit, gone, level in rows)

    seen = [Observation(g.code, uniform.code, loss(g) - loss(uniform), 1e-4) for g in neighbours(uniform, space, budget)]
    model = fit_losses(seen, uniform, space)
    proposed = propose_genomes(model, uniform, budget, 8, random.Random(0), n_random=2)
    mutants = make_offspring(uniform, space, budget, 8, random.Random(0), "cost_swap")
    assert min(map(loss, proposed)) < min(map(loss, mutants)) and loss(proposed[0]) < loss(uniform)
    frozen = {0, len(space.units) - 1}
    kept = propose_genomes(model, uniform, budget, 8, random.Random(0), frozen)
    assert all(genome.levels[i] == uniform.levels[i] for genome in kept for i in frozen)


def test_the_archive_ranks_across_generations():
    seen = [[Observation("1/1", "0/0", -0.3, 0.01), Observation("2/2", "0/0", -0.1, 0.01)], [Observation("3/3", "1/1", 0.1, 0.01)]]
    assert list(archive(seen)) == ["1/1", "3/3", "2/2", "0/0"]


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    model, database = small
    run_dir = tmp_path_factory.mktemp("elastic") / "run"
    search = Search(run_dir, model, database, small_pools(), elastic_config())
    search.run(progress=False)
    return search


def test_phases(undisturbed):
    rows = events(undisturbed.run_dir)
    assert [row["event"] for row in rows[:3]] == ["run_started", "elastic", "generation"]
    scan, *_, race = [row for row in rows if row["event"] == "generation"]
    start = Genome.parse(scan["parent"])
    assert all(Genome.parse(code).distance(start) == 1 for code in scan["offspring"])
    survivors = [row for row in rows if row["event"] == "survivor"]
    assert survivors[0]["genome"] == scan["parent"]
    assert all(len(row["observed"]) >= 4 for row in survivors[:3]) and "observed" not in survivors[3]
    tuned = {row["generation"] for row in rows if row["event"] == "evaluation" and row["tuning_tokens"]}
    assert tuned == {3} and len(race["offspring"]) == 3
    history = History(undisturbed.run_dir)
    assert history.tokens == history.planned_tokens and history.tokens["tuning"] >= SETTINGS.tokens
    drawn = [float(used[-1]) for used in _tokens_used(history)]
    assert drawn == [history.tokens["tuning"], history.tokens["scoring"]], "the picture counts the elastic model, too"


def test_interrupted_anywhere_it_ends_equal(undisturbed, small, tmp_path):
    model, database = small
    for n_steps in (0, 3, 17, 26):
        run_dir = tmp_path / str(n_steps)
        first = Search(run_dir, model, database, small_pools(), elastic_config())
        for _ in range(n_steps):
            first.step()
        if n_steps == 17:
            (run_dir / "elastic.safetensors").unlink()  # it is trained again, to the same weights
        assert Search(run_dir, model, database, small_pools(), elastic_config()).run(progress=False) == undisturbed.parent
        assert events(run_dir) == events(undisturbed.run_dir)


def test_a_steered_elastic_search_replays(small, tmp_path):
    model, database = small
    search = Search(tmp_path / "run", model, database, small_pools(), elastic_config())
    for _ in range(15):
        search.step()
    search.send({"command": "freeze", "units": [database.units[0].name]})
    search.send({"command": "set", "setting": "offspring", "value": 5})
    for _ in range(6):
        search.step()
    search.send({"command": "branch", "generation": 1})
    winner = search.run(progress=False)
    assert replay(tmp_path / "run", tmp_path / "again", model, database, small_pools(), progress=False) == winner
    assert events(tmp_path / "again") == events(tmp_path / "run")


def test_wrong_settings_are_refused():
    for wrong in (dict(method="elastik"), dict(generations=2), dict(elastic=3)):
        with pytest.raises(ValueError, match="method|generations|elastic"):
            elastic_config(**wrong)
    for wrong in (dict(scans=(1,)), dict(entrants=-1), dict(margin=-1.0), dict(scan_tokens=1.5), dict(profile_tokens=-1), dict(profile_tokens=2.5), dict(profile_weight=-0.1), dict(scan_steps=()), dict(scan_steps=(0,)), dict(scan_steps=(1.5,)), dict(profile_weight=float("nan"))):
        with pytest.raises(ValueError):
            ElasticSearch(**wrong)
    with pytest.raises(ValueError, match="generations ≥ 4"):
        elastic_config(generations=3, elastic=replace(elastic_config().elastic, profile_tokens=64))
    for wrong in (dict(tokens=0), dict(spread=0), dict(genomes=3)):
        with pytest.raises(ValueError):
            ElasticTraining(**wrong)
    with pytest.raises(ValueError, match="stages must narrow"):
        elastic_config(elastic=replace(elastic_config().elastic, entrants=1))


def test_settings_survive_json():
    config = elastic_config()
    from evoprune_nb.runlog import plain_json
    from dataclasses import asdict

    assert SearchConfig.from_dict(plain_json(asdict(config))) == config
    assert ActiveConfig.of(config).at(0).phase == "scan" and ActiveConfig.of(config).at(3).phase == "race"


def test_too_little_text_is_said_before_the_work(small, tmp_path):
    model, database = small
    many = replace(elastic_config().elastic, training=replace(SETTINGS, tokens=10**6))
    with pytest.raises(ValueError, match="asked for 1,000,000 tuning tokens"):
        Search(tmp_path / "run", model, database, small_pools(), elastic_config(elastic=many))
    assert not (tmp_path / "run").exists()


def test_plan_counts_the_phases(undisturbed):
    from evoprune_nb.paper.planning import plan

    config = elastic_config(sparsity=0.5, tolerance=0.1)
    planned = {phase.name: phase for phase in plan("tiny", config, calibration_tokens=512, seq_len=16).phases}
    assert list(planned) == ["level database", "elastic model", "search"]
    assert planned["elastic model"].tokens == SETTINGS.tokens
    rules = ActiveConfig.of(config)
    assert planned["search"].memory_bytes > 0 and rules.at(1).stages == (Stage(1, 0, 128),)


def test_sensitivities_are_drawn(undisturbed):
    from evoprune_nb.paper.figures import sensitivities, sensitivity_figure

    history = History(undisturbed.run_dir)
    table = sensitivities(history.position.observed[0], history.space)
    assert len(table) == len([row for row in events(undisturbed.run_dir) if row["event"] == "evaluation" and row["generation"] == 0]) - 1
    assert len(sensitivity_figure(history.position.observed[0], history.space).axes) == 2
    assert len(sensitivity_figure([], history.space).axes) == 1


def test_the_panel_shows_what_levels_cost(undisturbed):
    "A map of unit × level whose cells say their values; what the model expects of the present levels is nothing."
    from evoprune_nb.ui.gallery import latest_moment, level_losses, sensitivity_parts

    history = History(undisturbed.run_dir)
    losses, space = level_losses(history), history.space
    assert [len(row) for row in losses] == [space.n_levels(i) for i in range(len(space.units))]
    assert all(row[level] == 0 for row, level in zip(losses, history.winner.levels))
    parts = sensitivity_parts(latest_moment(history))
    shown = parts["levels"][1]()
    assert shown.count("<title>") == sum(map(len, losses)) and "nats" in shown and parts["sensitivities"][1]().count("<title>") > len(space.units)


def two_rounds() -> SearchConfig:
    "A second round begins with generation 2."
    config = elastic_config()
    return replace(config, generations=5, elastic=replace(config.elastic, scans=(0, 2)))


def test_a_round_trains_and_measures_around_the_parent(small, tmp_path):
    "Also when interrupted, with a file lost, and on a branch that goes back before it."
    model, database = small
    search = Search(tmp_path / "run", model, database, small_pools(), two_rounds())
    winner = search.run(progress=False)
    rows = events(tmp_path / "run")
    begun = {row["generation"]: row for row in rows if row["event"] == "generation"}
    first, second = (row for row in rows if row["event"] == "elastic")
    assert "center" not in first and (second["generation"], second["center"]) == (2, begun[2]["parent"])
    assert second["work"] != first["work"] and len(list((tmp_path / "run").glob("elastic*.safetensors"))) == 2
    assert all(Genome.parse(code).distance(Genome.parse(second["center"])) == 1 for code in begun[2]["offspring"])
    assert search.engine.log.position.measured == search.engine.log.position.observed[2:]
    history = History(tmp_path / "run")
    assert history.tokens == history.planned_tokens
    assert history.tokens["tuning"] >= 2 * SETTINGS.tokens
    for n_steps in (20, 35, 45):
        again = tmp_path / str(n_steps)
        interrupted = Search(again, model, database, small_pools(), two_rounds())
        for _ in range(n_steps):
            interrupted.step()
        for path in again.glob("elastic-*.safetensors"):
            path.unlink()
        assert Search(again, model, database, small_pools(), two_rounds()).run(progress=False) == winner
        assert events(again) == rows
    search.send({"command": "branch", "generation": 1})
    search.run(progress=False)
    assert [row.get("generation", 0) for row in events(tmp_path / "run") if row["event"] == "elastic"] == [0, 2, 2]
    assert replay(tmp_path / "run", tmp_path / "replay", model, database, small_pools(), progress=False) == search.parent
    assert events(tmp_path / "replay") == events(tmp_path / "run")


def test_plan_counts_every_round():
    from evoprune_nb.paper.planning import plan

    tokens = {phase.name: phase.tokens for phase in plan("tiny", replace(two_rounds(), target=Target(0.5)), calibration_tokens=512, seq_len=16).phases}
    assert tokens["elastic model"] == 2 * SETTINGS.tokens


def test_figures_name_the_stages_of_each_phase(undisturbed):
    from evoprune_nb.paper.figures import stages_figure

    history = History(undisturbed.run_dir)
    titles = [axes.get_title() for axes in fitness_figure(history).axes]
    assert any(title.startswith("In the elastic model; at last, stage 1 of the race: 32 tuning") for title in titles)
    label = lambda generation: stages_figure(history, generation).axes[0].get_xticklabels()[0].get_text()
    assert "before tuning" in label(1) and "32 tuning" in label(3)
    assert "selects none" in stages_figure(history, 0).axes[0].texts[0].get_text()


def test_a_worker_reads_the_model_of_its_round(small, tmp_path):
    "In the second round, a worker that is told the file of the first finds the same fitness as the search."
    from evoprune_nb.cluster.parts import Parts
    from evoprune_nb.cluster.workers import StageWork, WorkerProcess

    search = Search(tmp_path / "run", *small, small_pools(), two_rounds())
    search.run(progress=False)
    attempt = History(tmp_path / "run").attempts[3]
    assert attempt.rules.center
    worker = WorkerProcess(Parts({}, "float32", "cpu", search.inputs.config), 1)
    worker.inputs = search.inputs
    codes = [row["genome"] for row in attempt.evaluations]
    work = StageWork(1, 1, attempt.rules, search.inputs.seed(0), str(tmp_path / "run" / "elastic.safetensors"), tuple(map(Genome.parse, codes)), 3, 0)
    assert [worker.evaluate(work, index).fitness for index in range(len(codes))] == [row["fitness"] for row in attempt.evaluations]


def profiled_config() -> SearchConfig:
    "A search that first prunes single units of the dense model."
    elastic = replace(elastic_config().elastic, profile_tokens=128, profile_weight=0.5)
    return elastic_config(generations=5, elastic=elastic)


def test_steps_of_a_scan(small):
    "Up and down by each step, as far as there are levels; caps and frozen units are kept."
    units = small[1].space.units
    space = Grid((units[0], units[-1]), ((0, 1, 2, 4), (0, 10, 20, 30, 40)))
    center, free = Genome.parse("1/2"), Budget({"params": 1.0})
    codes = lambda *steps, **more: [genome.code for genome in neighbours(center, space, free, steps=steps, **more)]
    assert codes(1) == ["0/2", "2/2", "1/1", "1/3"]
    assert codes(1, 3) == ["0/2", "2/2", "3/2", "1/0", "1/1", "1/3", "1/4"]
    assert codes(3, frozen=(1,)) == ["0/2", "3/2"]


def test_one_unit_scores_are_measured_or_lie_between(small):
    units = small[1].space.units
    space = Grid((units[0], units[-1]), ((0, 1, 2, 4), (0, 10, 20, 30, 40)))
    genomes = one_unit_genomes(space, every=2)
    assert [genome.code for genome in genomes] == ["0/0", "1/0", "3/0", "0/2", "0/4"]
    scores = one_unit_scores(space, {"0/0": 1.0, "1/0": 1.1, "3/0": 1.7, "0/2": 1.5, "0/4": 3.0})
    np.testing.assert_allclose(scores[0], [0, 0.1, 0.3, 0.7])
    np.testing.assert_allclose(scores[1], [0, 0.25, 0.5, 1.25, 2.0])


def test_a_profile_of_single_units_comes_first(small, tmp_path):
    "Its units are pruned in the dense model; what they cost there counts in every score; also when interrupted."
    model, database = small
    search = Search(tmp_path / "run", model, database, small_pools(), profiled_config())
    winner = search.run(progress=False)
    rows = events(tmp_path / "run")
    profile, scan, *_ = [row for row in rows if row["event"] == "generation"]
    dense = Genome.parse(profile["offspring"][0])
    assert not any(dense.levels) and all(sum(map(bool, Genome.parse(code).levels)) == 1 for code in profile["offspring"][1:])
    kinds = [row["event"] for row in rows if row["event"] in ("generation", "elastic")]
    assert kinds[:3] == ["generation", "elastic", "generation"] and scan["parent"] == profile["parent"]
    scores = profiled(search.engine.log.position, database.space)
    blocks = {row["genome"]: row["blocks"] for row in rows if row["event"] == "evaluation" and row["generation"] == 0}
    measured = {code: paired_difference(blocks[code], blocks[profile["parent"]])[0] for code in profile["offspring"]}
    alone = profile["offspring"][1]
    unit = next(i for i, level in enumerate(Genome.parse(alone).levels) if level)
    assert scores[unit][Genome.parse(alone).levels[unit]] == pytest.approx(measured[alone] - measured[dense.code], abs=1e-5)
    total = lambda code: sum(row[level] for row, level in zip(scores, Genome.parse(code).levels))
    history = History(tmp_path / "run")
    evolve = next(attempt for attempt in history.attempts if attempt.rules.phase == "evolve")
    parent, blocks = evolve.begin["parent"], {row["genome"]: row["blocks"] for row in evolve.evaluations}
    compared = {code: paired_difference(losses, blocks[parent]) for code, losses in blocks.items()}
    score = {code: difference + 0.5 * (total(code) - total(parent)) + (error if code != parent else 0) for code, (difference, error) in compared.items()}
    assert evolve.end["genome"] == min(score, key=score.get)
    observed = [Observation(code, scan["parent"], *found) for code, *found in next(row for row in rows if row["event"] == "survivor" and row["generation"] == 1)["observed"]]
    expected = fit_losses(observed, Genome.parse(parent), database.space, [[0.5 * nats for nats in row] for row in scores])
    budget = plan_budget(database.space, search.config.target)[0]
    best = min(({*map(Genome.parse, evolve.begin["offspring"])} | {Genome.parse(parent)}), key=expected.predict)
    others = [draw_genome(Genome.parse(parent), database.space, budget, random.Random(n), 0.5) for n in range(300)]
    assert expected.predict(best) <= min(map(expected.predict, others)), "the best of all genomes is proposed, however far away"
    history = History(tmp_path / "run")
    assert history.tokens == history.planned_tokens and level_losses(history)
    for n_steps in (7, len(profile["offspring"]) + 5):
        again = tmp_path / str(n_steps)
        interrupted = Search(again, model, database, small_pools(), profiled_config())
        for _ in range(n_steps):
            interrupted.step()
        early = History(again)
        assert fitness_figure(early).axes and importance_figure(early).axes and not level_losses(early)
        assert Search(again, model, database, small_pools(), profiled_config()).run(progress=False) == winner
        assert events(again) == rows
    assert replay(tmp_path / "run", tmp_path / "replay", model, database, small_pools(), progress=False) == winner


def test_a_winner_with_the_weights_that_its_search_has_trained(small, tmp_path, monkeypatch):
    "Those of the elastic model of the last round, whatever is steered; the card says so."
    model, database = small
    pools, config = small_pools(), elastic_config(generations=5, elastic=replace(elastic_config().elastic, scans=(0, 2)))
    search = Search(tmp_path / "run", model, database, pools, config)
    winner = search.run(progress=False)
    monkeypatch.setattr(export, "load_model", lambda *_: (model, word_tokenizer("none")))
    candidate, _, history = export.load_winner(tmp_path / "run", "mine", database=database.directory, weights="elastic")
    assert history.position.center, "the last round is around another genome than the uniform one"
    expected = search.engine.weights(history.position.center).candidate(winner)
    assert all(torch.equal(a, b) for a, b in zip(candidate.parameters(), expected.parameters(), strict=True))
    untrained = materialize(model, database, winner)
    assert not all(torch.equal(a, b) for a, b in zip(candidate.parameters(), untrained.parameters(), strict=True))
    assert f"trained on {config.elastic.training.tokens:,} tokens" in export.run_card(history, weights="elastic").provenance["weights"]
    next((tmp_path / "run").glob("elastic-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="is not there: start the search again"):
        export.load_winner(tmp_path / "run", "mine", database=database.directory, weights="elastic")


def test_a_search_without_a_race(small, tmp_path):
    "It ends with evolution: nothing was tuned, and its figures speak of no race."
    model, database = small
    elastic = replace(elastic_config().elastic, entrants=0, profile_tokens=64, scan_steps=(1, 3))
    search = Search(tmp_path / "run", model, database, small_pools(), elastic_config(elastic=elastic))
    winner, history = search.run(progress=False), History(tmp_path / "run")
    assert [attempt.rules.phase for attempt in history.attempts] == ["profile", "scan", "evolve", "evolve"]
    assert set(history.evaluations.tuning_tokens) == {0} and winner == history.winner
    titles = [axes.get_title() for axes in fitness_figure(history).axes]
    assert any("In the elastic model" in title for title in titles) and not any("race" in title for title in titles)
    with pytest.raises(ValueError, match="generations ≥ 3"):
        elastic_config(generations=2, elastic=elastic)


def test_settings_of_a_day_are_read(small):
    "Runs of the profile's first form hold a setting that is gone."
    row = plain_json(asdict(elastic_config()))
    row["elastic"]["profile_weights"] = [0.3, 1.0]
    assert SearchConfig.from_dict(row) == elastic_config()
