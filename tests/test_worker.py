"""A search in a thread: it takes commands between evaluations, ends when told, fails without taking the process along, and is alone."""
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import by, events, made_up, short_config, small_pools

from evoprune_nb.genome import Genome
from evoprune_nb.history import History
from evoprune_nb.mutation import MutationError
from evoprune_nb.machine.lock import DirectoryLock, DirectoryBusy
from evoprune_nb.runlog import read_state
from evoprune_nb import search as search_module
from evoprune_nb.search import Search
from evoprune_nb.ui.worker import Worker, worker_of

PATIENCE = 60  # seconds after which a test gives up; no test waits for so long when all is well


class Gate:
    "An evaluator that says when it is entered, and waits until it is let through."

    def __init__(self, open_: bool = False):
        self.entered, self.passes, self.open, self.threads, self.n = threading.Semaphore(0), threading.Semaphore(0), open_, set(), 0

    def __call__(self, genome: Genome, generation: int, stage: int):
        self.threads.add(threading.get_ident())
        self.n += 1
        self.entered.release()
        if not self.open:
            assert self.passes.acquire(timeout=PATIENCE)
        return made_up(genome, generation, stage)

    def wait(self) -> None:
        "Until an evaluation is under way."
        assert self.entered.acquire(timeout=PATIENCE)

    def let(self) -> None:
        "One evaluation end."
        self.passes.release()

    def let_all(self) -> None:
        self.open = True
        self.passes.release()


def worker_in(run_dir, small, evaluator, config=None) -> Worker:
    return Worker(Search(run_dir, *small, small_pools(), config or short_config(), by(evaluator)))


def n_evaluations(run_dir) -> int:
    return sum(row["event"] == "evaluation" for row in events(run_dir))


@pytest.fixture()
def gated(small, tmp_path):
    "A running worker that waits in its first evaluation; let go at the end of the test."
    gate = Gate()
    worker = worker_in(tmp_path / "run", small, gate).start()
    gate.wait()
    yield worker, gate
    worker.send({"command": "stop"})
    gate.let_all()
    assert worker.join(PATIENCE)


def test_it_works_in_one_thread_of_its_own(small, tmp_path):
    "start returns at once; all evaluations are in one thread, not this one; the end is the same as that of a plain run."
    gate = Gate(open_=True)
    worker = worker_in(tmp_path / "run", small, gate)
    assert worker.status == "stopped" and not worker.alive
    assert worker.start() is worker and worker.join(PATIENCE)
    assert worker.status == "finished" and not worker.alive and worker.error is None and len(gate.threads) == 1 and threading.get_ident() not in gate.threads
    Search(tmp_path / "plain", *small, small_pools(), short_config(), by(made_up)).run(progress=False)
    assert events(tmp_path / "run") == events(tmp_path / "plain")


def test_pause_takes_effect_within_one_evaluation(gated, tmp_path):
    "The evaluation under way ends, no other begins; what is sent while it is paused is logged at once; resume goes on."
    worker, gate = gated
    state = read_state(tmp_path / "run")
    assert state["status"] == "running" and state["candidate"] == events(tmp_path / "run")[1]["offspring"][0] and state["stage"] == 0 and state["pid"] == os.getpid() and state["memory_bytes"] > 10**6
    assert worker.send({"command": "pause"}) == {"command": "pause"} and worker.status == "running"
    gate.let()
    assert worker.wait("paused", timeout=PATIENCE)
    assert gate.n == n_evaluations(tmp_path / "run") == 1 and worker.alive
    state = read_state(tmp_path / "run")
    assert state["status"] == "paused" and state["candidate"] is None
    history = History(tmp_path / "run")
    worker.send({"command": "note", "text": "while paused"})
    worker.send({"command": "resume"})
    gate.wait()
    assert history.refresh() and history.notes.text.tolist() == ["while paused"] and worker.status == "running"


