"""Nodes that run servers and no ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch.distributed as dist

from etr_megatron.config import SglangConfig
from etr_megatron.errors import RequeueError, UserError
from etr_megatron.platform.heartbeat import Heartbeat
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.rollout.sglang import ServerNode, ServerNodes, server_nodes
from etr_megatron.rollout.sglang.machines import ServerSetting
from tests.runs import gone, wait_for

OVER_TWO = {"launch": ("-m", "tests.fake_parts"), "nodes_per_server": 2, "tp": 2}


class Node:
    """A node of servers in a thread, on `store`, and its outcome."""

    def __init__(self, number: int, config: SglangConfig, store: dist.Store, check: Any = lambda: None) -> None:
        self.node = ServerNode(number, config, 0.0, patience_s=300.0, store=store)
        self.code: int | None = None
        self.error: BaseException | None = None
        self._check = check
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.code = self.node.serve(self._check)
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(300)
        assert not self._thread.is_alive()


@pytest.fixture
def quick(monkeypatch):
    """Short heartbeat, weightless fake servers, and a short wait at the end for stand-ins, which do not answer."""
    monkeypatch.setattr(server_nodes, "BEAT_S", 0.05)
    monkeypatch.setattr(server_nodes, "_HEARD_S", 1.0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("FAKE_SGLANG", json.dumps({"weightless": True}))


@pytest.fixture
def store(quick):
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def sglang(**settings: Any) -> SglangConfig:
    common = dict(python=sys.executable, launch=("-m", "tests.fake_sglang"), startup_timeout_s=300.0, dedicated_nodes=2)
    return SglangConfig(**common | settings)


def setting(folder: Path) -> ServerSetting:
    return ServerSetting(str(folder / "model"), "float32", str(folder / "servers"), None, False)


@pytest.mark.slow
def test_rank_0_starts_stops_and_restarts_servers_of_all_nodes_and_each_ends_as_the_run_did(store, tmp_path):
    config = sglang(servers=2)
    names = [f"server {number}" for number in range(4)]
    nodes = [Node(number, config, store) for number in range(2)]
    with pytest.raises(RequeueError), ServerNodes(2, config, store) as rank0:
        assert rank0.meet(300) == ["127.0.0.1", "127.0.0.1"]
        rank0.prepare(names, setting(tmp_path))
        started = rank0.start(names)
        assert list(started) == names and all(one.problem is None for one in started.values())
        assert len({one.url for one in started.values()}) == 4
        pids = {name: httpx.get(f"{one.url}/state").json()["pid"] for name, one in started.items()}
        again = rank0.start(["server 1", "server 3"])
        assert list(again) == ["server 1", "server 3"]
        assert gone(pids["server 1"]) and gone(pids["server 3"]) and not gone(pids["server 0"])
        rank0.stop(["server 0"])
        assert gone(pids["server 0"]) and not gone(pids["server 2"])
        raise RequeueError("step 3 is saved")
    for node in nodes:
        node.join()
    assert [node.code for node in nodes] == [75, 75] and gone(pids["server 2"])


@pytest.mark.parametrize(("error", "code"), [(None, 0), (UserError("no"), 2), (ValueError("a defect"), 1)])
def test_a_node_ends_with_the_code_of_the_run(store, tmp_path, capsys, error, code):
    config = sglang()
    nodes = [Node(number, config, store) for number in range(2)]
    with contextlib.suppress(UserError, ValueError), ServerNodes(2, config, store) as rank0:
        rank0.meet(300)
        if error is not None:
            raise error
    for node in nodes:
        node.join()
    assert [node.code for node in nodes] == [code, code]
    assert (str(error) in capsys.readouterr().err) == (error is not None)


def test_a_machine_that_can_have_no_servers_and_one_that_is_not_there_are_named(store):
    def refuse() -> None:
        raise UserError("sglang.python: .venv-sglang/bin/python does not exist")

    config = sglang()
    nodes = [Node(0, config, store), Node(1, config, store, refuse)]
    what = r"server node 1 \(127\.0\.0\.1\): sglang\.python: \.venv-sglang/bin/python does not exist"
    with pytest.raises(UserError, match=what), ServerNodes(2, config, store) as rank0:
        rank0.meet(300)
    for node in nodes:
        node.join()
    assert nodes[0].code == 2 and isinstance(nodes[1].error, UserError)
    missing = (
        r"server node 2 of sglang\.dedicated_nodes=3 did not connect within 1 s \(they are counted from 0, and are the last"
    )
    with pytest.raises(UserError, match=missing), ServerNodes(3, config, store) as rank0:
        for node in range(2):
            stand_in(store, node)
        rank0.meet(1)


def session(store: dist.Store) -> dist.Store:
    """The store of the current rank 0's session."""
    return dist.PrefixStore(store.get("session").decode(), store)


def stand_in(store: dist.Store, node: int, address: str = "127.0.0.1") -> None:
    """A node that reports its address, answers its first order, and is not heard of again."""
    session(store).set(f"{node}/hello", json.dumps({"address": address, "problem": ""}))
    session(store).set(f"{node}/reply/0", "null")


