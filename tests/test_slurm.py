"""examples/slurm.sbatch under a real Slurm; `tests/test_slurm_example.py` tests its steps one by one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from etr_megatron.observe import RunDirectory
from tests import slurm_cluster
from tests.runs import wait_for
from tests.slurm_cluster import SlurmCluster
from tests.test_two_hosts import Hosts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing())]

OPTIONS = ("checkpoint.every=2", "eval.every=0", "checkpoint.keep=2")


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    hosts = Hosts()
    cluster = SlurmCluster(hosts)
    try:
        hosts.connect()
        cluster.start()
        yield cluster
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
    except AssertionError:
        pytest.skip(f"Slurm does not start here: {cluster.said()}")
    finally:
        cluster.stop()
        hosts.remove()


def submit(slurm: SlurmCluster, runs, *overrides: str, options: tuple[str, ...] = (), preflight: str = "0") -> str:
    """Submit the example's job, with one process on each of two nodes."""
    arguments = runs.command(*OPTIONS, *overrides)[3:]
    return slurm.submit(*options, "examples/slurm.sbatch", *arguments, ETR_PROCESSES="1", ETR_PREFLIGHT=preflight)


def wait_for_rows(slurm: SlurmCluster, runs, name: str, count: int, job: str) -> None:
    """Wait until a running job has trained this many steps; fail with its output if it does not."""

    def is_there() -> bool:
        state = slurm.show(job)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING"), slurm.output(job)[-3000:]
        return len(runs.rows(name)) >= count

    wait_for(is_there, poll_s=0.2)


def state_of(runs, name: str) -> str | None:
    return RunDirectory(runs.directory(name)).read_state()


def test_a_job_that_has_to_give_way_goes_on_as_if_nothing_had_happened(slurm, runs):
    code, printed = runs.finish("run.name=straight", *OPTIONS)
    assert code == 0, printed
    job = submit(slurm, runs, "run.name=queued", preflight="1")
    wait_for_rows(slurm, runs, "queued", 2, job)
    slurm.submit("--partition=high", "--wrap", "true")
    wait_for(lambda: slurm.show(job)["Restarts"] == "1")
    saved = runs.saved_rows("queued")
    assert state_of(runs, "queued") == "requeue" and len(saved) == len(runs.rows("queued")) < 6
    wait_for(lambda: slurm.show(job)["JobState"] == "COMPLETED")
    assert slurm.show(job)["Restarts"] == "1" and state_of(runs, "queued") == "finished"
    assert runs.rows("queued") == runs.rows("straight")
    runs.assert_went_on("queued", saved)
    assert slurm.output(job).count("all-reduce between nodes  ok") == 2  # from the preflight of each start


def test_a_job_whose_time_is_over_goes_back_into_the_queue(slurm, runs):
    # SIGTERM comes two minutes before its three are over; Slurm checks twice a minute.
    job = submit(slurm, runs, "run.name=limit", "run.steps=500", options=("--time=3", "--signal=TERM@120"))
    wait_for(lambda: slurm.show(job)["Restarts"] == "1")
    slurm.run("scancel", job)
    assert state_of(runs, "limit") == "requeue" and len(runs.rows("limit")) >= 2


def test_a_job_that_somebody_cancels_saves_and_stays_out_of_the_queue(slurm, runs):
    job = submit(slurm, runs, "run.name=cancelled", "run.steps=500")
    wait_for_rows(slurm, runs, "cancelled", 3, job)
    slurm.run("scancel", job)
    wait_for(lambda: slurm.run("squeue", "--noheader", f"--jobs={job}") == "")
    shown = slurm.show(job)
    assert (shown["JobState"], shown["Restarts"], shown["ExitCode"]) == ("CANCELLED", "0", "143:0")
    saved = runs.saved_rows("cancelled")
    assert state_of(runs, "cancelled") == "requeue" and len(saved) == len(runs.rows("cancelled")) < 500
    code, printed = runs.finish("run.name=cancelled", *OPTIONS, f"run.steps={len(saved) + 1}")
    assert code == 0, printed
    runs.assert_went_on("cancelled", saved)
