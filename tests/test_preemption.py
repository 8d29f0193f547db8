"""SIGTERM: a rank that can stop in time does, and any other is ended after its grace period."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
