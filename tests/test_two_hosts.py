"""Two hosts on one machine: network namespaces with separate addresses, joined by a virtual cable, one torchrun in each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.runs import HELD, REPO, Runs, gone, wait_for
from tests.test_sglang_server import ARGUMENTS, LAUNCH
from tests.test_sglang_server import PYTHON as SGLANG

pytestmark = pytest.mark.slow

ADDRESSES = ("10.77.31.1", "10.77.31.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts:
    """Two namespaces; `start(0, ...)` runs a command on the first host."""

    def __init__(self) -> None:
        tag = os.getpid() % 100_000
        self.names = [f"etr{tag}a", f"etr{tag}b"]
        self.cables = [f"v{tag}a", f"v{tag}b"]

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.cables[0], "type", "veth", "peer", "name", self.cables[1])
        for name, cable, address in zip(self.names, self.cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            for words in (
                ("addr", "add", f"{address}/24", "dev", cable),
                ("link", "set", cable, "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", name, *words)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def _environment(self, host: int, more: dict[str, str]) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            # Both hosts have the machine's name, so a host's own address cannot be derived from it.
            "PET_LOCAL_ADDR": ADDRESSES[host],
            "PET_RDZV_CONF": f"is_host={int(host == 0)}",
            "GLOO_SOCKET_IFNAME": self.cables[host],
            **more,
        }

    def start(self, host: int, *command: str, output: Path, **environment: str) -> subprocess.Popen:
        """Output goes to a file: a full pipe would block the host."""
        with open(output, "a") as file:
            return subprocess.Popen(
                # Processes that see each other's /dev/shm take themselves for ones of the same machine.
                [*self.inside(host), "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh", *command],
                cwd=REPO,
                env=self._environment(host, environment),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_node(
        self, host: int, runs: Runs, *overrides: str, output: Path, spares: int = 0, **environment: str
    ) -> subprocess.Popen | warm.Process:
        """Run examples/torchrun_node.sh, with one process per host, and on this host the torchrun that it starts."""
        command = ["bash", "examples/torchrun_node.sh", "2", "1", ADDRESSES[0], *runs.command(*overrides)[3:]]
        env = self._environment(host, environment)
        shim = runs.folder / "bin" / "torchrun"  # says with what the script starts it
        shim.parent.mkdir(exist_ok=True)
        shim.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n")
        shim.chmod(0o755)
        asked = {**env, "PATH": f"{shim.parent}:{env['PATH']}"}
        said = subprocess.run(command, cwd=REPO, env=asked, check=True, capture_output=True, text=True).stdout
        arguments, of_torchrun = json.loads(said)
        return self.start_torchrun(host, *arguments, output=output, spares=spares, **{**of_torchrun, "PATH": env["PATH"]})

    def start_torchrun(
        self, host: int, *arguments: str, output: Path, spares: int = 0, **environment: str
    ) -> subprocess.Popen | warm.Process:
        """It starts warm, see tests/warm.py, in a session of its own."""
        command = [sys.executable, "-m", "torch.distributed.run", *arguments]
        if not warm.IS_POSSIBLE:
            return self.start(host, *command, output=output, **environment)
        return warm.start(command, self._environment(host, environment), output, host=self.names[host], spares=spares)

    def inside(self, host: int) -> list[str]:
        """The start of a command that runs on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def get(self, host: int, url: str, key: str = "none") -> tuple[int, str]:
        """Status and body of the reply to a request from a host."""
        ask = "import sys, httpx; r = httpx.get(sys.argv[1], headers={'Authorization': 'Bearer ' + sys.argv[2]}, timeout=20)"
        command = [sys.executable, "-c", f"{ask}; print(r.status_code, r.text)", url, key]
        said = subprocess.run([*self.inside(host), *command], check=True, capture_output=True, text=True)
        status, body = said.stdout.split(" ", 1)
        return int(status), body


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    found = Hosts()
    try:
        found.connect()
    except (OSError, subprocess.CalledProcessError) as error:
        found.remove()
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
    yield found
    found.remove()


