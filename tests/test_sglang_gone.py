"""A run that loses all its servers stops with a checkpoint and resumes later; no step is trained twice or left out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import urllib.request
from typing import Any

import pytest

from etr_megatron.rollout.record import read_record
from tests import warm_run
from tests.fake_servers import servers
from tests.runs import rank_of, wait_for


@contextlib.contextmanager
def server(**behaviour):
    with servers(behaviour) as (url,):
        yield url


def options(url: str, ranks: int = 1) -> list[str]:
    """ranks: only rank 0 communicates with servers, and each rank takes seconds to start."""
    return [
        "run.name=gone",
        f"parallel.tp={ranks}",
        "run.steps=3",
        "checkpoint.every=0",  # so the only checkpoint is the one saved when servers are gone
        "eval.every=0",
        "rollout.backend=sglang",
        "rollout.max_logprob_gap=100",  # the servers' log-probs are made up
        f"sglang.urls=[{url}]",
        "sglang.update_timeout_s=120",
    ]


# With 24 responses per step, the request number 30 is in the second step. With one bucket per sync, the fourth bucket is sent
# after the third step.
@pytest.mark.slow
@pytest.mark.parametrize(("behaviour", "trained"), [({"die_at": 30}, 1), ({"die_at_bucket": 3}, 3)], ids=["rollout", "sync"])
def test_without_servers_a_run_saves_what_was_trained_and_asks_to_be_started_again(runs, behaviour, trained):
    with server(**behaviour) as url:
        code, output = runs.finish(*options(url, ranks=2))
    assert code == 75, output
    assert "no SGLang server is left: SGLang server 0: " in output and f"step {trained} is saved" in output
    assert "Traceback" not in output
    status = json.loads((runs.directory("gone") / "status.json").read_text())
    assert (status["state"], status["step"]) == ("requeue", trained)
    assert [(row["step"], row["servers_serving"]) for row in runs.rows("gone")] == [(step, 1) for step in range(1, trained + 1)]
    if trained < 3:  # else nothing is left to do
        with server() as url:
            code, output = runs.finish(*options(url))
        assert code == 0, output
        assert [row["step"] for row in runs.rows("gone")] == [1, 2, 3]
        assert json.loads((runs.directory("gone") / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_request_that_servers_call_wrong_ends_a_run_in_one_sentence_with_what_was_trained(runs):
    with server(refuse_at=30) as url:
        code, output = runs.finish(*options(url))
        assert code == 2, output
        assert "SGLang server 0: /generate answered 400: " in output and "maximum context length" in output
        assert "Traceback" not in output
        status = json.loads((runs.directory("gone") / "status.json").read_text())
        assert (status["state"], status["step"]) == ("failed", 1)
        code, output = runs.finish(*options(url))
    assert code == 0, output
    assert [row["step"] for row in runs.rows("gone")] == [1, 2, 3]


def state_of(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/state", timeout=120) as reply:
        return json.load(reply)


def generated(url: str) -> int:
    """Number of requests that the server has received."""
    return len(state_of(url)["prompts"])


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["rollout", "evaluation"])
def test_sigterm_does_not_wait_for_responses(runs, phase):
    evaluates = ["eval.every=1"] if phase == "evaluation" else []  # before the first step, with 8 problems
    with server(tokens_per_s=0.01) as url:  # a response takes forty minutes
        process = runs.start(*options(url, ranks=2), *evaluates, "sglang.probe_every=0", "run.stop_grace_s=600")
        wait_for(lambda: generated(url) == (8 if evaluates else 24))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=500)
    assert process.returncode == 75, out + err
    where = "while waiting for responses" if evaluates else "during the rollout of step 1"
    assert f"told to stop (SIGTERM) {where}; step 0 is saved" in err and "Traceback" not in out + err
    if evaluates:  # the evaluation that it was stopped in is made up for
        with server() as url:
            code, output = runs.finish(*options(url), *evaluates)
        assert code == 0, output
        assert [row["step"] for row in runs.rows("gone")] == [1, 2, 3] and "eval_accuracy_start" in runs.rows("gone")[0]


@pytest.mark.slow
def test_sigterm_does_not_wait_for_a_server_that_gives_nothing_back(runs):
    with server(hang_at=30) as url:  # in the second step, for an hour
        process = runs.start(*options(url), "run.stop_grace_s=600")
        wait_for(lambda: generated(url) > 40)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=500)
    assert process.returncode == 75, out + err
    assert "step 1 is saved" in err and "Traceback" not in out + err


@pytest.mark.slow
def test_sigterm_to_a_rank_while_a_sync_waits_for_a_server_ends_as_requeue_when_the_grace_is_over(runs):
    with server(hang_at_bucket=1) as url:  # after the first step, for an hour
        process = runs.start(*options(url, ranks=2), "checkpoint.every=1", "run.stop_grace_s=3")
        wait_for(lambda: generated(url) >= 24 and state_of(url)["paused"])
        os.kill(rank_of(process.pid, 1), signal.SIGTERM)  # torchrun sends rank 0 another once this one has ended
        out, err = process.communicate(timeout=500)
    assert process.returncode == 75, out + err
    assert "error: told to stop (SIGTERM), and before it had: run.stop_grace_s=3 was too short to save; start again" in err
    assert "Traceback" not in out + err
    status = json.loads((runs.directory("gone") / "status.json").read_text())
    assert (status["state"], status["step"]) == ("requeue", 0) and "after step 0" in status["message"]


@pytest.mark.slow
def test_a_run_with_one_server_left_has_the_other_back_before_it_draws_what_that_may_have_died_of(runs, tmp_path, monkeypatch):
    """Happens in the middle of its second step, with the same weights; no sample is lost or duplicated."""
    file = tmp_path / "died"
    for name, value in warm_run.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FAKE_SGLANG", json.dumps({"die_once": [20, str(file)], "seconds": 0.05}))
    own = [f"sglang.python={sys.executable}", "sglang.launch=[-m,tests.fake_sglang]", "sglang.servers=2"]
    own += ["sglang.probe_every=0", "sglang.concurrency=6", "rollout.record=true"]
    code, output = runs.finish(*(one for one in options("") if "urls" not in one), *own, warm_run.REWARD)
    assert code == 0 and file.exists(), output
    assert "may have died of are not sent to the last server" in output and "Traceback" not in output
    assert [row["step"] for row in runs.rows("gone")] == [1, 2, 3]
    steps = [read_record(runs.directory("gone") / "recorded", step)[0] for step in (1, 2, 3)]
    ids = [group["id"] for groups in steps for group in groups]
    assert len(ids) == len(set(ids)) == 3 * len(steps[0])
    for step, groups in enumerate(steps, 1):
        for sample in (sample for group in groups for sample in group["samples"]):
            assert sample["weight_version"] == step - 1 and sample["finish_reason"] == "length"