def test_steps(gated, tmp_path):
    "One evaluation, then paused; one generation, then paused between two."
    worker, gate = gated
    worker.send({"command": "step", "what": "evaluation"})
    gate.let()
    gate.wait()  # the step's evaluation
    gate.let()
    assert worker.wait("paused", timeout=PATIENCE) and n_evaluations(tmp_path / "run") == 2
    gate.open = True
    for n in (1, 2):
        worker.send({"command": "step", "what": "generation"})
        while History(tmp_path / "run").generation < n or worker.status != "paused":
            assert worker.wait("paused", timeout=PATIENCE)
        history = History(tmp_path / "run")
        assert history.generation == n and history.generations.status.tolist() == ["finished"] * n and history.events[-1]["event"] == "survivor"


def test_stop_and_start_again(gated, small, tmp_path):
    "After the evaluation under way the thread ends and the lock is free; commands sent meanwhile wait for the next start; nothing is evaluated twice."
    worker, gate = gated
    worker.send({"command": "stop"})
    gate.let()
    assert worker.join(PATIENCE) and worker.status == "stopped" and read_state(tmp_path / "run")["status"] == "stopped" and gate.n == 1
    worker.send({"command": "set", "setting": "offspring", "value": 6})
    assert len(History(tmp_path / "run").commands) == 1
    gate.let_all()
    assert worker.start().join(PATIENCE) and worker.status == "finished"
    history = History(tmp_path / "run")
    assert [len(row) for row in history.generations.offspring] == [4, 6, 6] and gate.n == len(history.evaluations)


def test_reopened_after_a_stop(gated, small, tmp_path):
    "Another search object, another worker: the run goes on to the end of one never stopped."
    worker, gate = gated
    for _ in range(5):
        gate.let()
        gate.wait()
    worker.send({"command": "stop"})
    gate.let()
    assert worker.join(PATIENCE)
    assert worker_in(tmp_path / "run", small, made_up).start().join(PATIENCE)
    Search(tmp_path / "plain", *small, small_pools(), short_config(), by(made_up)).run(progress=False)
    assert [row for row in events(tmp_path / "run") if row["event"] != "command"] == events(tmp_path / "plain")


def test_two_panels_share_a_worker(gated, small, tmp_path, monkeypatch):
    "worker_of finds it by any spelling of the path; a second one, or a step in this thread, is refused while it lives, and says who drives."
    worker, gate = gated
    monkeypatch.chdir(tmp_path)
    assert worker_of(tmp_path / "run") is worker_of("run") is worker_of("./run/../run") is worker and worker_of("other") is None
    with pytest.raises(DirectoryBusy, match="driven by a worker of this process"):
        worker_in(tmp_path / "run", small, made_up)
    with pytest.raises(DirectoryBusy, match="by this worker already"):
        worker.start()
    with pytest.raises(DirectoryBusy, match=r"written by this process since 20\d\d"):
        worker.search.step()
    with pytest.raises(DirectoryBusy, match="written by this process"):
        Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up)).run(progress=False)
    assert History(tmp_path / "run").state["status"] == "running"  # reading is free
    worker.send({"command": "stop"})
    gate.let()
    assert worker.join(PATIENCE)
    assert worker_of("run") is worker
    second = worker_in(tmp_path / "run", small, made_up)
    assert worker_of("run") is second


def test_wrong_commands_do_not_reach_a_running_search(gated, tmp_path):
    "The error is raised where the command was sent; the search does not notice."
    worker, gate = gated
    for wrong in ({"command": "reverse"}, {"command": "set", "setting": "offspring", "value": 1}, {"command": "branch", "generation": 5}):
        with pytest.raises(ValueError):
            worker.send(wrong)
    gate.let()
    gate.wait()
    assert worker.status == "running" and not len(History(tmp_path / "run").commands)


def test_commands_are_checked_against_those_before_them_in_the_queue(gated, tmp_path):
    "Fewer offspring need fewer survivors first; both may be sent before either is applied."
    worker, gate = gated
    with pytest.raises(ValueError, match="must narrow"):
        worker.send({"command": "set", "setting": "offspring", "value": 1})
    worker.send({"command": "set", "setting": "stages", "value": [[1, 0, 32]]})
    worker.send({"command": "set", "setting": "offspring", "value": 1})
    gate.open = True
    gate.let()
    assert worker.join(PATIENCE) and [len(row) for row in History(tmp_path / "run").generations.offspring] == [4, 1, 1]


