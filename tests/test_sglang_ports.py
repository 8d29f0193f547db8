"""Another process may take a port that was found for a server before the server binds it. It is not mistaken for the server."""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang import hosts, server
from etr_megatron.rollout.sglang.hosts import Started
from etr_megatron.rollout.sglang.server import ServerCommand, ServerProcess, free_port

# A server that is still starting while another process has its port. It requires a key, except for its health.
SERVER = """
import http.server, json, sys, time
port, version = int(sys.argv[-1]), sys.argv[sys.argv.index("--weight-version") + 1]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = self.path == "/health" or self.headers["Authorization"] == "Bearer key"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"weight_version": version} if allowed and self.path == "/model_info" else {}).encode())
while True:
    try:
        http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
    except OSError:
        time.sleep(0.1)
"""
COMMAND = ServerCommand(sys.executable, ("-c", SERVER), (), told_by="weight_version", api_key="key")
# As SGLang when its port is taken while its model is loaded: it says so, waits for its own first request, and reports that.
LATE = """
import http.server, sys
try:
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), http.server.BaseHTTPRequestHandler)
    sys.exit("no model")
except OSError:
    print(sys.argv[1])
    sys.exit("\\n".join(f"  File {place} of requests" for place in range(60)))
"""
OTHERS = {
    "a server of another job": {"/health": (200, b""), "/model_info": (200, b'{"weight_version": "etr-0123456789abcdef"}')},
    "a server of SGLang's": {"/health": (200, b""), "/model_info": (200, b'{"weight_version": "default"}')},
    "a server with another key": {"/health": (200, b""), "/model_info": (401, b"{}")},
    "something that answers everything": {"/health": (200, b"ok"), "/model_info": (200, b"ok")},
    "something that has no such page": {"/health": (200, b"ok"), "/model_info": (404, b"")},
}


@contextmanager
def answering(replies: dict[str, tuple[int, bytes]]):
    """Port of another process that gives these replies."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = replies[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield other.server_port
        other.shutdown()


@contextmanager
def started_with_ports(tmp_path, monkeypatch, taken: int, count: int, command: ServerCommand = COMMAND):
    """Outcome of a server whose first `count` ports are taken, and the processes that were started for it."""
    ports, processes = [taken] * count, []

    class Recorded(ServerProcess):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            processes.append(self)

    monkeypatch.setattr(server, "free_port", lambda host: ports.pop() if ports else free_port(host))
    monkeypatch.setattr(hosts, "ServerProcess", Recorded)
    host = hosts.Host({"server": command}, tmp_path, startup_timeout_s=300.0)
    try:
        yield host.start(["server"])["server"], processes
    finally:
        host.stop()


@pytest.mark.parametrize("who", OTHERS)
def test_what_answers_at_its_port_is_not_taken_for_a_server_that_still_starts(tmp_path, monkeypatch, who):
    with answering(OTHERS[who]) as taken, started_with_ports(tmp_path, monkeypatch, taken, 1) as (started, (first, second)):
        assert started == Started(second.url, None) and first.port == taken != second.port
        assert second.is_running and not first.is_running


def test_a_server_whose_port_is_taken_each_time_is_given_up_in_one_sentence(tmp_path, monkeypatch):
    other = answering(OTHERS["something that answers everything"])
    with other as taken, started_with_ports(tmp_path, monkeypatch, taken, 9) as (started, processes):
        what = "server was started 3 times, and each time another process had taken its port"
        assert started.problem == f"{what}, last http://127.0.0.1:{taken}"
        assert len(processes) == 3 and not any(process.is_running for process in processes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "said",
    [
        "ERROR: [Errno 98] error while attempting to bind on address ('127.0.0.1', 11000): address already in use",
        "Port is already in use. dist_init_port=11233 port_base=11234 detokenizer_port=11235",  # with data-parallel attention
    ],
    ids=["own", "beside"],
)
def test_a_server_that_ended_because_its_port_was_taken_is_started_at_another(tmp_path, monkeypatch, said):
    """Only what it said since it was started counts: the second one ends for a reason of its own."""
    late = replace(COMMAND, launch=("-c", LATE, said))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        taken = silent.getsockname()[1]
        with started_with_ports(tmp_path, monkeypatch, taken, 1, late) as (started, (first, second)):
            assert first.port == taken != second.port and "already in use" in first.said()
            assert started.problem == f"server ended while it started; its log, {second.log}, ends:\nno model"


def test_a_server_that_cannot_say_who_it_is_yet_is_asked_again(tmp_path, monkeypatch):
    """A server replies 503 while it is still starting."""
    replies = {"/health": (200, b""), "/model_info": (503, b"")}
    timer = threading.Timer(1.5, lambda: replies.update(OTHERS["something that has no such page"]))
    timer.start()
    with answering(replies) as taken, started_with_ports(tmp_path, monkeypatch, taken, 1) as (started, processes):
        assert not timer.is_alive() and len(processes) == 2 and started.problem is None


def test_no_two_servers_of_a_job_are_given_the_same_port():
    assert len({free_port("127.0.0.1") for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("given", "in_question"),
    [
        ("32768\t60999\n", range(10_000, 30_000)),
        ("15000\t65535\n", range(10_000, 15_000)),
        ("1024\t27000\n", range(27_001, 30_000)),
        ("1024\t65535\n", range(1024, 65_536)),
        (None, range(1024, 65_536)),
    ],
)
def test_a_server_gets_a_port_that_the_kernel_gives_to_no_process_by_itself(tmp_path, monkeypatch, given, in_question):
    kernels = tmp_path / "ip_local_port_range"
    if given is not None:
        kernels.write_text(given)
    monkeypatch.setattr(server, "_EPHEMERAL", kernels)
    assert {free_port("127.0.0.1") for _ in range(100)} <= set(in_question)


def test_a_port_at_which_another_process_listens_is_not_given(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        taken = [one.getsockname()[1], other.getsockname()[1]]
        monkeypatch.setattr(server, "_ports_to_be_named", lambda: [*taken, 0])  # 0: any
        assert {free_port("127.0.0.1") for _ in range(20)}.isdisjoint(taken)


def test_where_no_port_can_be_had_is_one_sentence(monkeypatch):
    with pytest.raises(UserError, match=r"no port at 192\.0\.2\.1 .*: Cannot assign requested address; .* own machine"):
        free_port("192.0.2.1")  # set aside for documentation: no machine's
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(server, "_ports_to_be_named", lambda: [other.getsockname()[1]])
        with pytest.raises(UserError, match=r"no port at 127\.0\.0\.1 .*: every port that was tried is in use"):
            free_port("127.0.0.1")