def end(processes: list[subprocess.Popen | warm.Process]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def states_of_two(hosts: Hosts, folder: Path, addresses: tuple[str, str], key_file: str) -> list[dict[str, Any]]:
    """States of fake servers at these addresses; they require the key in that file and have received weights and prompts."""
    logs = [(folder / f"sglang_server_{server}.log").read_text() for server in range(2)]
    ports = [next(line for line in log.splitlines() if line.isdigit()) for log in logs]
    urls = [f"http://{address}:{port}/state" for address, port in zip(addresses, ports, strict=True)]
    key = json.loads((folder / key_file).read_text().removeprefix("api-key: "))
    assert [hosts.get(0, url)[0] for url in urls] == [401, 401]
    states = [json.loads(hosts.get(0, url, key)[1]) for url in urls]
    assert all(int(state["version"]) >= 2 and state["prompts"] for state in states)
    return states


def test_a_lost_host_is_started_again_and_the_run_goes_on_as_if_nothing_had_happened(hosts, runs, tmp_path):
    short = ("run.steps=4", "eval.every=0")
    options = ("run.name=hosts", "checkpoint.every=1", "checkpoint.keep=2", *short, HELD)
    outputs = [tmp_path / "host0.log", tmp_path / "host1.log"]
    hold = runs.hold("step 3")
    processes = [hosts.start_node(host, runs, *options, output=outputs[host], spares=1 - host, HOLD=hold) for host in range(2)]
    try:
        wait_for(lambda: runs.is_held)
        os.killpg(processes[1].pid, signal.SIGKILL)  # as in a power failure; ranks and graders end with it
        processes[1].wait()
        saved = runs.saved_rows("hosts")
        assert len(saved) == 2
        runs.let_go()
        processes.append(hosts.start_node(1, runs, *options, output=outputs[1]))
        assert [processes[index].wait(900) for index in (0, 2)] == [0, 0], "\n".join(
            output.read_text()[-4000:] for output in outputs
        )
    finally:
        end(processes)
    assert json.loads((runs.directory("hosts") / "status.json").read_text())["state"] == "finished"
    code, printed = runs.finish("run.name=one_host", *short, "--nproc", "2")
    assert code == 0, printed
    assert len(runs.rows("hosts")) == 4 and runs.rows("hosts") == runs.rows("one_host")
    runs.assert_went_on("hosts", saved)


def test_servers_on_every_host_have_a_key_and_the_weights_and_end_with_a_lost_host(hosts, runs, tmp_path):
    """Rank 0 also controls the server on the other host. The servers are fake; what starts and supervises them is not."""
    options = ("run.name=hosts", "run.steps=200", "eval.every=0", "checkpoint.every=0", "rollout.backend=sglang")
    options += ("sglang.nodes=every", f"sglang.python={sys.executable}", "sglang.launch=[-m,tests.fake_sglang]")
    options += ("rollout.max_logprob_gap=100", "sglang.update_timeout_s=120", "run.phase_timeout_s=240")
    outputs, folder = [tmp_path / "host0.log", tmp_path / "host1.log"], runs.directory("hosts") / "servers"
    slow = {"FAKE_SGLANG": json.dumps({"seconds": 0.5}), "ETR_RESTARTS": "0"}
    processes = [hosts.start_node(host, runs, *options, output=outputs[host], **slow) for host in range(2)]
    try:
        wait_for(lambda: len(runs.rows("hosts")) >= 2)
        states = states_of_two(hosts, folder, ADDRESSES, f".{ADDRESSES[1]}_0.yaml")
        assert states[0]["sums"].keys() == states[1]["sums"].keys() != set()
        os.killpg(processes[1].pid, signal.SIGKILL)
        assert processes[0].wait(900) != 0
        wait_for(lambda: all(gone(state["pid"]) for state in states))
    finally:
        end(processes)
    status = json.loads((runs.directory("hosts") / "status.json").read_text())
    assert status["state"] in ("failed", "requeue") and status["step"] >= 2


def test_a_host_that_is_set_apart_for_servers_has_a_key_and_the_weights_and_its_loss_stops_the_run_with_all_saved(
    hosts, runs, tmp_path
):
    options = ("run.name=apart", "run.steps=200", "eval.every=0", "checkpoint.every=0", "rollout.backend=sglang")
    options += ("sglang.dedicated_nodes=1", "sglang.servers=2", f"sglang.python={sys.executable}")
    options += ("sglang.launch=[-m,tests.fake_sglang]", "rollout.max_logprob_gap=100", "sglang.update_timeout_s=120")
    outputs, folder = [tmp_path / "host0.log", tmp_path / "host1.log"], runs.directory("apart") / "servers"
    slow = {"FAKE_SGLANG": json.dumps({"seconds": 0.5}), "ETR_RESTARTS": "0"}
    processes = [hosts.start_node(host, runs, *options, output=outputs[host], **slow) for host in range(2)]
    try:
        wait_for(lambda: len(runs.rows("apart")) >= 2)
        states = states_of_two(hosts, folder, (ADDRESSES[1], ADDRESSES[1]), f".{ADDRESSES[1]}_1.yaml")
        os.killpg(processes[1].pid, signal.SIGKILL)
        assert processes[0].wait(900) != 0
        wait_for(lambda: all(gone(state["pid"]) for state in states))
    finally:
        end(processes)
    status = json.loads((runs.directory("apart") / "status.json").read_text())
    assert status["state"] == "requeue" and status["step"] >= 2, outputs[0].read_text()[-3000:]
    assert "no SGLang server is left: SGLang server 0: " in status["message"]
    saved = runs.directory("apart") / "checkpoints" / f"step_{status['step']:06d}"
    assert saved.is_dir()


@pytest.mark.skipif(not SGLANG.exists(), reason="no .venv-sglang: `bash tools/setup_env.sh --sglang` makes it")
@pytest.mark.parametrize(
    "where",
    [
        ("sglang.dedicated_nodes=1",),
        ("sglang.nodes=every", "sglang.nodes_per_server=2", "sglang.tp=2"),
    ],
    ids=["a host apart", "a server over both"],
)
def test_hosts_train_on_what_sglang_generates_with_its_log_probs(hosts, runs, tmp_path, where):
    """The probe of a sync and the check in the first step compare them."""
    quoted = ",".join(f"'{argument}'" for argument in ARGUMENTS)
    options = ("run.name=apart", "run.steps=2", "eval.every=0", "checkpoint.every=0", "rollout.backend=sglang", *where)
    options += (f"sglang.launch=[{LAUNCH}]", f"sglang.arguments=[{quoted}]", "sglang.mem_fraction=0.2", "sglang.probe_every=1")
    outputs = [tmp_path / "host0.log", tmp_path / "host1.log"]
    processes = [hosts.start_node(host, runs, *options, output=outputs[host], ETR_RESTARTS="0") for host in range(2)]
    try:
        codes = [process.wait(1500) for process in processes]
    finally:
        end(processes)
    assert codes == [0, 0], "\n".join(output.read_text()[-3000:] for output in outputs)
    rows = runs.rows("apart")
    assert [row["weight_version"] for row in rows] == [0, 1] and all(row["logprob_gap_mean"] < 1e-5 for row in rows)
    logs = sorted(path.name for path in (runs.directory("apart") / "servers").glob("*.log"))
    assert logs == ["sglang_server_0.log", "sglang_server_0_node_1.log"][: 1 + len(where) // 3]


def test_the_preflight_measures_the_cable_and_names_what_differs(hosts, tmp_path):
    outputs = [tmp_path / "host0.log", tmp_path / "host1.log"]
    command = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "preflight"]
    command += ["--rdzv-endpoint", f"{ADDRESSES[0]}:29511", "-m", "etr_megatron.preflight", "configs/cpu_tiny.yaml"]
    # Each host has a different run.dir.
    processes = [
        hosts.start_torchrun(host, *command, f"run.dir={tmp_path / f'runs{host}'}", output=outputs[host]) for host in range(2)
    ]
    try:
        codes = [process.wait(900) for process in processes]
    finally:
        end(processes)
    said = outputs[0].read_text()
    assert codes[0] != 0 and "error: 1 of 15 checks failed: run.dir is shared" in said, said
    assert "node 1 (" in said and "cannot see what rank 0 writes there" in said
    assert "1 pairs, median " in said and " GB/s" in said
