"""What status.json says of a job that SIGTERM, an error or the loss of a rank has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch.distributed as dist

from etr_megatron import termination
from etr_megatron.config import Config
from etr_megatron.errors import RequeueError, UserError
from etr_megatron.observe import RunDirectory
from etr_megatron.platform import rank_liveness
from etr_megatron.platform.preemption import StopRequest
from etr_megatron.platform.rank_liveness import RankLiveness, RankProcess
from etr_megatron.status import REQUEUE_EXIT, STATUS_VARIABLE, Reported, read_status
from etr_megatron.termination import RunTermination
from tests.runs import wait_for

pytestmark = pytest.mark.usefixtures("deadline")

LOST = RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:31337")


class Job:
    """Rank 0 (or 1) of two, in this process, with seven steps trained and four saved. other: the other, a process beside it."""

    def __init__(self, folder, resume: bool = True, rank: int = 0) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        pid, store, own = self.process.pid, dist.HashStore(), RankProcess.own()
        processes = [own, own._replace(host="elsewhere", pid=pid, start_time=rank_liveness._start_time(pid))]
        processes = [processes[rank], processes[1 - rank]]
        self.own, self.other = (RankLiveness(store, one, processes) for one in (rank, 1 - rank))
        self.directory, self.stop = RunDirectory(folder), StopRequest()
        (self.directory.checkpoints / "step_000004").mkdir(parents=True)
        (self.directory.checkpoints / "step_000004" / "trainer.json").touch()
        config = Config()
        self.config = replace(config, checkpoint=replace(config.checkpoint, resume=resume))
        self.termination = RunTermination(self.config, self.directory, self.own, self.stop)

    def kill(self) -> None:
        self.process.kill()
        wait_for(lambda: rank_liveness._start_time(self.process.pid) is None)

    def run(self, *, error: Exception | None, told: bool, has_begun: bool = True) -> None:
        def train() -> None:
            if told:
                os.kill(os.getpid(), signal.SIGTERM)
                wait_for(self.stop)
            if error is not None:
                raise error

        with self.stop.on_sigterm(600):
            self.termination.run(train, lambda: 7, lambda: has_begun)

    @property
    def status(self) -> tuple[str, int, str]:
        status = json.loads(self.directory.status_file.read_text())
        return status["state"], status["step"], status["message"]


@pytest.fixture
def job(tmp_path, request):
    found = Job(tmp_path, **getattr(request, "param", {}))
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


def test_an_error_that_all_ranks_raise_is_no_other_ranks(job):
    job.other.report_failure(f"RuntimeError: {LOST}")
    with pytest.raises(RuntimeError):
        job.run(error=LOST, told=False)
    assert job.status == ("failed", 7, str(LOST))


def test_so_is_one_of_which_another_rank_was_told(job):
    job.other.mark_stopped()
    with pytest.raises(RequeueError):
        job.run(error=LOST, told=False)
    assert job.status[:2] == ("requeue", 4)


def test_so_is_one_of_which_a_node_without_a_rank_was_told(job):
    job.stop.add_source(lambda: True)
    with pytest.raises(RequeueError):
        job.run(error=LOST, told=False)
    assert job.status[:2] == ("requeue", 4)


def test_before_the_first_step_too(job):
    with job.stop.on_sigterm(600), pytest.raises(RequeueError), job.termination.during_startup():
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(job.stop)
        raise LOST
    assert job.status[:2] == ("requeue", 4)


@pytest.mark.parametrize("told", [False, True])  # torchrun also sends SIGTERM because a rank is gone
@pytest.mark.parametrize(
    ("how", "what"), [("killed", "ended without a word, as after SIGKILL"), ("failed", "failed: ValueError: no")]
)
def test_a_job_that_lost_a_rank_has_failed_and_names_it_its_process_and_host_beside_what_the_library_says(job, how, what, told):
    job.kill() if how == "killed" else job.other.report_failure("ValueError: no")
    with pytest.raises(RuntimeError) as raised:
        job.run(error=LOST, told=told)
    assert raised.value is LOST
    said = f"rank 1 (pid {job.process.pid} on elsewhere) {what}; rank 0 then failed: {LOST}"
    assert job.status == ("failed", 7, said)


def test_a_rank_that_waits_for_one_that_is_gone_says_so_before_it_is_ended_itself(job):
    def train() -> None:
        job.kill()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(job.directory.status_file.exists)
        seen.append(job.status)

    seen: list[tuple[str, int, str]] = []
    with job.stop.on_sigterm(600):
        job.termination.run(train, lambda: 7, lambda: True)
    assert seen == [("failed", 7, f"rank 1 (pid {job.process.pid} on elsewhere) ended without a word, as after SIGKILL")]


@pytest.mark.parametrize("error", [RuntimeError("of its own"), UserError("a mistake")])
def test_an_error_of_a_job_that_lost_nobody_is_told_as_it_is(job, monkeypatch, error):
    monkeypatch.setattr(termination, "_DETECTION_S", 0.1)
    with pytest.raises(type(error)):
        job.run(error=error, told=False)
    assert job.status == ("failed", 7, str(error))


@pytest.mark.parametrize("lost", [False, True])  # torchrun then sends SIGTERM to the rank that is left
def test_a_start_that_fails_before_it_has_changed_anything_leaves_the_status_of_the_one_before_it(job, monkeypatch, lost):
    monkeypatch.setattr(termination, "_DETECTION_S", 0.1)
    job.directory.write_status("finished", 4, 4)
    before = job.directory.status_file.read_bytes()
    if lost:
        job.kill()
    refused = UserError("step_000004 does not fit this config")
    with pytest.raises(UserError):
        job.run(error=refused, told=lost, has_begun=False)
    assert job.directory.status_file.read_bytes() == before
    job.directory.status_file.unlink()
    with pytest.raises(UserError):
        job.run(error=refused, told=False, has_begun=False)
    assert job.status == ("failed", 7, str(refused))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("job", [{"rank": 1}], indirect=True)
def test_of_a_job_that_lost_rank_0_the_next_rank_says_so(job, told):
    job.kill()
    with pytest.raises(RuntimeError, match="closed by peer"):
        job.run(error=LOST, told=told)
    lost = f"rank 0 (pid {job.process.pid} on elsewhere) ended without a word, as after SIGKILL"
    assert job.status == ("failed", 7, f"{lost}; rank 1 then failed: {LOST}")


@pytest.mark.parametrize("job", [{"rank": 1}], indirect=True)
@pytest.mark.parametrize("error", [None, LOST, RequeueError("no server is left")])
def test_beside_rank_0_no_other_says_how_a_job_ended(job, monkeypatch, error):
    monkeypatch.setattr(termination, "_DETECTION_S", 0.1)
    with nullcontext() if error is None else pytest.raises(type(error)):
        job.run(error=error, told=False)
    assert not job.directory.status_file.exists()


@pytest.mark.parametrize("job", [{"resume": False}], indirect=True)
def test_a_job_that_may_not_resume_is_not_to_be_started_again(job, monkeypatch):
    monkeypatch.setattr(termination, "_DETECTION_S", 0.1)
    with pytest.raises(RuntimeError, match="closed by peer"):
        job.run(error=LOST, told=True)
    assert job.status[:2] == ("failed", 7)


@pytest.mark.parametrize("told", [True, False])
def test_a_rank_whose_grace_is_over_leaves_a_job_that_is_to_be_started_again(job, monkeypatch, tmp_path, told):
    monkeypatch.setenv(STATUS_VARIABLE, str(tmp_path / "reported"))
    if told:
        job.own.mark_stopped()
    assert job.stop._on_timeout() == (REQUEUE_EXIT if told else None)
    if told:
        assert job.status[:2] == ("requeue", 4) and "run.stop_grace_s=25" in job.status[2]
        assert read_status(tmp_path / "reported") == Reported(job.status[2], REQUEUE_EXIT)
    else:
        assert not job.directory.status_file.exists() and not (tmp_path / "reported").exists()


def test_a_rank_whose_others_have_ended_to_be_started_again_does_not_call_them_lost(job):
    error = RequeueError("no SGLang server is left; step 7 is saved")
    with pytest.raises(RequeueError) as raised:
        job.run(error=error, told=False)
    assert raised.value is error and job.status == ("requeue", 7, str(error)) and job.other.is_stopped
    job.kill()
    job.stop._on_stop()
    assert job.status[0] == "requeue"


def test_a_job_that_has_ended_is_not_said_to_have_ended_otherwise(job):
    job.run(error=None, told=False)
    job.own.mark_stopped()
    assert job.stop._on_timeout() is None
    with pytest.raises(RuntimeError), job.termination.during_startup():
        raise LOST  # as the servers are stopped
    assert job.status == ("finished", 7, None)
