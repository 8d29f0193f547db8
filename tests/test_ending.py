"""What status.json says of a job that SIGTERM, an error or the loss of a rank has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch.distributed as dist

from etr_megatron.config import Config
from etr_megatron.ending import Ending
from etr_megatron.errors import RequeueError, UserError
from etr_megatron.observe import RunDirectory
from etr_megatron.platform import attendance
from etr_megatron.platform.attendance import Attendance, Place
from etr_megatron.platform.preemption import StopRequest
from etr_megatron.status import REQUEUE_EXIT, STATUS_VARIABLE, Reported, read_status
from tests.runs import wait_for

pytestmark = pytest.mark.usefixtures("deadline")

LOST = RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:31337")


class Job:
    """Rank 0 of two, in this process, with seven steps trained and four saved. other: rank 1, with a process of its own."""

    def __init__(self, folder, resume: bool = True) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        pid, store, own = self.process.pid, dist.HashStore(), Place.own()
        places = [own, own._replace(host="elsewhere", pid=pid, begun=attendance._begun(pid))]
        self.own, self.other = (Attendance(store, rank, places) for rank in range(2))
        self.directory, self.stop = RunDirectory(folder), StopRequest()
        (self.directory.checkpoints / "step_000004").mkdir(parents=True)
        (self.directory.checkpoints / "step_000004" / "trainer.json").touch()
        config = Config()
        self.config = replace(config, checkpoint=replace(config.checkpoint, resume=resume))
        self.ending = Ending(self.config, self.directory, self.own, self.stop, reports=True)

    def kill(self) -> None:
        self.process.kill()
        wait_for(lambda: attendance._begun(self.process.pid) is None)

    def run(self, *, error: Exception | None, told: bool) -> None:
        def train() -> None:
            if told:
                os.kill(os.getpid(), signal.SIGTERM)
                wait_for(self.stop)
            if error is not None:
                raise error

        with self.stop.on_sigterm(600):
            self.ending.run(train, lambda: 7)

    @property
    def status(self) -> tuple[str, int, str]:
        status = json.loads(self.directory.status_file.read_text())
        return status["state"], status["step"], status["message"]


@pytest.fixture
def job(tmp_path):
    found = Job(tmp_path)
    yield found
    found.process.kill()
    found.process.communicate()


@pytest.mark.parametrize("error", [LOST, UserError("SGLang server 0 ended while it started")])
def test_a_job_that_was_told_to_stop_is_to_be_started_again_whatever_error_comes_after_that(job, caplog, error):
    with pytest.raises(RequeueError, match="told to stop") as raised:
        job.run(error=error, told=True)
    assert job.status == ("requeue", 4, str(raised.value))
    assert str(error) in str(raised.value) and "after step 4" in str(raised.value)
    assert raised.value.__cause__ is error and f"{type(error).__name__}: {error}" in caplog.text


def test_so_is_one_of_which_another_rank_was_told(job):
    job.other.stop()
    with pytest.raises(RequeueError):
        job.run(error=LOST, told=False)
    assert job.status[:2] == ("requeue", 4)


def test_so_is_one_of_which_a_node_without_a_rank_was_told(job):
    job.stop.heed(lambda: True)
    with pytest.raises(RequeueError):
        job.run(error=LOST, told=False)
    assert job.status[:2] == ("requeue", 4)


def test_before_the_first_step_too(job):
    with job.stop.on_sigterm(600), pytest.raises(RequeueError), job.ending.before_a_step():
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(job.stop)
        raise LOST
    assert job.status[:2] == ("requeue", 4)


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_sigterm_that_torchrun_sends_because_a_rank_is_gone_does_not_ask_for_a_restart(job, how):
    job.kill() if how == "killed" else job.other.leave("ValueError: no")
    with pytest.raises(RuntimeError, match="closed by peer"):
        job.run(error=LOST, told=True)
    assert job.status[:2] == ("failed", 7)


def test_a_job_that_may_not_resume_is_not_to_be_started_again(tmp_path):
    job = Job(tmp_path, resume=False)
    try:
        with pytest.raises(RuntimeError, match="closed by peer"):
            job.run(error=LOST, told=True)
        assert job.status[:2] == ("failed", 7)
    finally:
        job.process.communicate(b"")


@pytest.mark.parametrize("told", [True, False])
def test_a_rank_whose_grace_is_over_leaves_a_job_that_is_to_be_started_again(job, monkeypatch, tmp_path, told):
    monkeypatch.setenv(STATUS_VARIABLE, str(tmp_path / "reported"))
    if told:
        job.own.stop()
    assert job.stop._late() == (REQUEUE_EXIT if told else None)
    if told:
        assert job.status[:2] == ("requeue", 4) and "run.stop_grace_s=25" in job.status[2]
        assert read_status(tmp_path / "reported") == Reported(job.status[2], REQUEUE_EXIT)
    else:
        assert not job.directory.status_file.exists() and not (tmp_path / "reported").exists()


def test_a_job_that_has_ended_is_not_said_to_have_ended_otherwise(job):
    job.run(error=None, told=False)
    job.own.stop()
    assert job.stop._late() is None
    with pytest.raises(RuntimeError), job.ending.before_a_step():
        raise LOST  # as the servers are stopped
    assert job.status == ("finished", 7, None)
