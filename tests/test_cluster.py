"""A search on a cluster writes the log of a search alone, whoever joins, dies or steers meanwhile."""
import os
import socket
import threading
from concurrent.futures import Future

import pytest
import ray
import torch
from helpers import events, random_blocks, short_config, small_pools
from ray.cluster_utils import Cluster as Machines

from evoprune_nb.cluster.building import build_on_cluster
from evoprune_nb.cluster.dispatch import WorkerLost, hand_out
from evoprune_nb.cluster.parts import describe_parts, load_inputs
from evoprune_nb.cluster.stages import Cluster
from evoprune_nb.cluster.workers import Arrivals
from evoprune_nb.config import ElasticSearch
from evoprune_nb.elastic import ElasticTraining
from evoprune_nb.history import History
from evoprune_nb.search import Search, SearchInputs
from evoprune_nb.selection import Stage
from evoprune_nb.source import Source
from evoprune_nb.training import Training
from evoprune_nb.ui.cli import main
from evoprune_nb.ui.panel import workers_html

SLOW = {  # a machine with much else to do takes longer to start processes than Ray allows
    "RAY_raylet_start_wait_time_s": "300", "RAY_agent_register_timeout_ms": "300000", "RAY_worker_register_timeout_seconds": "300",
    "RAY_health_check_timeout_ms": "60000", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class Crew:
    "Workers in threads, with a plan of who dies of which item, or joins at which."

    def __init__(self, names, deaths=(), joins=None):
        self.names, self.deaths, self.joins, self.log = list(names), set(deaths), dict(joins or {}), []

    def ready(self):
        return self.names

    def drop(self, worker):
        self.names.remove(worker)

    def begin(self, worker, item):
        future = Future()
        self.log.append((worker, item))
        self.names += self.joins.pop(item, "")
        dies = (worker, item) in self.deaths or ("*", item) in self.deaths
        threading.Timer(0.02 / (1 + item), lambda: future.set_exception(WorkerLost("gone")) if dies else future.set_result((item, item**2))).start()
        return future


@pytest.mark.parametrize("crew", [Crew("a"), Crew("abc"), Crew("abc", deaths=[("a", 0), ("b", 1), ("b", 3)]), Crew("a", joins={0: "bcd"})], ids=["one", "three", "deaths", "joins"])
def test_results_come_in_order_whoever_works(crew):
    assert [*hand_out(crew, range(12), crew.begin)] == [(item, item**2) for item in range(12)]
    assert {item for _, item in crew.log} == {*range(12)}


def test_items_stay_at_home_while_the_worker_lives():
    "The items of a dead worker go to others; those of a living one wait for it."
    homes = {item: "ab"[item % 2] for item in range(8)}
    crew = Crew("abc", deaths=[("b", 3)])
    assert [*hand_out(crew, range(8), crew.begin, homes.get)] == [(item, item**2) for item in range(8)]
    assert {worker for worker, item in crew.log if item % 2 == 0} == {"a"}
    assert ("b", 1) in crew.log and not any(worker == "b" for worker, item in crew.log if item > 3)


def test_work_that_kills_its_workers_ends_the_stage():
    crew, cancelled = Crew("abcd", deaths=[("*", 2)]), []
    with pytest.raises(RuntimeError, match="3 workers have died of the same work; the last: gone"):
        [*hand_out(crew, range(4), crew.begin, cancel=lambda: cancelled.append(True))]
    assert len(crew.names) == 1 and cancelled == [True]


def test_closing_cancels():
    crew, cancelled = Crew("ab"), []
    results = hand_out(crew, range(9), crew.begin, cancel=lambda: cancelled.append(True))
    next(results)
    results.close()
    assert cancelled == [True] and len(crew.log) < 9


def test_a_copy_is_checked(small, tmp_path):
    "A worker whose files differ from the driver's says which; a copy is made once."
    inputs, keep = SearchInputs(*small, small_pools(), short_config()), {}
    parts = describe_parts(inputs, None, "cpu", str(tmp_path), lambda data: keep.setdefault(len(keep), data) and len(keep) - 1)
    loaded = load_inputs(parts, keep.get)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.state_dict().values(), small[0].state_dict().values()))
    load_inputs(parts, None)  # from the copies
    wrong = describe_parts(SearchInputs(*small, small_pools(), short_config()), Source("tiny"), "cpu", "", None)
    with pytest.raises(ValueError, match=r"something else than the driver: model \(.* there, .* here\)"):
        load_inputs(wrong, None)
    with pytest.raises(ValueError, match="workers must know how to load the model"):
        describe_parts(inputs, None, "cpu", "", None)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    "Two machines of one core, each with a folder of its own for copies; more can join."
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SLOW.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(os.sys.path))
        cluster, n = Machines(), iter(range(9))
        join = lambda: cluster.add_node(num_cpus=1, object_store_memory=100 << 20, include_dashboard=False, env_vars={"MINE": str(tmp_path_factory.mktemp(f"machine {next(n)}"))})
        nodes = [join()]
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")  # to the head, the one that no test removes
        nodes.append(join())
        yield cluster, nodes, join
        ray.shutdown()
        cluster.shutdown()


