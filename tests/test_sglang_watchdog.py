"""A server and its child processes end with the job, however the job ends."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang import hosts
from etr_megatron.rollout.sglang.hosts import Host
from etr_megatron.rollout.sglang.server import ServerCommand, ServerProcess, environment_of_server, share_of_free
from etr_megatron.rollout.sglang.watchdog import LEFT_BEHIND
from tests.runs import REPO, gone, wait_for

# Starts a child that ignores SIGTERM, prints both pids, and waits, itself ignoring SIGTERM.
SERVER = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
print("pids", os.getpid(), child.pid, flush=True)
time.sleep(float(os.environ.get("LIVES", 600)))
sys.exit(7)
"""
ANSWERS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
# Chooses its share of the memory itself unless it is given one, and prints what it is started with.
CHOOSES = """
import http.server, json, sys
print(sys.argv[1:-4], flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"tp_size": 1, "mem_fraction_static": 0.4} if self.path == "/server_info" else {}).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
# Has a child that opens a file, as SGLang's scheduler does, prints its path, and leaves it after as many seconds as LIVES.
LEAVES = """
import os, signal, sys, time
if os.fork() == 0:
    os.open(sys.argv[1], os.O_CREAT | os.O_RDWR, 0o600)
    print("opened", flush=True)
