"""SIGTERM before the first step asks for a restart, unless a rank failed: torchrun then sends SIGTERM to the others too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import wait_for

QUICK = ["run.name=early", "run.steps=1", "eval.every=0", "run.stop_grace_s=60"]


def status_of(runs) -> tuple[str, int] | None:
    file = runs.directory("early") / "status.json"
    if not file.exists():
        return None
    status = json.loads(file.read_text())
    return status["state"], status["step"]


def started(runs, *overrides: str) -> subprocess.Popen:
    """A run that has opened its directory but has no engine and no model yet."""
    process = runs.start(*QUICK, *overrides)
    wait_for(lambda: (runs.directory("early") / "config.yaml").exists())
    return process


def rank_of(launcher: int, rank: int) -> int:
    """The process id of a rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"rank {rank} is not there")


@pytest.mark.slow
def test_sigterm_while_the_model_is_loaded_asks_to_be_started_again(runs):
    process = started(runs)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 75, out + err
    assert "told to stop (SIGTERM) before the" in err and "Traceback" not in out + err
    assert status_of(runs) == ("requeue", 0)
    code, output = runs.finish(*QUICK, "parallel.tp=1")
    assert code == 0, output
    assert status_of(runs) == ("finished", 1)


def test_sigterm_while_servers_are_started_does_not_wait_for_them(runs):
    deaf = [f"sglang.python={sys.executable}", "sglang.launch=[-m,tests.deaf_server]"]
    process = started(runs, "parallel.tp=1", "rollout.backend=sglang", *deaf)
    log = runs.directory("early") / "servers" / "sglang_server_0.log"
    wait_for(lambda: log.exists() and "up" in log.read_text())
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 75, out + err
    assert "told to stop (SIGTERM) while waiting for SGLang server 0: start again" in err and "Traceback" not in out + err
    assert status_of(runs) == ("requeue", 0) and time.monotonic() - begin < 40


@pytest.mark.slow
def test_a_rank_that_is_lost_while_the_model_is_loaded_fails_the_run_before_the_grace_is_over(runs):
    # torchrun sends the other rank SIGTERM, as a scheduler would.
    process = started(runs)
    begin = time.monotonic()
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 1, out + err
    assert status_of(runs) in (None, ("failed", 0)) and time.monotonic() - begin < 40
    assert "start again with the same command" not in out + err