def test_a_failure_ends_the_thread_not_the_process(small, tmp_path):
    "Status, traceback and state.json say what happened; start tries again from the log, and nothing that was done is repeated."
    calls = []

    def fails_once(genome, generation, stage):
        calls.append(genome)
        if len(calls) == 7:
            raise MemoryError("out of memory in the made-up evaluator")
        return made_up(genome, generation, stage)

    worker = worker_in(tmp_path / "run", small, fails_once).start()
    assert worker.join(PATIENCE) and worker.status == "failed" and "out of memory in the made-up evaluator" in worker.error and "fails_once" in worker.error
    state = History(tmp_path / "run").state
    assert state["status"] == "failed" and state["error"].startswith("Traceback") and state["error"].rstrip().endswith("out of memory in the made-up evaluator") and state["generation"] == 0
    with DirectoryLock(tmp_path / "run"):  # free
        pass
    assert worker.start().join(PATIENCE) and worker.status == "finished" and worker.error is None
    assert len(calls) == len(History(tmp_path / "run").evaluations) + 1 and History(tmp_path / "run").state["error"] is None
    Search(tmp_path / "plain", *small, small_pools(), short_config(), by(made_up)).run(progress=False)
    assert events(tmp_path / "run") == events(tmp_path / "plain")


def test_a_generation_that_cannot_begin_fails_and_can_be_helped(small, tmp_path, monkeypatch):
    "Offspring that cannot be found, and no command's check foresaw it: the run fails, and a command sent then is applied before the next try."
    search = Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up))
    original = search_module.mutants

    def mutants(inputs, parent, position):
        if position.generation == 1 and position.rules.max_swaps > 1:
            raise MutationError("only 0 of 4 distinct offspring")
        return original(inputs, parent, position)

    monkeypatch.setattr(search_module, "mutants", mutants)
    worker = Worker(search).start()
    assert worker.join(PATIENCE) and worker.status == "failed" and "distinct offspring" in worker.error
    worker.send({"command": "set", "setting": "max_swaps", "value": 1})
    assert worker.start().join(PATIENCE) and worker.status == "finished"


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from helpers import by, made_up, short_config, small_model, small_pools
from evoprune_nb.database import LevelDatabase
from evoprune_nb.search import Search
model = small_model("llama-gqa")
search = Search(sys.argv[3], model, LevelDatabase(sys.argv[2], model), small_pools(), short_config(), by(made_up))
with search.driving():
    for _ in range(5):
        search.step()
    print("driving", flush=True)
    sys.stdin.read()
"""


def test_another_process_that_drives_is_respected(small, tmp_path):
    "A second process is refused with the first one's name; it may read; when the first is killed, it takes over and ends like a run never killed."
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(Path(__file__).parent), str(small[1].directory), str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert child.stdout.readline() == "driving\n"
        search = Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up))
        worker = Worker(search)
        for drive in (worker.start, search.step, lambda: search.run(progress=False)):
            with pytest.raises(DirectoryBusy, match=rf"written by process {child.pid} on \S+ since 20\d\d.*attach to it to watch"):
                drive()
        assert not worker.alive and worker.error is None
        history = History(tmp_path / "run")
        assert len(history.evaluations) == 4 and history.state["status"] == "running" and history.state["pid"] == child.pid
        with open(tmp_path / "run" / "events.jsonl", "ab") as file:
            file.write(b'{"event": "evaluation", "gen')  # it is writing just now
        assert not history.refresh() and Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up)).generation == 0
        assert (tmp_path / "run" / "events.jsonl").read_bytes().endswith(b'"gen')
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert history.refresh() and history.state["status"] == "stopped" and history.state["killed"]
    assert worker.start().join(PATIENCE) and worker.status == "finished"
    Search(tmp_path / "plain", *small, small_pools(), short_config(), by(made_up)).run(progress=False)
    assert events(tmp_path / "run") == events(tmp_path / "plain")


def test_two_objects_that_take_turns(small, tmp_path):
    "The lock is held for a step only; who finds that somebody else went on reads the log again. Together they make the run of one."
    one, two = (Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up)) for _ in range(2))
    for _ in range(3):
        one.step()
    while len(events(tmp_path / "run")) < 9:
        two.step()
    assert one.run(progress=False) == Search(tmp_path / "plain", *small, small_pools(), short_config(), by(made_up)).run(progress=False)
    assert events(tmp_path / "run") == events(tmp_path / "plain")


def test_interrupting_a_paused_run(small, tmp_path):
    "Ctrl-C while `run` waits in a pause leaves a stopped run that goes on later."
    search = Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up))
    search.send({"command": "pause"})
    search.queue.wait = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        search.run(progress=False)
    assert search.status == "stopped" and read_state(tmp_path / "run")["status"] == "stopped"
    assert Search(tmp_path / "run", *small, small_pools(), short_config(), by(made_up)).run(progress=False) and json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "finished"


ELSEWHERE = """
import socket, sys
socket.gethostname = lambda: "elsewhere"
sys.path.insert(0, sys.argv[1])
from helpers import by, made_up, short_config, small_model, small_pools
from evoprune_nb.database import LevelDatabase
from evoprune_nb.machine.lock import DirectoryBusy
from evoprune_nb.search import Search
from evoprune_nb.ui.worker import Worker
model = small_model("llama-gqa")
worker = Worker(Search(sys.argv[3], model, LevelDatabase(sys.argv[2], model), small_pools(), short_config(), by(made_up)))
try:
    worker.start()
