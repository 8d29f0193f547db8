"""examples/slurm.sbatch and torchrun_node.sh, with stand-ins for the commands that they call, which record their arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.runs import REPO

STAND_INS = {
    "scontrol": 'echo "scontrol $*" >>"$CALLS"\n'
    'case "$*" in "show host"*) printf "node7\\nnode8\\n" ;; "show job 42") echo "$JOB" ;; esac',
    # Removes its own options and runs the rest here.
    "srun": 'echo "$*" >>"$CALLS"; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    # A job whose preflight passes and whose ranks end as the test specifies.
    "torchrun": 'case "$*" in *${TERM_AT:-nowhere}*) kill -TERM $PPID; exit 1 ;; *preflight*) exit 0 ;; esac\n'
    '[ -z "$STATE" ] || echo "$STATE" >"$STATUS"; exit $CODE',
}


def shown(state: str, reason: str = "None", preempted: str = "None") -> str:
    """An excerpt of `scontrol show job`: what the script looks for and its surroundings."""
    times = f"PreemptEligibleTime=2026-11-28T10:00:00 PreemptTime={preempted}"
    return f"JobId=42 JobName=etr\n   JobState={state} Reason={reason} Dependency=(null)\n   {times}\n   SuspendTime=None"


@pytest.fixture
def job(tmp_path):
    """Runs the batch script: (exit code, what was called)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    calls, status = tmp_path / "calls", tmp_path / "runs" / "job" / "status.json"
    status.parent.mkdir(parents=True)

    def run(state: str, code: int, **environment: str) -> tuple[int, list[str]]:
        env = {**os.environ, "PATH": f"{programs}:{os.path.dirname(sys.executable)}:/usr/bin:/bin", "CALLS": str(calls)}
        env |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "4"}
        env |= {"JOB": shown("RUNNING")}
        env |= {"STATE": json.dumps({"state": state}) if state else "", "STATUS": str(status), "CODE": str(code), **environment}
        command = ["bash", "examples/slurm.sbatch", "configs/cpu_tiny.yaml", f"run.dir={tmp_path / 'runs'}", "run.name=job"]
        done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=600)
        assert "Traceback" not in done.stderr
        return done.returncode, calls.read_text().splitlines()

    return run


def test_a_job_that_asks_for_it_goes_back_into_the_queue(job):
    code, called = job("requeue", 1)
    assert code == 0 and called[-1] == "scontrol requeue 42"
    preflight, training = (line for line in called if "torchrun" in line)
    assert "-m etr_megatron.preflight configs/cpu_tiny.yaml" in preflight
    for line in (preflight, training):
        assert "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node7:29500 --rdzv-id 42" in line
    assert "examples/run_etr.sh configs/cpu_tiny.yaml" in training and training.endswith("run.stop_grace_s=540")


def test_nodes_whose_servers_have_gpus_of_their_own_are_given_fewer_processes(job):
    _, called = job("finished", 0, ETR_PROCESSES="2")
    assert [line.partition("--nproc-per-node ")[2][:2] for line in called if "torchrun" in line] == ["2 ", "2 "]


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("failed", 1), ("", 3)])
def test_any_other_end_is_the_jobs_own(job, state, code):
    found, called = job(state, code)
    assert found == code and not any("requeue" in line for line in called)


def test_a_job_that_fails_before_its_first_step_is_not_queued_for_ever(job, tmp_path):
    # Left by its predecessor, which asked for a requeue.
    (tmp_path / "runs" / "job" / "status.json").write_text(json.dumps({"state": "requeue"}))
    code, called = job("", 1)
    assert code == 1 and not any("requeue" in line for line in called)
    assert job("requeue", 1)[0] == 0  # the job writes the same status itself


@pytest.mark.parametrize("term_at", ["preflight", "run_etr.sh"])
def test_a_job_that_is_told_to_stop_before_its_ranks_say_anything_goes_back_too(job, tmp_path, term_at):
    for left in ("", json.dumps({"state": "requeue"})):
        (tmp_path / "runs" / "job" / "status.json").unlink(missing_ok=True)
        if left:
            (tmp_path / "runs" / "job" / "status.json").write_text(left)
        code, called = job("", 1, TERM_AT=term_at)
        assert code == 0 and called[-1] == "scontrol requeue 42"
        assert sum("run_etr.sh" in line for line in called) == (term_at == "run_etr.sh") * (2 if left else 1)


