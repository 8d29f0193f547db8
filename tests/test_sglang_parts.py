"""Servers that span several nodes: all parts of one start, fail and end together, whichever machine they are on."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import psutil
import pytest
import torch.distributed as dist

from etr_megatron.config import SglangConfig
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.rollout.sglang import job_servers, parts
from etr_megatron.rollout.sglang.hosts import Started
from etr_megatron.rollout.sglang.job_servers import JobServers
from etr_megatron.rollout.sglang.machines import ServerSetting, machine_of
from etr_megatron.rollout.sglang.parts import merged
from etr_megatron.rollout.sglang.places import parts_of
from tests.runs import gone, wait_for
from tests.test_sglang_engine import check_sums

LAUNCH = dict(python=sys.executable, launch=("-m", "tests.fake_parts"))
SERVER = "SGLang server 0"


class Machines:
    """The hosts of a server's nodes, each with a connection to the job's store of its own."""

    def __init__(self, folder, number: int = 3, **settings: Any) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        settings = dict(tp=number, nodes_per_server=number, startup_timeout_s=120.0) | LAUNCH | settings
        self.config = SglangConfig(**settings)
        setting = ServerSetting(str(folder / "model"), "float32", str(folder), None, False)
        stores = [dist.TCPStore("127.0.0.1", self.store.port, is_master=False, wait_for_workers=False) for _ in range(number)]
        self.hosts = [machine_of(self.config, [SERVER], part, "127.0.0.1", setting, store) for part, store in enumerate(stores)]
        self.folder = folder

    def start(self, attempt: str, which: Any = slice(None), must_stop: Any = lambda: False) -> list[dict[str, Started]]:
        with ThreadPoolExecutor() as pool:
            begun = [pool.submit(host.start, [SERVER], must_stop, attempt) for host in self.hosts[which]]
            return [one.result() for one in begun]

    def pids(self) -> list[int]:
        """Of the watchdogs of all parts that were started and not stopped."""
        return [host._processes[SERVER]._watchdog.pid for host in self.hosts if SERVER in host._processes]

    def stop(self) -> None:
        for host in self.hosts:
            host.stop()


@pytest.fixture
def machines(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SGLANG", json.dumps({"weightless": True}))
    found: list[Machines] = []

    def make(**settings: Any) -> Machines:
        found.append(Machines(tmp_path, **settings))
        return found[-1]

    yield make
    for one in found:
        one.stop()


def test_a_server_answers_at_its_first_node_once_all_parts_are_there_and_restarts_whole(machines):
    all_of_it = machines()
    started = merged(all_of_it.start("first"))
    assert list(started) == [SERVER] and started[SERVER].problem is None
    assert httpx.get(f"{started[SERVER].url}/health").status_code == 200
    before = all_of_it.pids()
    assert len(before) == 3
    again = merged(all_of_it.start("second"))
    assert again[SERVER].problem is None and httpx.get(f"{again[SERVER].url}/health").status_code == 200
    assert not any(map(psutil.pid_exists, before)) and len(all_of_it.pids()) == 3
    logs = sorted(path.name for path in all_of_it.folder.glob("*.log"))
    assert logs == ["sglang_server_0.log", "sglang_server_0_node_1.log", "sglang_server_0_node_2.log"]
    all_of_it.stop()
    assert all_of_it.pids() == []


def test_a_part_that_dies_stops_the_others_at_once_and_its_last_words_are_told(machines, monkeypatch):
    monkeypatch.setenv("FAKE_PARTS", json.dumps({"2": {"die": True, "late": 0.5}}))
    all_of_it = machines()
    begun = time.monotonic()
    each = all_of_it.start("first")
    assert time.monotonic() - begun < 60  # of 120 in which the others could have waited for it
    told = each[2][SERVER].problem
    assert told.startswith(f"{SERVER} (its --node-rank 2 of --nnodes 3, 127.0.0.1) ended while it started; its log, ")
    assert told.endswith("torch.OutOfMemoryError: no room for the model") and told in merged(each)[SERVER].problem
    assert all_of_it.pids() == [] and not merged(each)[SERVER].port_taken


def test_what_killed_one_part_is_told_though_the_head_died_of_it_too(machines, monkeypatch):
    monkeypatch.setenv("FAKE_PARTS", json.dumps({"1": {"dies_after": 0.5}, "2": {"late": 3600}}))
    all_of_it = machines()
    told = merged(all_of_it.start("first"))[SERVER].problem
    assert f"{SERVER} (its --node-rank 1 of --nnodes 3, 127.0.0.1) ended while it started" in told and "ncclSystemError" in told
    assert all_of_it.pids() == []


def test_a_port_that_another_process_took_is_no_fault_of_the_server(machines, monkeypatch):
    all_of_it = machines(number=2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept(), daemon=True).start()  # the second part takes it for the head
        monkeypatch.setattr(parts, "free_port", lambda _: other.getsockname()[1])
        started = merged(all_of_it.start("first"))[SERVER]
    assert started.port_taken and "(its --node-rank " in started.problem
    monkeypatch.undo()
    monkeypatch.setenv("FAKE_SGLANG", json.dumps({"weightless": True}))
    assert merged(all_of_it.start("second"))[SERVER].problem is None


@pytest.mark.slow
def test_a_head_whose_others_never_come_is_given_up_in_time_and_so_is_a_part_without_a_head(machines, monkeypatch):
    monkeypatch.setattr(parts, "LATE_S", 1.5)
    alone = machines(number=2, startup_timeout_s=3.0)
    for part, other in ((0, 1), (1, 0)):
        (started,) = alone.start(f"attempt {part}", slice(part, part + 1))
        who = f"{SERVER} (its --node-rank {part} of --nnodes 2, 127.0.0.1)"
        assert started[SERVER].problem == f"{who} was not ready within 3 s: its --node-rank {other} did not take part"
    monkeypatch.setenv("FAKE_PARTS", json.dumps({"1": {"late": 3600}}))
    problem = merged(alone.start("all"))[SERVER].problem
    logs = [str(alone.folder / f"sglang_server_0{which}.log") for which in ("", "_node_*")]
    late = f"{SERVER} (its --node-rank 0 of --nnodes 2, 127.0.0.1) was not ready within 3 s"
    assert problem.splitlines()[0] == f"{late}; its logs are {logs[0]} and, of other nodes, {logs[1]}"
    assert alone.pids() == []


def test_all_parts_take_the_same_share_of_memory_that_the_fullest_machine_needs(machines, monkeypatch):
    """From different ones, SGLang's ranks would make caches of different sizes."""
    all_of_it = machines()
    free = iter((0.8, 0.4, 0.6))
    for host in all_of_it.hosts:
        host._commands = {name: replace(one, memory=0.3) for name, one in host._commands.items()}
    monkeypatch.setattr(parts, "share_of_free", lambda fraction, _: fraction / next(free))
    assert merged(all_of_it.start("first"))[SERVER].problem is None
    words = [host._processes[SERVER]._command.arguments for host in all_of_it.hosts]
    assert [one[one.index("--mem-fraction-static") + 1] for one in words] == [str(0.3 / 0.4)] * 3