@pytest.mark.parametrize("settings", [{}, OVER_TWO], ids=["each on one node", "over two nodes"])
def test_servers_of_a_lost_node_do_not_serve_and_the_other_node_does(store, tmp_path, monkeypatch, settings):
    class Heart(Heartbeat):
        """Node 1's silence lasts a hundred times as long, so that no other node's is taken for a loss."""

        def silence_s(self) -> float:
            return super().silence_s() * (100 if self._key == "1/beats" else 1)

    monkeypatch.setattr(server_nodes, "Heartbeat", Heart)
    config = sglang(**settings)
    node = Node(0, config, store)
    with ServerNodes(2, config, store) as rank0:
        stand_in(store, 1, "10.0.0.9")
        rank0.meet(300)
        if settings:
            rank0.prepare(["server 0"], setting(tmp_path))
            started = rank0.start(["server 0"])["server 0"]
            lost = "server 0: cannot be started on server node 1 (10.0.0.9): it has given no sign of life for "
            assert started.problem.startswith(lost) and "server 0" not in node.node._host._processes
        else:
            rank0.prepare(["server 0", "server 1"], setting(tmp_path))
            started = rank0.start(["server 0", "server 1"])
            assert started["server 0"].problem is None
            lost = "server 1: cannot be started on server node 1 (10.0.0.9): it has given no sign of life for "
            assert started["server 1"].problem.startswith(lost)
    node.join()


def test_a_server_over_two_nodes_answers_at_the_first_and_ends_on_both(store, tmp_path):
    config = sglang(**OVER_TWO)
    nodes = [Node(number, config, store) for number in range(2)]
    with ServerNodes(2, config, store) as rank0:
        rank0.meet(300)
        rank0.prepare(["server 0"], setting(tmp_path))
        started = rank0.start(["server 0"])["server 0"]
        assert started.problem is None and httpx.get(f"{started.url}/health").status_code == 200
        watchdogs = [node.node._host._processes["server 0"]._watchdog.pid for node in nodes]
        again = rank0.start(["server 0"])["server 0"]
        assert again.problem is None and all(map(gone, watchdogs))
        watchdogs = [node.node._host._processes["server 0"]._watchdog.pid for node in nodes]
    for node in nodes:
        node.join()
    assert [node.code for node in nodes] == [0, 0] and all(map(gone, watchdogs))


def test_a_node_that_hears_nothing_of_rank_0_ends_its_servers_and_itself(store, tmp_path, monkeypatch, capsys):
    config = sglang()
    node = Node(0, config, store)
    rank0 = ServerNodes(2, config, store)
    with rank0:
        stand_in(store, 1)
        rank0.meet(300)
        rank0.prepare(["server 0", "server 1"], setting(tmp_path))
        pid = httpx.get(f"{rank0.start(['server 0'])['server 0'].url}/state").json()["pid"]
        crash(rank0, monkeypatch)
    monkeypatch.setattr(server_nodes, "SILENCE_S", 0.5)
    node.join()
    assert node.code == 1 and gone(pid)
    assert "rank 0 gives no sign of life any more; the servers are stopped" in capsys.readouterr().err


def test_a_sigterm_of_a_node_is_heard_by_rank_0(store):
    with ServerNodes(2, sglang(), store) as rank0:
        assert not rank0.asked_to_stop()
        session(store).set("1/stop", "")
        wait_for(rank0.asked_to_stop)


def crash(rank0: ServerNodes, monkeypatch) -> None:
    monkeypatch.setattr(rank0, "_post", lambda *_: 0)  # as if killed: it sends nothing more


def test_what_an_earlier_start_of_the_job_left_in_the_store_is_nobodys(store, tmp_path, monkeypatch):
    """torchrun keeps one store across restarts."""
    config = sglang()
    names = ["server 0", "server 1"]
    rank0 = ServerNodes(2, config, store)
    with rank0:
        for node in range(2):
            stand_in(store, node, "10.0.0.9")
        rank0.meet(300)
        rank0.prepare(names, setting(tmp_path))
        for node, name in enumerate(names):
            started = json.dumps({name: ("http://10.0.0.9:1", None)})
            session(store).set(f"{node}/reply/1", started)
        assert rank0.start(names)["server 1"].url == "http://10.0.0.9:1"
        session(store).set("1/stop", "")
        rank0._ask({1: {"do": "end", "code": 3, "why": ""}}, 0.0)
        crash(rank0, monkeypatch)
    nodes = [Node(number, config, store) for number in range(2)]
    time.sleep(0.5)  # there is no rank 0 whose orders they could take
    with ServerNodes(2, config, store) as rank0:
        assert rank0.meet(300) == ["127.0.0.1", "127.0.0.1"]
        rank0.prepare(names, setting(tmp_path))
        started = rank0.start(names)
        assert all(httpx.get(f"{started[name].url}/state").status_code == 200 for name in names)
        assert not rank0.asked_to_stop()
    for node in nodes:
        node.join()
    assert [node.code for node in nodes] == [0, 0]