except DirectoryBusy as error:
    print(error)
worker.send({"command": "set", "setting": "offspring", "value": 4})
worker.send({"command": "pause"})
"""


def test_another_machine_sends_to_a_running_search(gated, small, tmp_path):
    "It is refused the run, by the name of who has it; its commands arrive, a pause too, although it has gone."
    worker, gate = gated
    said = subprocess.run([sys.executable, "-c", ELSEWHERE, str(Path(__file__).parent), str(small[1].directory), str(tmp_path / "run")], check=True, timeout=PATIENCE, capture_output=True, text=True).stdout
    assert f"process {os.getpid()} on {platform.node()}" in said
    gate.let()
    assert worker.wait("paused", timeout=PATIENCE) and worker.search.rules.offspring == 4
    assert [row["command"]["command"] for row in events(tmp_path / "run") if row["event"] == "command"] == ["set", "pause"]


LEAVES = """
import sys, time
sys.path.insert(0, sys.argv[1])
from helpers import short_config, small_model, small_pools
from evoprune_nb.database import LevelDatabase
from evoprune_nb.search import Search
from evoprune_nb.ui.worker import Worker
model = small_model("llama-gqa")
search = Search(sys.argv[3], model, LevelDatabase(sys.argv[2], model), small_pools(), short_config(n_jobs=2))
evaluate, search.engine.evaluations.evaluator.evaluate = search.engine.evaluations.evaluator.evaluate, lambda *task: time.sleep(1) or evaluate(*task)
Worker(search).start()
time.sleep(0.5)
"""


def test_a_script_that_ends_leaves_a_run_to_go_on_with(small, tmp_path):
    "Python ends without waiting for candidates that are evaluated side by side; the run was killed, not failed, and ends like one that was not."
    subprocess.run([sys.executable, "-c", LEAVES, str(Path(__file__).parent), str(small[1].directory), str(tmp_path / "run")], check=True, timeout=PATIENCE)
    state = History(tmp_path / "run").state
    assert state["status"] == "stopped" and state["killed"]
    for name in ("run", "plain"):
        Search(tmp_path / name, *small, small_pools(), short_config(n_jobs=2)).run(progress=False)
    assert events(tmp_path / "run") == events(tmp_path / "plain")


THREADS = """
import resource, sys, threading
import torch
from evoprune_nb.machine.allocator import keep_freed_memory, share_freed_memory

def work():
    for faults in (counts, again):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(5):
            [torch.ones(elements) for elements in (9_000_000, 30_000_000)]  # of 36 MB, and of more than a thread's region holds
        faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

counts, again = [], []
torch.set_num_threads(1)
if sys.argv[1] == "shared":
    share_freed_memory()
with keep_freed_memory():
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
print(max(again))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such regions")
def test_threads_keep_freed_memory():
    "What a thread frees stays for its next tensor, where threads share one region; without, it is delivered anew."
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    shared, apart = (int(subprocess.run([sys.executable, "-c", THREADS, way], check=True, capture_output=True, text=True, env=environment).stdout) for way in ("shared", "apart"))
    assert shared < 100 and apart > 10_000