time.sleep(float(os.environ.get("LIVES", 600)))
os.killpg(0, signal.SIGKILL)
"""
JOB = """
import sys, time
from pathlib import Path
from etr_megatron.rollout.sglang import server
server._GRACE_S = 1.0
process = server.ServerProcess("server", server.ServerCommand(sys.executable, ("-c", sys.argv[1]), ()), Path(sys.argv[2]))
time.sleep(600)
"""


def pids_in(log) -> list[int]:
    for line in log.read_text().splitlines() if log.exists() else ():
        if line.startswith("pids"):
            return [int(pid) for pid in line.split()[1:]]
    return []


@pytest.mark.slow
def test_kill_9_of_the_job_leaves_nothing_of_a_server_that_ignores_sigterm(tmp_path):
    log = tmp_path / "server.log"
    job = subprocess.Popen([sys.executable, "-c", JOB, SERVER, str(log)], cwd=REPO)
    try:
        wait_for(lambda: bool(pids_in(log)))
        pids = pids_in(log)
        assert not any(map(gone, pids))
    finally:
        job.kill()
        job.wait()
    wait_for(lambda: all(map(gone, pids)))


def test_stop_ends_the_server_and_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr("etr_megatron.rollout.sglang.server._GRACE_S", 1.0)
    process = ServerProcess("server", ServerCommand(sys.executable, ("-c", SERVER), ()), tmp_path / "server.log")
    wait_for(lambda: bool(pids_in(process.log)))
    assert process.is_running
    process.stop()
    assert not process.is_running
    wait_for(lambda: all(map(gone, pids_in(process.log))), deadline_s=300)  # killed, which takes a busy machine a while


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_whose_watchdog_is_lost_ends_with_stop_all_the_same(tmp_path, monkeypatch, number):
    monkeypatch.setattr("etr_megatron.rollout.sglang.server._GRACE_S", 1.0)
    process = ServerProcess("server", ServerCommand(sys.executable, ("-c", SERVER), ()), tmp_path / "server.log")
    wait_for(lambda: bool(pids_in(process.log)))
    server, child = pids_in(process.log)
    process._watchdog.send_signal(number)
    if number == signal.SIGKILL:
        wait_for(lambda: gone(server))  # killed by the kernel
    assert not gone(child)
    process.stop()
    wait_for(lambda: gone(server) and gone(child))
    assert not process.is_running
    process.stop()  # by now the pids may belong to other processes


def test_children_of_a_server_that_ends_by_itself_end_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr("etr_megatron.rollout.sglang.server._GRACE_S", 1.0)
    command = ServerCommand(sys.executable, ("-c", SERVER), (), {"LIVES": "0.5"})
    process = ServerProcess("server", command, tmp_path / "server.log")
    wait_for(lambda: not process.is_running)
    wait_for(lambda: all(map(gone, pids_in(process.log))))
    process.stop()


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["stopped", "by itself", "without its watchdog"])
def test_a_servers_file_in_shared_memory_is_removed_with_it_and_no_other(tmp_path, monkeypatch, ends):
    monkeypatch.setattr("etr_megatron.rollout.sglang.server._GRACE_S", 1.0)
    own, others, nobodys = (Path(f"{LEFT_BEHIND}{secrets.token_hex(6)}_0.shm") for _ in range(3))
    environment = {"LIVES": "2"} if ends == "by itself" else {}  # a watchdog looks once a second
    try:
        nobodys.touch()
        with others.open("w"):
            command = ServerCommand(sys.executable, ("-c", LEAVES, str(own)), (), environment)
            process = ServerProcess("server", command, tmp_path / "server.log")
            wait_for(lambda: "opened" in process.said())
            assert own.exists()
            if ends == "by itself":
                wait_for(lambda: not process.is_running)
            elif ends == "without its watchdog":
                process._watchdog.send_signal(signal.SIGSTOP)
            process.stop()
            assert (own.exists(), others.exists(), nobodys.exists()) == (False, True, True)
    finally:
        for file in (own, others, nobodys):
            file.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_server_that_does_not_answer_in_time_is_ended_and_one_that_does_is_not(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):  # proxies are not used for the job's own machines
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr("etr_megatron.rollout.sglang.server._GRACE_S", 0.5)
    commands = {name: ServerCommand(sys.executable, ("-c", code), ()) for name, code in (("deaf", SERVER), ("well", ANSWERS))}
    host, answers = Host(commands, tmp_path, startup_timeout_s=3.0), hosts._answers

    def however_slow_the_machine_is(url: str) -> bool:
        is_well = url == host._processes["well"].url
        wait_for(lambda: answers(url) if is_well else bool(pids_in(tmp_path / "deaf.log")))
        return answers(url)

    monkeypatch.setattr(hosts, "_answers", however_slow_the_machine_is)
    try:
        started = host.start(["deaf", "well", "on another machine"])  # the first takes the whole timeout
        assert started.keys() == {"deaf", "well"} and started["well"].problem is None
        assert started["deaf"].problem.startswith("deaf did not answer within 3 s at http://127.0.0.1:")
        pids = pids_in(tmp_path / "deaf.log")
        assert len(pids) == 2
        wait_for(lambda: all(map(gone, pids)), deadline_s=300)
        host.stop(["deaf", "on another machine"])
        assert httpx.get(f"{started['well'].url}/health", trust_env=False).status_code == 200
    finally:
        host.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{started['well'].url}/health", trust_env=False)


def test_a_missing_interpreter_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"sglang\.python: /.+/nowhere/python does not exist; `bash tools/setup_env"):
        ServerProcess("server", ServerCommand("nowhere/python", (), ()), tmp_path / "server.log")


def test_a_server_inherits_nothing_that_is_for_the_rank_alone_uses_no_proxy_and_finds_its_own_programs():
    inherited = {"RANK": "1", "MASTER_ADDR": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "0", "PATH": "/bin"}
    inherited |= dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True")
    inherited |= {"no_proxy": "elsewhere", "http_proxy": "http://proxy:1"}
    kept = {"PATH": "/env/bin:/bin", "http_proxy": "http://proxy:1", "no_proxy": "*", "NO_PROXY": "*"}
    assert environment_of_server(inherited, "/env/bin/python") == kept


@pytest.mark.parametrize(
    ("said", "share"),
    [
        ("79000, 81559", 0.4),  # only contexts
        ("40000, 81559\n44000, 81559", 0.816),
        ("20000, 81559", 0.95),
        ("0, 81559", 0.95),
        ("No devices were found", 0.4),
        ("", 0.4),
    ],
)
def test_a_server_that_is_started_beside_ranks_gets_as_much_memory_as_on_an_empty_gpu(tmp_path, monkeypatch, said, share):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho \"$@\" >>{tmp_path}/asked\nprintf '{said}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    command = ServerCommand(sys.executable, ("-c", "import sys; print(sys.argv[1:3], flush=True)"), (), memory=0.4)
    server = ServerProcess("server", replace(command, environment={"CUDA_VISIBLE_DEVICES": "4,5"}), tmp_path / "server.log")
    wait_for(lambda: not server.is_running)
    server.stop()
    assert server.last_words() == f"['--mem-fraction-static', '{share:g}']"
    assert (tmp_path / "asked").read_text().split()[-2:] == ["-i", "4,5"]


@pytest.mark.parametrize(("shares_gpus", "again"), [(True, "['--mem-fraction-static', '0.816']"), (False, "[]")])
def test_a_colocated_server_that_chose_its_share_of_an_empty_gpu_gets_as_much_beside_ranks(
    tmp_path, monkeypatch, shares_gpus, again
):
    command = ServerCommand(sys.executable, ("-c", CHOOSES), (), shares_gpus=shares_gpus)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 40000, 81559\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    host = Host({"server": command}, tmp_path, startup_timeout_s=60.0)
    try:
        for _ in range(3):
            assert host.start(["server"])["server"].problem is None
    finally:
        host.stop()
    lines = (tmp_path / "server.log").read_text().splitlines()
    assert [line for line in lines if line.startswith("[")] == ["[]", again, again]


def test_without_nvidia_smi_a_servers_fraction_is_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert share_of_free(0.4, None) == 0.4