def steered(search: Search, at: dict[int, callable]) -> list[dict]:
    "The log of a search in which something happens after so many evaluations."
    n = iter(range(1, 1000))
    search.drive(lambda _: at.pop(next(n), lambda: None)())
    assert not at
    return [{key: value for key, value in row.items() if key not in ("host", "device")} for row in events(search.run_dir)]


def test_the_log_is_that_of_a_search_alone(small, machines, tmp_path):
    "With warm starts, held-out loss, a killed worker, a killed machine, one that joins, and commands in between."
    cluster, nodes, join = machines
    config = short_config(generations=4, warm_start=True, heldout_tokens=32)

    def commands(search: Search) -> dict:
        return {3: lambda: search.send({"command": "set", "setting": "offspring", "value": 5}), 12: lambda: search.send({"command": "set", "setting": "lr", "value": 2e-3, "when": "now"})}

    alone = Search(tmp_path / "alone", *small, small_pools(), config)
    expected = steered(alone, commands(alone))
    with Cluster(*small, small_pools(), config, address=cluster.address, copies="$MINE/copies", patience=200) as on:
        search = on.search(tmp_path / "cluster")

        def kill() -> None:
            ray.kill(on.workers.ready()[0].processes[0])

        found = steered(search, commands(search) | {2: kill, 8: join, 10: lambda: cluster.remove_node(nodes[1], allow_graceful=False)})
        rows = [row for row in events(search.run_dir) if row["event"] == "evaluation"]
    assert found == expected and search.parent == alone.parent
    assert {(row["device"], row["host"] != "") for row in rows} == {("cpu", True)}


def test_an_elastic_model_reaches_machines_that_do_not_see_it(small, machines, tmp_path):
    "Machines with copies get the elastic model of each round, too; the log is that of a search alone."
    cluster, *_ = machines
    elastic = ElasticSearch(ElasticTraining(tokens=256, training=Training(lr=1e-3, batch_size=2)), scan_tokens=64, scoring_tokens=64, profile_tokens=32, entrants=0, scans=(0, 3))
    config = short_config(method="elastic", elastic=elastic, fitness="perplexity", generations=7, stages=(Stage(1, 64, 64),))
    expected = steered(Search(tmp_path / "alone", *small, small_pools(), config), {})
    with Cluster(*small, small_pools(), config, address=cluster.address, copies="$MINE/copies", patience=200) as on:
        found = steered(on.search(tmp_path / "cluster"), {})
    assert found == expected and len([row for row in found if row["event"] == "elastic"]) == 2


def test_a_database_built_on_workers(small, machines, tmp_path):
    "One part of the text gives the bits of a local build; several give the same levels, to rounding."
    cluster, *_ = machines
    model, local = small
    build = lambda name, n, size: build_on_cluster(model, random_blocks(), tmp_path / name, n_shards=n, copies="$MINE/copies", address=cluster.address, workers={"most": 2}, batch_size=size, progress=False)
    assert build("one", 1, 8).fingerprint == local.fingerprint
    many = build("many", 4, 4)
    errors = lambda database: torch.tensor([level for row in database.errors for level in row])
    assert torch.allclose(errors(many), errors(local), rtol=1e-3, atol=1e-6)