def test_a_part_that_is_lost_while_the_server_serves_ends_it_and_it_comes_back_whole(machines, caplog):
    all_of_it = machines()
    first = merged(all_of_it.start("first"))[SERVER]
    watchdogs = all_of_it.pids()
    (lost,) = psutil.Process(watchdogs[2]).children()
    lost.kill()
    wait_for(lambda: all(map(gone, watchdogs)))  # as with gloo and NCCL, the others do not survive it
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{first.url}/health")
    assert merged(all_of_it.start("second"))[SERVER].problem is None
    said = [record.getMessage() for record in caplog.records]
    log = all_of_it.folder / "sglang_server_0_node_1.log"
    what = f"{SERVER} (its --node-rank 1 of --nnodes 3, 127.0.0.1) had ended; its log, {log}, ends:"
    assert f"{what}\nRuntimeError: Connection closed by peer" in said and len(said) == 3


def test_what_hangs_on_one_machine_is_stopped_with_the_rest(machines, monkeypatch):
    monkeypatch.setattr("etr_megatron.rollout.sglang.server._GRACE_S", 1.0)
    all_of_it = machines()
    merged(all_of_it.start("first"))
    (hung,) = psutil.Process(all_of_it.pids()[1]).children()
    hung.suspend()
    before = all_of_it.pids()
    assert merged(all_of_it.start("second"))[SERVER].problem is None
    assert not psutil.pid_exists(hung.pid) and all(map(gone, before))


