"""The launcher: what it refuses before starting anything, what it reports from the ranks, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from etr_megatron import status
from etr_megatron.errors import UserError
from etr_megatron.launch import main, prepare
from etr_megatron.status import exit_code_of, read_status, report_user_error
from tests import warm
from tests.runs import REPO, gone, wait_for

# What is refused before anything starts


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(f"run: {{platform: cpu, dir: {tmp_path}/runs}}\n")
    return str(path)


def test_of_a_key_that_is_given_twice_the_last_value_counts_and_a_note_says_so(
    small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a script appends an override to those of the user."""
    repeated = ["run.seed=3", "run.stop_grace_s=9", "parallel.tp=1", "run.seed=4", "parallel.tp=1"]
    _, _, overrides, grace_s = prepare([small, *repeated, "run.stop_grace_s=8"])
    assert sorted(overrides) == ["parallel.tp=1", "run.seed=4", "run.stop_grace_s=8"] and grace_s == 8
    assert capsys.readouterr().err.splitlines() == [
        "note: run.seed is given 2 times on the command line; the last counts: run.seed=4",
        "note: run.stop_grace_s is given 2 times on the command line; the last counts: run.stop_grace_s=8",
    ]


def test_prepare_returns_what_to_start(small: str) -> None:
    assert prepare(["--nproc", "2", small, "run.seed=3"]) == (2, Path(small), ["run.seed=3"], 25.0)
    assert prepare([small, "parallel.tp=1"]) == (1, Path(small), ["parallel.tp=1"], 25.0)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train.learning_rate=1"], ["train.learning_rate"]),
        (["model.path=/no/such/model"], ["model.path", "/no/such/model", "is not a directory"]),
        (["--nproc", "3", "parallel.tp=2"], ["parallel.tp", "3", "2"]),
        (["data.train={}/empty.jsonl"], ["data.train", "empty.jsonl"]),
        (["data.train={}/other.jsonl"], ["other.jsonl", "question", "problem"]),
        (["--nproc=0"], ["--nproc 0: must be a whole number"]),
        (["--nproc"], ["--nproc"]),
        (["--nproc", "9" * 400], ["must be a whole number of processes, from 1 to 999999999"]),
        (["--nproc", "100000"], ["--nproc 100000: they would need 29297 GiB", "choose fewer"]),
        (["parallel.cp=100000"], ["the parallel layout asks for 100000 processes: they would need 29297 GiB"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text('{"problem": "6*7", "answer": "42"}\n')
    before = sorted(tmp_path.iterdir())
    assert main([small, *(argument.format(tmp_path) for argument in arguments)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ")
    assert [part for part in parts if part not in told.err] == []
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tp=3", "--nproc", "3"], ["4 attention heads", "parallel.tp=3"]),
        (["rollout.max_response_tokens=500"], ["context of 512 tokens", "rollout.max_response_tokens=500"]),
        (["spoil"], ["config.json does not fit the weights", "gate_proj.weight", "[96, 48]"]),
    ],
    ids=["heads", "context", "config against weights"],
)
def test_a_model_that_cannot_be_run_is_refused(
    small: str, hf: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    if overrides == ["spoil"]:
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    arguments = [f"model.path={hf}", "data.max_prompt_tokens=100", *(o for o in overrides if o != "spoil")]
    assert main([small, *arguments]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told


def test_a_dry_run_starts_nothing_and_finds_the_number_of_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(REPO / "configs/qwen3_8b_8gpu.yaml"), "--dry-run", f"run.dir={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert "\nfits: rank" in told and "8 is the first of 1, 2, 4, 8 ... that the config fits on" in told
    assert not list(tmp_path.iterdir())


def test_more_processes_than_gpus_are_refused(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match="--nproc 8: this machine has 4 GPUs"):
        prepare(["--nproc", "8", small, "run.platform=auto"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "other"), [("train", ", or the whole job with bash examples/run_etr.sh"), ("preflight", "")]
)
def test_a_ranks_command_without_torchrun_is_one_sentence(small: str, module: str, other: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", f"etr_megatron.{module}", "--config", small]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: RANK is not set: python -m etr_megatron.{module} runs a single rank; start it with torchrun "
        f"--nproc-per-node N -m etr_megatron.{module}{other}\n"
    )


# How an error that a rank finds is reported


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ETR_STATUS_FILE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(variable, raising=False)


def test_the_first_report_wins_and_stays_off_the_terminal(
    no_launcher: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ETR_STATUS_FILE", str(tmp_path / "status.json"))
    assert read_status(tmp_path / "status.json") is None
    report_user_error(UserError("the disk is full"))
    report_user_error(UserError("a later one"))
    assert read_status(tmp_path / "status.json") == ("the disk is full", 2)
    assert capsys.readouterr() == ("", "") and len(list(tmp_path.iterdir())) == 1


def test_under_plain_torchrun_only_the_first_rank_prints(
    no_launcher: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        report_user_error(UserError("the disk is full"))
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_without_torchrun_the_sentence_is_printed(no_launcher: None, capsys: pytest.CaptureFixture[str]) -> None:
    report_user_error(UserError("the disk is full"))
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_the_sentence_is_printed_when_even_the_status_file_has_no_room(
    no_launcher: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("ETR_STATUS_FILE", str(tmp_path / "status.json"))
    monkeypatch.setattr(status.os, "link", no_room)
    report_user_error(UserError("the disk is full"))
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_errors_in_the_wake_of_a_reported_mistake_are_quiet_others_are_not(
    no_launcher: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def peer_left() -> None:
        raise RuntimeError("connection closed by peer")

    def mistake() -> None:
        raise UserError("the disk is full")

    monkeypatch.setenv("ETR_STATUS_FILE", str(tmp_path / "status.json"))
    assert exit_code_of(lambda: None) == 0
    with pytest.raises(RuntimeError):
        exit_code_of(peer_left)
    assert exit_code_of(mistake) == 2
    assert exit_code_of(peer_left) == 2


# Real ranks: small scripts in place of etr_megatron.train

RANK_SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from etr_megatron.errors import UserError
from etr_megatron.platform.lifetime import die_with_parent
from etr_megatron.status import _status_file, exit_code_of, read_status

die_with_parent()
rank, what, folder = int(os.environ["RANK"]), sys.argv[1], Path(sys.argv[2])

def body():
    if what == "mistake" and rank == 1:
        raise UserError("rank 1: the disk is full")
    if what == "mistake":
        while read_status(_status_file()) is None:
            time.sleep(0.01)
        raise RuntimeError("connection closed by peer")
    if what == "crash" and rank == 1:
        raise ZeroDivisionError("a defect")
    if what == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wait":
        (folder / f"pid{rank}").write_text(str(os.getpid()))
    if what in ("wait", "crash", "killed"):
        time.sleep(300)

sys.exit(exit_code_of(body))
"""

LAUNCHER = "import sys; from etr_megatron import launch; launch.run_and_exit(lambda: launch.start_ranks(2, sys.argv[1:]))"


@pytest.fixture
def command(tmp_path: Path) -> Callable[[str], list[str]]:
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT)
    return lambda what: [str(script), what, str(tmp_path)]


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    process = warm.start([sys.executable, "-c", LAUNCHER, *arguments], {**os.environ})
    printed = process.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, process.returncode, *printed)


def test_ranks_that_finish_give_exit_code_0(command: Callable[[str], list[str]]) -> None:
    started = [sys.executable, "-c", LAUNCHER, *command("nothing")]
    done = subprocess.run(started, capture_output=True, text=True, cwd=REPO, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_mistake_met_by_one_rank_is_one_sentence_and_exit_code_2(command: Callable[[str], list[str]]) -> None:
    done = launch(command("mistake"))
    assert (done.returncode, done.stderr) == (2, "error: rank 1: the disk is full\n")


def test_a_crash_in_a_rank_shows_its_traceback_and_exits_1(command: Callable[[str], list[str]]) -> None:
    done = launch(command("crash"))
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 and "ZeroDivisionError: a defect" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("rank 1 (pid ")
    assert "torch/distributed/elastic" not in done.stderr


def test_a_rank_killed_by_the_system_is_named(command: Callable[[str], list[str]]) -> None:
    done = launch(command("killed"))
    assert done.returncode == 1 and "was killed by SIGKILL (out of memory?)" in done.stderr
    assert "Traceback" not in done.stderr


def test_under_plain_torchrun_the_sentence_comes_once(command: Callable[[str], list[str]]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "ETR_STATUS_FILE"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = warm.start([*torchrun, *command("mistake")], environment)
    _, told = process.communicate(timeout=600)
    assert process.returncode != 0 and told.count("error: rank 1: the disk is full") == 1
    assert "connection closed by peer" not in told


@pytest.mark.slow
@pytest.mark.parametrize(("signal_number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_to_the_launcher_leaves_no_process(
    command: Callable[[str], list[str]], tmp_path: Path, signal_number: int, exit_code: int
) -> None:
    with open(tmp_path / "stderr", "w") as stderr:
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *command("wait")], stderr=stderr, cwd=REPO, start_new_session=True
        )
    try:
        files = [tmp_path / f"pid{rank}" for rank in range(2)]
        wait_for(lambda: all(file.exists() and file.read_text() for file in files))
        ranks = [int(file.read_text()) for file in files]
        launcher.send_signal(signal_number)
        assert launcher.wait(250) == exit_code
        wait_for(lambda: all(map(gone, ranks)), deadline_s=250)  # they sleep for 300 s
    finally:
        launcher.kill()
    said = (tmp_path / "stderr").read_text()
    assert "Traceback" not in said and ("interrupted; progress since the last checkpoint is lost" in said) == (exit_code == 130)


def test_ctrl_c_that_ends_a_peer_first_leaves_no_traceback_of_this_rank() -> None:
    """Its collective breaks before torchrun has passed the signal on to it."""
    code = """
from etr_megatron import status

status.SIGNAL_DELAY_S = 300.0  # for a busy machine

def collective():
    print("broken", flush=True)
    raise RuntimeError("connection closed by peer")

status.exit_code_of(collective)
"""
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO)
    assert rank.stdout is not None and rank.stdout.readline() == "broken\n"
    time.sleep(0.1)
    rank.send_signal(signal.SIGINT)
    _, said = rank.communicate(timeout=250)
    assert (rank.returncode, said) == (-signal.SIGINT, "")