def test_two_devices_share_a_candidate(small, machines, tmp_path):
    "Weights, gradients and text in two parts give the numbers of one process, to rounding; a killed half is replaced."
    cluster, *_ = machines
    node = cluster.add_node(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, env_vars={"MINE": str(tmp_path / "here")})
    config = short_config(generations=3, warm_start=True, stages=(Stage(2, 64, 64), Stage(1, 128, 64)), training=Training(lr=1e-3, batch_size=2))
    alone = Search(tmp_path / "alone", *small, small_pools(), config)
    expected = [row for row in steered(alone, {}) if row["event"] == "evaluation"]
    with Cluster(*small, small_pools(), config, address=cluster.address, copies="$MINE/copies", patience=200, per_candidate=2, most=1) as on:
        search = on.search(tmp_path / "cluster")
        found = steered(search, {2: lambda: ray.kill(on.workers.ready()[0].processes[1])})
        rows = [row for row in events(search.run_dir) if row["event"] == "evaluation"]
    found = [row for row in found if row["event"] == "evaluation"]
    assert [row["genome"] for row in found] == [row["genome"] for row in expected]
    for name in ("fitness", "tuning_loss"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-4)
    assert [row["tuning_tokens"] for row in found] == [row["tuning_tokens"] for row in expected]
    assert {row["device"] for row in rows} == {"2 × cpu"}
    cluster.remove_node(node)


def test_a_team_that_loses_one_while_it_loads_gives_its_place_back():
    "The others wait for the dead one forever, so all are ended and a new team is asked for."
    class Lost:
        killed = False

        def __init__(self):
            self.hello, self.loaded = Future(), Future()

        def kill(self):
            self.killed = True

    asked = []
    crew = Arrivals(lambda: asked.append(Lost()) or asked[-1], 1)
    for future in (asked[0].hello, asked[0].loaded):
        future.set_exception(WorkerLost("gone"))
    crew.update(most=1)
    assert asked[0].killed and len(asked) == 2 and not asked[1].killed


def test_no_room(small, machines):
    "What no machine can hold is refused at once, with what they have."
    cluster, *_ = machines
    with pytest.raises(ValueError, match=r"needs 100 CPU, 0 GPU, they have 1 CPU, 0 GPU"):
        Cluster(*small, small_pools(), short_config(), address=cluster.address, copies="$MINE", cpus=100)
    with pytest.raises(ValueError, match=r"2 devices that share a candidate need blocks in multiples of 2: change scoring of stage 1 \(3\)"):
        Cluster(*small, small_pools(), short_config(), address=cluster.address, copies="$MINE", per_candidate=2)
    with pytest.raises(ValueError, match="optimizer Adafactor looks at whole matrices"):
        Cluster(*small, small_pools(), short_config(stages=(Stage(1, 64, 64),), training=Training(optimizer="Adafactor", batch_size=2)), address=cluster.address, copies="$MINE", per_candidate=2)
    with pytest.raises(ValueError, match="whole GPUs; got gpus=0.5"):
        Cluster(*small, small_pools(), short_config(stages=(Stage(1, 64, 64),)), address=cluster.address, copies="$MINE", per_candidate=2, gpus=0.5)
    with pytest.raises(ValueError, match="cpus must be a whole number"):
        Cluster(*small, small_pools(), short_config(), address=cluster.address, copies="$MINE", cpus=0)


def test_the_command_searches_on_a_cluster(machines, tmp_path, corpus, capsys):
    "`evoprune search --address` writes the log that it writes without."
    cluster, *_ = machines
    settings = dict(generations=2, offspring=3, stages="[[1, 64, 64]]", lr=1e-4)
    words = ["--text", str(corpus), "--seq-len", "64", "--calibration-tokens", "1024", "--levels", "3", "--dtype", "float32", "--device", "cpu", *(word for name, value in settings.items() for word in ("-p", name, str(value)))]
    where = {"alone": [], "cluster": ["--address", cluster.address]}
    for name, more in where.items():
        assert main(["search", "tiny", str(tmp_path / name), *words, *more]) == 0
    alone, on = ([{key: value for key, value in row.items() if key not in ("host", "device")} for row in events(tmp_path / name)] for name in where)
    assert on == alone and "evoprune export" in capsys.readouterr().out
    assert f"<td>{socket.gethostname()}</td><td>cpu</td>" in workers_html(History(tmp_path / "cluster"))
