"""SIGTERM: a rank that can stop in time does, and any other is ended after its grace period."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from etr_megatron.platform.preemption import StopRequest

REPO = Path(__file__).resolve().parents[1]

RANK = """
import hashlib, os, signal, sys, time
from etr_megatron.platform.preemption import StopRequest
stop, grace, what = StopRequest(), float(sys.argv[1]), sys.argv[2]
with stop.on_sigterm(grace, lambda: 2 if what == "is for nobody" and stop() else None):
    print("up", flush=True)
    if what == "waits in C":  # where Python's own handlers do not run
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)
    while not stop():
        time.sleep(0.01)
    print("asked", flush=True)
    if what == "ends":  # all signals that there will be have come before this returns
        sys.stdin.read()
    if what in ("does not end", "is for nobody"):
        time.sleep(600)
print("left", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)
"""


def terminated(grace_s: float, what: str, signals: int = 1) -> tuple[int, str, float]:
    """Exit code, output and seconds between the first SIGTERM and the end."""
    command, pipe = [sys.executable, "-c", RANK, str(grace_s), what], subprocess.PIPE
    rank = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPO)
    try:
        assert rank.stdout is not None
        rank.stdout.readline()
        time.sleep(0.3)
        start = time.monotonic()
        for _ in range(signals):
            rank.send_signal(signal.SIGTERM)
        out, _ = rank.communicate(timeout=300)
        return rank.returncode, out, time.monotonic() - start
    finally:
        rank.kill()


@pytest.mark.parametrize("signals", [1, 3])  # a scheduler and torchrun may both send one
def test_sigterm_sets_the_request_and_the_old_handler_comes_back(signals):
    assert terminated(60, "ends", signals)[:2] == (0, "asked\nleft True\n")


@pytest.mark.parametrize("what", ["waits in C", "does not end"])
def test_a_rank_that_does_not_end_within_its_grace_is_ended(what):
    code, out, seconds = terminated(1.0, what)
    assert code == 128 + signal.SIGTERM and "left" not in out
    assert 0.9 < seconds < 300


def test_a_rank_of_a_run_that_another_has_given_up_ends_with_its_exit_code_whatever_the_grace():
    code, out, seconds = terminated(600.0, "is for nobody")
    assert code == 2 and "left" not in out and seconds < 300


def test_without_grace_sigterm_ends_at_once():
    assert terminated(0, "ends")[:2] == (-signal.SIGTERM, "")


LOST = """
import os, signal, sys, time
from etr_megatron.platform.preemption import StopRequest
set_wakeup_fd, calls = signal.set_wakeup_fd, []

def with_a_signal(*arguments, **options):
    found = set_wakeup_fd(*arguments, **options)
    calls.append(arguments)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)
    return found

signal.set_wakeup_fd = with_a_signal
with StopRequest().on_sigterm(60):
    print("in", flush=True)
print("left", flush=True)
"""


@pytest.mark.parametrize(("call", "printed"), [(1, ""), (2, "in\n")], ids=["begins", "ends"])
def test_a_sigterm_that_comes_while_the_handling_begins_or_ends_is_not_swallowed(call, printed):
    done = subprocess.run([sys.executable, "-c", LOST, str(call)], capture_output=True, text=True, cwd=REPO, timeout=600)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, printed)


def test_after_the_block_nothing_of_it_is_left():
    wakeup = signal.set_wakeup_fd(-1)
    try:
        with StopRequest().on_sigterm(60):
            assert "sigterm" in {thread.name for thread in threading.enumerate()}
        assert "sigterm" not in {thread.name for thread in threading.enumerate()}
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.set_wakeup_fd(wakeup)


@pytest.mark.parametrize(
    ("arrived", "asked"),
    [
        ([signal.SIGCHLD, signal.SIGUSR1], False),  # the program's own handlers wake it too
        ([signal.SIGUSR1, signal.SIGTERM], True),
        ([signal.SIGUSR1] * 100 + [signal.SIGTERM], True),
    ],
    ids=["others", "both", "after_many"],
)
def test_of_the_signals_that_arrive_only_sigterm_asks(arrived, asked):
    stop, over = StopRequest(), threading.Event()
    reading, writing = socket.socketpair()
    with reading, writing:
        writing.send(bytes(arrived))
        writing.shutdown(socket.SHUT_WR)
        over.set()
        stop._watch(reading, over, 60.0, lambda: None)
    assert stop() is asked


def test_whether_another_rank_has_given_up_is_looked_for_a_few_times_a_second():
    stop, looks, waits = StopRequest(), [], []

    class Over(threading.Event):
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            return len(waits) > 4

    reading, writing = socket.socketpair()
    with reading, writing:
        writing.send(bytes([signal.SIGTERM]))
        stop._watch(reading, Over(), 600.0, lambda: looks.append(stop()))
    assert looks == [True] * 4 and all(0.1 < seconds < 1 for seconds in waits)


def broken() -> None:
    raise OSError("no disk")


@pytest.mark.parametrize(("late", "code"), [(lambda: 75, 75), (lambda: None, 143), (broken, 143)])
@pytest.mark.parametrize("told", [lambda: None, broken])
def test_the_end_of_the_grace_has_the_exit_code_that_it_is_given_and_comes_whatever_fails(monkeypatch, late, code, told):
    class LeftError(Exception):
        pass

    def leave(code: int) -> None:
        raise LeftError(code)

    stop = StopRequest()
    stop.set_callbacks(told, late)
    monkeypatch.setattr("os._exit", leave)
    reading, writing = socket.socketpair()
    with reading, writing, pytest.raises(LeftError, match=f"^{code}$"):
        writing.send(bytes([signal.SIGTERM]))
        stop._watch(reading, threading.Event(), 0.0, lambda: None)
    stop.wait_for_callback()


def test_a_sigterm_is_reported_once_also_where_it_came_before_there_was_whom_to_report_it_to():
    stop, seen, waits = StopRequest(), [], []

    class Over(threading.Event):
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            if len(waits) == 2:
                stop.set_callbacks(lambda: seen.append(stop.received_sigterm), lambda: None)
            return len(waits) > 4

    reading, writing = socket.socketpair()
    with reading, writing:
        writing.send(bytes([signal.SIGTERM]))
        stop._watch(reading, Over(), 600.0, lambda: None)
    assert seen == [True]


def test_a_process_without_a_rank_that_was_told_to_stop_is_heeded_whichever_it_is():
    stop, told = StopRequest(), set()
    for node in ("first", "second"):
        stop.add_source(lambda node=node: node in told)
    assert not stop()
    for node in ("first", "second"):
        told.add(node)
        assert stop()
        told.clear()
        assert not stop()