def test_a_stop_ends_the_wait_on_every_node(machines, monkeypatch):
    monkeypatch.setenv("FAKE_PARTS", json.dumps({"1": {"late": 3600}}))
    all_of_it = machines(number=2)
    asked = threading.Event()
    threading.Timer(1.0, asked.set).start()
    with pytest.raises(StopAskedError):
        all_of_it.start("first", must_stop=asked.is_set)
    assert all_of_it.pids() == []


def test_a_part_that_cannot_be_started_lets_the_others_go(machines, monkeypatch):
    all_of_it = machines(number=2)

    def fails(*_: Any) -> None:
        raise OSError("no room for its log")

    monkeypatch.setattr(all_of_it.hosts[1], "_launch", fails)
    with ThreadPoolExecutor() as pool:
        head, other = (pool.submit(host.start, [SERVER], lambda: False, "first") for host in all_of_it.hosts)
        assert head.result()[SERVER] == Started("", None)  # the other's error is the one to tell
        with pytest.raises(OSError, match="no room for its log"):
            other.result()
    assert all_of_it.pids() == []


@pytest.mark.parametrize(
    ("nodes", "settings", "wanted"),
    [
        (2, dict(servers=3), [(["0", "1", "2"], 0), (["3", "4", "5"], 0)]),
        (4, dict(nodes_per_server=2, tp=4), [(["0"], 0), (["0"], 1), (["1"], 0), (["1"], 1)]),
        (3, dict(nodes_per_server=3, tp=3), [(["0"], 0), (["0"], 1), (["0"], 2)]),
    ],
)
def test_consecutive_nodes_share_a_server(nodes, settings, wanted):
    names = [str(number) for number in range(6)]
    assert parts_of(names, nodes, SglangConfig(**settings)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["tensor", "disk"])
def test_a_server_over_two_nodes_gets_the_weights_and_is_started_again_whole(gangs, hf_models, tmp_path, sync):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), address="127.0.0.1", sync=sync, **LAUNCH)
    job |= dict(nodes_per_server=2, tp=2, syncs=2, behaviours=[{"die_at_bucket": 0}, {}], bucket_bytes=1 << 16)
    ranks = gangs(2).run("tests.sglang_node_jobs:on_two_nodes", **job)
    assert list(ranks[0]["states"]) == [SERVER] and ranks[0]["failed"] == [{}, {}]
    state = ranks[0]["states"][SERVER]
    check_sums(state, ranks[0]["sums"])
    assert state["version"] == "2" and any("they are started again" in one for one in ranks[0]["warnings"])
    if sync == "tensor":  # every part reads its own machine's memory
        assert [found["segments"] for found in ranks] == [2, 2] and state["most_payload_bytes"] < 1 << 16


@pytest.mark.slow
def test_a_server_of_which_one_node_has_no_room_for_weights_is_sent_them(gangs, hf_models, tmp_path):
    job = dict(model=hf_models["qwen3"], directory=str(tmp_path), address="127.0.0.1", sync="tensor", **LAUNCH)
    ranks = gangs(2).run("tests.sglang_node_jobs:on_two_nodes", full=[1], nodes_per_server=2, tp=2, **job)
    state = ranks[0]["states"][SERVER]
    check_sums(state, ranks[0]["sums"])
    assert state["most_payload_bytes"] > 1 << 16


def test_only_servers_whose_port_was_taken_are_started_again_three_times_and_those_that_failed_stopped(monkeypatch, caplog):
    taken, broken, well = Started("", "taken", True), Started("", "no room"), Started("http://10.0.0.1:1", None)
    asked: list[list[str]] = []
    stopped: list[list[str]] = []
    answers = iter([{"a": taken, "b": broken, "c": taken, "d": well}, {"a": well, "c": taken}, {"c": taken}])

    class Scripted(JobServers):
        def __init__(self) -> None:
            self._config = SglangConfig(nodes_per_server=2, tp=2, nodes="every")

        def _start_once(self, names: Any, must_stop: Any) -> dict[str, Started]:
            asked.append(list(names))
            return next(answers)

        def stop(self, names: Any = None) -> None:
            stopped.append(list(names))

    monkeypatch.setattr(job_servers.dist, "get_rank", lambda: 0)
    found = Scripted().start(["a", "b", "c", "d"])
    assert asked == [["a", "b", "c", "d"], ["a", "c"], ["c"]] and stopped == [["b", "c"]]
    assert found == {"a": well, "b": broken, "c": taken, "d": well}
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("a, c: start 2 of at most 3, as another process had taken a port")
