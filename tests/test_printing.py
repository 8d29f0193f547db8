"""Commands that print: to a full disk, to a closed output, their usage texts, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import REPO

PLAN = (str(REPO / "tools" / "plan.py"), "--config", str(REPO / "configs" / "cpu_tiny.yaml"), "--gpus", "2")
COMMANDS = {
    "config": ("-m", "etr_megatron.config"),
    "run_state": ("-m", "etr_megatron.observe.run_state", str(REPO / "configs" / "cpu_tiny.yaml"), "run.name=none"),
    "plan": PLAN,
}


def run(*arguments: str, redirect: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in a shell that redirects its output."""
    command = ["bash", "-c", f'exec "$@" {redirect}', "bash", sys.executable, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("command", "unbuffered"), [*((command, ()) for command in COMMANDS), ("config", ("-u",)), ("run_state", ("-u",))]
)
def test_output_that_finds_a_full_disk_is_one_sentence_and_exit_code_2(command: str, unbuffered: tuple[str, ...]) -> None:
    done = run(*unbuffered, *COMMANDS[command], redirect=">/dev/full")
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_goes_nowhere_is_no_failure(command: str) -> None:
    done = run(*COMMANDS[command], redirect=">&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"6 \u20ac \ud83d"), ("utf-8", r"6 € \ud83d")])
def test_what_the_output_cannot_encode_is_spelled_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    one = {"id": "a@1", "problem": {"id": "a", "prompt": "6 € \ud83d", "answer": "42", "prompt_ids": [1]}}
    sample = {"index": 0, "response_ids": [], "rollout_logprobs": [], "finish_reason": "stop", "weight_version": 0, "text": ""}
    one["samples"] = [sample | {"reward": 1.0, "reward_status": "ok", "weight_versions": []}]
    (tmp_path / "recorded").mkdir()
    lines = json.dumps({"step": 1, "counts": {}}), json.dumps(one)
    (tmp_path / "recorded" / "step_000001.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = run("-m", "etr_megatron.observe", "rollout", str(tmp_path), "--step", "1", "--sample", "a@1/0")
    assert done.returncode == 0 and shown in done.stdout, done.stderr


def test_the_reference_takes_no_arguments() -> None:
    done = run("-m", "etr_megatron.config", "configs/cpu_tiny.yaml")
    assert done.returncode == 2 and "unrecognized arguments: configs/cpu_tiny.yaml" in done.stderr and not done.stdout


@pytest.mark.parametrize("module", ["train", "preflight", "observe.run_state", "config", "observe"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_module_that_is_run_says_how(module: str, option: str) -> None:
    done = run("-m", f"etr_megatron.{module}", option)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and not done.stderr


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b'{"step": 3', b"\xff\xfe"])
def test_a_damaged_status_file_is_one_sentence_for_scripts_and_for_the_next_start(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "status.json").write_bytes(text)
    job = (str(REPO / "configs" / "cpu_tiny.yaml"), f"run.dir={tmp_path}", "run.name=mine")
    for command in ("observe.run_state", *["launch"] * (text == b"[]")):  # it uses the same reader
        done = run("-m", f"etr_megatron.{command}", *job)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: {tmp_path}/mine/status.json does not hold a run's state (")


@pytest.mark.parametrize(
    ("main", "option", "code"),
    [
        *[(main, "--help", 0) for main in ("train", "launch", "preflight", "examples/run_etr.sh", "tools/convert_hf.py")],
        *[(main, "--unknown", 2) for main in ("train", "launch", "preflight", "examples/run_etr.sh", "tools/convert_hf.py")],
    ],
)
def test_ranks_and_their_launcher_end_without_the_interpreters_shutdown_which_threads_may_not_survive(
    main: str, option: str, code: int
) -> None:
    run_it = f"run_path('{REPO / main}'" if "/" in main else f"run_module('etr_megatron.{main}'"
    done = run("-c", f"import atexit, os, runpy; atexit.register(os.abort); runpy.{run_it}, run_name='__main__')", option)
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize(
    "error", ["ZeroDivisionError()", "BrokenPipeError(32, 'pipe')", "OSError(28, 'full')", "KeyboardInterrupt()"]
)
@pytest.mark.parametrize("lacking", ["", "stdout", "stderr"])
def test_a_rank_that_fails_unexpectedly_ends_with_1_and_a_traceback_without_that_shutdown(error: str, lacking: str) -> None:
    program = f"""
import atexit, os, sys
from etr_megatron.status import run_and_exit

def main():
    print("half")
    raise {error}

atexit.register(os.abort)
{f"sys.{lacking} = None" if lacking else ""}
run_and_exit(main)
"""
    done = run("-c", program)
    assert done.returncode == 1
    assert ("half" in done.stdout) == (lacking != "stdout")
    assert (error.partition("(")[0] in done.stderr) == (lacking != "stderr")


def test_a_rank_whose_errors_go_nowhere_still_ends_without_that_shutdown() -> None:
    program = "import atexit, os; atexit.register(os.abort); from etr_megatron.status import run_and_exit\n"
    assert run("-c", f"{program}run_and_exit(lambda: 1 // 0)", redirect="2>/dev/full").returncode == 1


@pytest.mark.parametrize(("argument", "code", "told"), [("", 0, ""), ("3", 3, ""), ("'why'", 1, "why\n")])
def test_what_a_rank_passes_to_sys_exit_is_its_end(argument: str, code: int, told: str) -> None:
    done = run("-c", f"import sys; from etr_megatron.status import run_and_exit; run_and_exit(lambda: sys.exit({argument}))")
    assert (done.returncode, done.stderr) == (code, told)