# Slurm reports COMPLETING as long as the script runs.
@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "CANCELLED,COMPLETING"])
@pytest.mark.parametrize("environment", [{}, {"TERM_AT": "run_etr.sh"}, {"TERM_AT": "preflight"}])
def test_a_job_that_somebody_has_cancelled_stays_out_of_the_queue(job, environment, state):
    code, called = job("" if environment else "requeue", 1, JOB=shown(state), **environment)
    assert code == 143 and not any("scontrol requeue" in line for line in called)


@pytest.mark.parametrize("ended_by", [{"reason": "TimeLimit"}, {"preempted": "2026-11-28T11:00:00"}])
def test_a_job_whose_time_is_over_or_that_gives_way_to_others_goes_back(job, ended_by):
    code, called = job("requeue", 1, JOB=shown("COMPLETING", **ended_by))
    assert code == 0 and called[-1] == "scontrol requeue 42"


def test_the_commands_run_in_a_container_where_one_is_named(job):
    code, called = job("finished", 0, ETR_RUN="env IN_CONTAINER=1", ETR_PREFLIGHT="0")
    assert code == 0 and not any("preflight" in line for line in called)
    assert any("env IN_CONTAINER=1 torchrun" in line for line in called)


def test_the_state_of_a_run_is_one_word(tmp_path):
    command = [
        sys.executable,
        "-m",
        "etr_megatron.observe.run_state",
        "configs/cpu_tiny.yaml",
        f"run.dir={tmp_path}",
        "run.name=a",
    ]
    ask = lambda *more: subprocess.run([*command, *more], cwd=REPO, capture_output=True, text=True)  # noqa: E731
    assert ask().stdout == "none\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "status.json").write_text(json.dumps({"state": "requeue"}))
    assert ask().stdout == "requeue\n"
    word, written = ask("--written").stdout.split()
    assert word == "requeue" and int(written) == (tmp_path / "a" / "status.json").stat().st_mtime_ns
    wrong = ask("run.nme=b")
    assert wrong.returncode == 2 and "did you mean run.name" in wrong.stderr and "Traceback" not in wrong.stderr


def node(tmp_path, *arguments, torchrun=True, **environment):
    """Exit code and output of examples/torchrun_node.sh, and the arguments that it gives torchrun."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    if torchrun:
        (tmp_path / "bin" / "torchrun").write_text('#!/usr/bin/env bash\necho "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*"\n')
        (tmp_path / "bin" / "torchrun").chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", **environment}
    done = subprocess.run(
        ["bash", "examples/torchrun_node.sh", *arguments], cwd=REPO, env=env, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr, done.stdout.strip()


def test_a_node_by_hand_says_what_it_lacks_in_one_sentence(tmp_path):
    code, said, _ = node(tmp_path, "4", "8", "head", "c.yaml", torchrun=False)
    assert (code, said.startswith("error: torchrun is not on the PATH; source .venv/bin/activate")) == (2, True)
    code, said, _ = node(tmp_path, "4", "8", "head")
    assert code == 2 and "torchrun_node.sh NODES PROCESSES_PER_NODE HEAD[:PORT] CONFIG" in said and "set -euo" not in said


def test_a_node_by_hand_passes_on_how_long_a_stop_may_take(tmp_path):
    code, said, called = node(tmp_path, "4", "8", "head", "c.yaml", "data.train=a b.jsonl")
    assert (code, said) == (0, "")
    assert called.startswith("60 --nnodes 4 --nproc-per-node 8 ") and "--rdzv-endpoint head:29500" in called
    assert called.endswith("examples/run_etr.sh c.yaml data.train=a b.jsonl")
    _, _, called = node(tmp_path, "4", "8", "head:1", "c.yaml", ETR_STOP_GRACE_S="540")
    assert called.startswith("570 ") and called.endswith("c.yaml run.stop_grace_s=540")
