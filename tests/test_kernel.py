"""The workbench in a real kernel: cells return at once, clicks are taken while a cell or the search is busy, and a restarted kernel goes on."""

import pytest
from jupyter_client.manager import start_new_kernel

from evoprune_nb.history import History

WAIT = 120  # seconds, after which a wait fails
SETUP = """
import os, sys, threading
sys.path.insert(0, {tests!r})
os.environ["HF_HUB_OFFLINE"] = "1"
from evoprune_nb.source import Source
from evoprune_nb.ui.workbench import attach, open_run
from evoprune_nb.ui.session import prepare_search
from evoprune_nb.config import SearchConfig
from evoprune_nb.selection import Stage
source = Source(text={corpus!r}, seq_len=64, calibration_tokens=2048)
config = SearchConfig(generations=2, offspring=3, stages=(Stage(2, 0, 128), Stage(1, 64, 128)))
run_dir = {run_dir!r}
"""


class Kernel:
    "A kernel, and what its widgets say."

    def __init__(self, cwd):
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(cwd), startup_timeout=WAIT)
        self.models: dict[str, dict] = {}  # comm id → state, as a front end keeps it
        self.idle: set[str] = set()  # requests that are done
        self.errors: list[str] = []

    def pump(self, until) -> None:
        "Take messages in until something holds."
        for _ in range(WAIT * 20):
            if until():
                return
            try:
                self.take(self.client.get_iopub_msg(timeout=0.05))
            except Exception as error:
                if type(error).__name__ != "Empty":
                    raise
        raise AssertionError(f"waited in vain; errors: {self.errors}")

    def take(self, message: dict) -> None:
        content, kind = message["content"], message["msg_type"]
        if kind == "comm_open":
            self.models[content["comm_id"]] = content["data"].get("state", {})
        elif kind == "comm_msg" and content["data"].get("method") in ("update", "echo_update"):
            self.models.setdefault(content["comm_id"], {}).update(content["data"]["state"])
        elif kind == "status" and content["execution_state"] == "idle":
            self.idle.add(message["parent_header"].get("msg_id"))
        elif kind == "error":
            self.errors.append("\n".join(content["traceback"]))

    def run(self, code: str, wait: bool = True) -> str:
        request = self.client.execute(code)
        if wait:
            self.pump(lambda: request in self.idle)
            assert not self.errors, self.errors[0]
        return request

    def comm(self, **traits) -> str:
        "The latest widget with these traits."
        return [comm for comm, state in self.models.items() if all(state.get(name) == value for name, value in traits.items())][-1]

    def click(self, label: str) -> None:
        "Press a button as a browser does: a comm message on the shell channel."
        content = {"comm_id": self.comm(_model_name="ButtonModel", description=label), "data": {"method": "custom", "content": {"event": "click"}}}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def says(self, words: str) -> bool:
        return any(words in str(state.get("value", "")) for state in self.models.values())

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def place(tmp_path, corpus):
    return {"tests": str(tmp_path), "corpus": str(corpus), "run_dir": str(tmp_path / "run")}


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.close()


def status(place) -> str:
    return History(place["run_dir"]).state["status"]


def test_cells_return_and_clicks_are_taken_while_the_worker_is_busy(kernel, place):
    "The cell that opens the panel is done before the search is prepared; Start and Pause work while no cell runs; a second kernel that would drive is refused, and may look."
    kernel.run(SETUP.format(**place))
    kernel.run("bench = open_run(run_dir, source, config)\nready_at_return = bench.worker is not None\nbench")
    kernel.run("assert not ready_at_return")
    kernel.pump(lambda: kernel.says("press Start"))
    kernel.click("Start")
    kernel.pump(lambda: kernel.says(">running<"))
    kernel.click("Pause")
    kernel.pump(lambda: kernel.says("applied: pause"))
    kernel.pump(lambda: status(place) == "paused")
    second = Kernel(place["tests"])
    try:
        second.run(SETUP.format(**place))
        second.run("bench = attach(run_dir)\nbench\nassert 'view only: driven by process' in bench.head.value and bench.run.start.disabled")
        second.run("from evoprune_nb.machine.lock import DirectoryBusy\nsearch, _ = prepare_search(source, bench.run_dir, config)\ntry:\n    search.step()\n    raise AssertionError('two drivers')\nexcept DirectoryBusy as error:\n    print(error)")
    finally:
        second.close()


def test_a_restarted_kernel_goes_on(kernel, place):
    "The kernel is killed in the middle of a run; after the restart, attach and Start finish it, and the result is that of a run in one go."
    kernel.run(SETUP.format(**place))
    kernel.run("bench = open_run(run_dir, source, config)\nbench")
    kernel.pump(lambda: kernel.says("press Start"))
    kernel.click("Step: generation")
    kernel.pump(lambda: (kernel.says(">paused<")) and len(History(place["run_dir"]).line) == 1)
    kernel.manager.restart_kernel(now=True)
    kernel.client.wait_for_ready(timeout=WAIT)
    kernel.models.clear()
    kernel.run(SETUP.format(**place))
    kernel.run("bench = attach(run_dir)\nbench")
    kernel.pump(lambda: kernel.says("nobody drives it now; Start goes on, and loads the model first"))
    kernel.click("Start")
    kernel.pump(lambda: kernel.says(">finished<"))
    kernel.run("search, _ = prepare_search(source, bench.run_dir.with_name('alone'), config)\nassert search.run(progress=False) == bench.history.winner")
