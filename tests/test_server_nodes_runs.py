"""Runs whose servers are on separate nodes, started by one torchrun per node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import warm
from tests.ports import reserved_port
from tests.runs import HELD, Runs, gone, rank_of, wait_for

pytestmark = pytest.mark.slow


class Torchruns:
    """One torchrun per node on this machine, with the requested node ranks."""

    def __init__(self, runs: Runs, folder: Path, nodes: int, port: int) -> None:
        self._runs, self._folder, self._nodes, self._port = runs, folder, nodes, port
        self.processes: list[subprocess.Popen | warm.Process] = []

    def start(self, *options: str, processes: int = 1, restarts: int = 0, **environment: str) -> None:
        for node in range(self._nodes):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(self._nodes)]
            command += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
            command += ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(self._port)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
            command += ["examples/run_etr.sh", *self._runs.command(*options)[3:]]
            self.processes.append(warm.start(command, env, self.output(node), spares=processes * restarts))

    def output(self, node: int) -> Path:
        return self._folder / f"node{node}.log"

    def said(self) -> str:
        return "\n".join(self.output(node).read_text()[-3000:] for node in range(self._nodes))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        wait_for(lambda: condition() or self.processes[0].poll() is not None)
        assert condition(), self.said()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def three_nodes(runs, tmp_path):
    with reserved_port() as port:
        found = Torchruns(runs, tmp_path, 3, port)
        yield found
        found.end()


FAKE = (f"sglang.python={sys.executable}", "sglang.launch=[-m,tests.fake_sglang]")
OPTIONS = ("run.name=apart", "rollout.backend=sglang", "sglang.dedicated_nodes=2", *FAKE, "rollout.max_logprob_gap=100")
OPTIONS += ("eval.every=0", "checkpoint.every=0", "sglang.update_timeout_s=120")


def servers_of(runs: Runs) -> list[dict[str, Any]]:
    """States of the servers on nodes 1 and 2."""
    logs = [runs.directory("apart") / "servers" / f"sglang_server_{number}.log" for number in range(2)]
    ports = [next(line for line in log.read_text().splitlines() if line.isdigit()) for log in logs]
    return [httpx.get(f"http://127.0.0.1:{port}/state").json() for port in ports]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_a_run_goes_on_without_a_node_of_servers_that_is_lost(runs, three_nodes):
    three_nodes.start(*OPTIONS, HELD, "run.steps=4", HOLD=runs.hold("step 2"), LOST_S="10")
    three_nodes.wait_for(lambda: runs.is_held)
    states = servers_of(runs)
    assert all(state["prompts"] for state in states)
    agent = three_nodes.processes[2]
    node = parent(parent(states[1]["pid"]))  # parents: the server's watchdog, then the node's process
    assert parent(node) == agent.pid
    agent.kill()  # this ends the node as well
    wait_for(lambda: gone(states[1]["pid"]))
    runs.let_go()
    status = runs.directory("apart") / "status.json"
    wait_for(lambda: json.loads(status.read_text())["state"] == "finished")
    assert len(runs.rows("apart")) == 4
    wait_for(lambda: gone(states[0]["pid"]), deadline_s=250)  # torchrun waits another five minutes for the lost node
    assert "SGLang server 1 gets no more requests: " in three_nodes.output(0).read_text(), three_nodes.said()


def test_a_run_whose_rank_0_was_killed_is_started_again_with_servers_started_anew(runs, three_nodes):
    """With --node-rank, each torchrun restarts only its own processes, and their common store outlives these."""
    options = (*OPTIONS, HELD, "checkpoint.every=1", "run.steps=5", "sglang.sync=disk")
    three_nodes.start(*options, restarts=2, HOLD=runs.hold("step 3"))
    three_nodes.wait_for(lambda: runs.is_held)
    before = servers_of(runs)
    saved = runs.saved_rows("apart")
    os.kill(rank_of(three_nodes.processes[0].pid, 0), signal.SIGKILL)
    codes = [process.wait(900) for process in three_nodes.processes]
    assert codes == [0, 0, 0], three_nodes.said()
    assert [row["step"] for row in runs.rows("apart")] == list(range(1, 6))
    runs.assert_went_on("apart", saved)
    assert all(gone(state["pid"]) for state in before)
    logs = [runs.directory("apart") / "servers" / f"sglang_server_{number}.log" for number in range(2)]
    assert [sum(line.isdigit() for line in log.read_text().splitlines()) for log in logs] == [2, 2]


def test_several_servers_a_node_take_what_several_ranks_send_them_shard_by_shard(runs, three_nodes):
    options = ("sglang.sync=sharded", "sglang.servers=2", "run.steps=3")
    three_nodes.start(*OPTIONS, *options, processes=2)
    codes = [process.wait(900) for process in three_nodes.processes]
    assert codes == [0, 0, 0], three_nodes.said()
    assert [row["weight_version"] for row in runs.rows("apart")] == [0, 1, 2]
    logs = sorted(path.name for path in (runs.directory("apart") / "servers").glob("sglang_server_*.log"))
    assert logs == [f"sglang_server_{number}.log" for number in range(4)]
    assert "gets no more requests" not in three_nodes.said()


def test_sigterm_to_a_node_of_servers_saves_the_run_and_ends_it_to_be_started_again(runs, three_nodes):
    three_nodes.start(*OPTIONS, "run.steps=500", "run.stop_grace_s=240", FAKE_SGLANG=json.dumps({"seconds": 0.3}))
    three_nodes.wait_for(lambda: len(runs.rows("apart")) >= 2)
    states = servers_of(runs)
    begun = time.monotonic()
    three_nodes.processes[1].send_signal(signal.SIGTERM)
    codes = [process.wait(900) for process in three_nodes.processes]
    assert all(codes) and time.monotonic() - begun < 200, three_nodes.said()
    status = json.loads((runs.directory("apart") / "status.json").read_text())
    assert status["state"] == "requeue" and status["step"] == len(runs.rows("apart")) >= 2
    assert "told to stop (SIGTERM)" in three_nodes.output(0).read_text()
    assert all(gone(state["pid"]) for state in states)