def test_a_node_leaves_an_earlier_rank_0_for_the_one_that_was_started_since(store, monkeypatch, capsys):
    """The node exits; its own torchrun, which does not know of the new rank 0, then restarts it."""
    config = sglang()
    node = Node(0, config, store)
    before = ServerNodes(2, config, store)
    with before:
        stand_in(store, 1)
        before.meet(300)
        crash(before, monkeypatch)
        with contextlib.suppress(UserError), ServerNodes(2, config, store) as rank0:
            node.join()
            again = Node(0, config, store)
            stand_in(store, 1)
            rank0.meet(300)
            raise UserError("no")
    again.join()
    assert (node.code, again.code) == (1, 2)


def test_a_node_waits_for_a_rank_0_that_has_more_to_do_before_it_comes(store, monkeypatch):
    monkeypatch.setattr(server_nodes, "SILENCE_S", 0.2)
    node = Node(0, sglang(), store)
    time.sleep(1.0)
    monkeypatch.setattr(server_nodes, "SILENCE_S", 30.0)
    with ServerNodes(2, sglang(), store) as rank0:
        stand_in(store, 1)
        assert rank0.meet(300) == ["127.0.0.1", "127.0.0.1"]
    node.join()
    assert node.code == 0


@pytest.mark.parametrize("refused", [False, True])
def test_a_node_ends_with_its_own_problem_or_a_sentence_where_rank_0_never_comes(store, capsys, refused):
    def check() -> None:
        if refused:
            raise UserError("no interpreter")

    node = ServerNode(0, sglang(), 0.0, patience_s=0.3, store=store)
    if refused:
        with pytest.raises(UserError, match="no interpreter"):
            node.serve(check)
        return
    assert node.serve(check) == 1
    assert "server node 0: rank 0 did not connect within 0.3 s" in capsys.readouterr().err


def test_a_node_whose_store_is_gone_ends_its_servers_and_says_so(quick, tmp_path, capsys):
    owner = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mine, theirs = (dist.TCPStore("127.0.0.1", owner.port, is_master=False, wait_for_workers=False) for _ in range(2))
    node = Node(0, sglang(), theirs)
    rank0 = ServerNodes(2, sglang(), mine)
    with rank0:
        stand_in(mine, 1)
        rank0.meet(300)
        rank0.prepare(["server 0", "server 1"], setting(tmp_path))
        pid = httpx.get(f"{rank0.start(['server 0'])['server 0'].url}/state").json()["pid"]
        del owner
        node.join()
    assert node.error is None and node.code == 1 and gone(pid)
    assert "rank 0 gives no sign of life any more; the servers are stopped" in capsys.readouterr().err


def test_a_stop_before_the_first_step_ends_the_wait_for_nodes_and_for_their_servers(store, tmp_path):
    """A server that is slow to start does not delay the end."""
    config = dataclasses.replace(sglang(), launch=("-c", "import time; time.sleep(600)"))
    nodes = [Node(number, config, store) for number in range(2)]
    begun = time.monotonic()
    with pytest.raises(StopAskedError), ServerNodes(2, config, store) as rank0:
        rank0.meet(300)
        rank0.prepare(["server 0", "server 1"], setting(tmp_path))
        threading.Timer(1.0, nodes[1].node._stop_request._received.set).start()
        try:
            rank0.start(["server 0", "server 1"], rank0.asked_to_stop)
        finally:
            rank0.stop()
    for node in nodes:
        node.join()
    assert time.monotonic() - begun < 250  # a server has 300 s to start
    with pytest.raises(StopAskedError), ServerNodes(3, config, store) as rank0:
        session(store).set("1/stop", "")
        rank0.meet(300, rank0.asked_to_stop)


def test_a_start_that_was_answered_or_given_up_is_not_made_up_for(store, tmp_path):
    """A node may be restarted, or be silent for a while; it must not carry out such starts later."""
    with ServerNodes(2, sglang(), store) as rank0:
        order = {"do": "start", "names": ["server 0"], "attempt": "first"}
        rank0._post(0, {"do": "prepare", "names": ["server 0"], "part": 0, "setting": setting(tmp_path)._asdict()})
        for _ in range(3):
            rank0._post(0, order)
        session(store).set("0/reply/1", "null")
        node = Node(0, sglang(), store)
        wait_for(lambda: session(store).check(["0/reply/3"]))
        assert session(store).get("0/reply/1") == b"null" and not session(store).check(["0/reply/2"])
        log = (tmp_path / "servers" / "server_0.log").read_text()
        assert sum(line.isdigit() for line in log.splitlines()) == 1
    node.join()


def test_a_node_that_cannot_write_where_servers_log_is_named(store, tmp_path):
    config = sglang()
    (tmp_path / "servers").write_text("a file")
    nodes = [Node(number, config, store) for number in range(2)]
    asked = setting(tmp_path)._replace(api_key="secret")
    with (
        pytest.raises(UserError, match=r"server node 0 \(127\.0\.0\.1\): .*File exists.*servers"),
        ServerNodes(2, config, store) as rank0,
    ):
        rank0.meet(300)
        rank0.prepare(["server 0", "server 1"], asked)
    for node in nodes:
        node.join()
    assert [node.code for node in nodes] == [2, 2]
