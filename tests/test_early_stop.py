"""SIGTERM before the first step asks for a restart, unless a rank failed: torchrun then sends SIGTERM to the others too."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

import pytest

from tests.runs import HELD, rank_of, wait_for

QUICK = ["run.name=early", "run.steps=1", "eval.every=0", "run.stop_grace_s=600"]


def status_of(runs) -> tuple[str, int] | None:
    file = runs.directory("early") / "status.json"
    if not file.exists():
        return None
    status = json.loads(file.read_text())
    return status["state"], status["step"]


@pytest.mark.slow
def test_sigterm_while_the_model_is_loaded_asks_to_be_started_again(runs):
    process = runs.held("loading 0", *QUICK)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 75, out + err
    assert "told to stop (SIGTERM) before the resume" in err and "Traceback" not in out + err
    assert status_of(runs) == ("requeue", 0)
    code, output = runs.finish(*QUICK, HELD, "parallel.tp=1")
    assert code == 0, output
    assert status_of(runs) == ("finished", 1)


@pytest.mark.slow
def test_sigterm_does_not_let_a_rank_wait_for_one_that_it_ended_before_it_joined(runs, monkeypatch):
    late = runs.folder / "late"
    monkeypatch.setenv("LATE", str(late))
    process = runs.start(*QUICK, "reward.function=tests.late_mistake:digit_sum_is_even")
    wait_for(lambda: late.exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)  # shorter than the grace
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert "Traceback" not in out + err and status_of(runs) is None


def test_sigterm_while_servers_are_started_does_not_wait_for_them(runs):
    deaf = [f"sglang.python={sys.executable}", "sglang.launch=[-m,tests.deaf_server]"]
    process = runs.start(*QUICK, "parallel.tp=1", "rollout.backend=sglang", *deaf)
    log = runs.directory("early") / "servers" / "sglang_server_0.log"
    wait_for(lambda: log.exists() and "up" in log.read_text())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=500)  # shorter than the grace and than the time that a server has to start
    assert process.returncode == 75, out + err
    assert "told to stop (SIGTERM) while waiting for SGLang server 0: start again" in err and "Traceback" not in out + err
    assert status_of(runs) == ("requeue", 0)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_with_its_host_in_the_runs_state(runs):
    process = runs.held("step 1", *QUICK, "run.steps=2")
    killed = rank_of(process.pid, 1)
    os.kill(killed, signal.SIGKILL)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 1, out + err
    message = json.loads((runs.directory("early") / "status.json").read_text())["message"]
    assert status_of(runs) == ("failed", 1)
    assert message.startswith(f"rank 1 (pid {killed} on {socket.gethostname()}) ended without a word, as after SIGKILL; rank 0")


@pytest.mark.slow
def test_a_rank_that_is_lost_while_the_model_is_loaded_fails_the_run_before_the_grace_is_over(runs):
    # torchrun sends the other rank SIGTERM, as a scheduler would.
    process = runs.held("loading 0", *QUICK)
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 1, out + err
    assert status_of(runs) in (None, ("failed", 0))
    assert "start again with the same command" not in out + err
