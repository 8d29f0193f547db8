"""The experiment in benchmarks/etr_vs_grpo.py: its command line, its directory, and how it launches runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from benchmarks import experiment_report, experiment_runs
from benchmarks.etr_vs_grpo import OVERRIDES, main
from benchmarks.experiment_runs import REPO, Experiment, Run, keep_record, only_user, read_record, run_all, shared_settings
from etr_megatron.errors import UserError
from tests import warm
from tests.runs import wait_for

STEPS = 4


# User errors


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("--presets grpo,etrr", "'etrr' is not a preset; there are "),
        ("--presets etr,dapo", "must contain grpo"),
        ("--presets grpo,etr,etr", "named twice"),
        ("--seeds 0", "--seeds 0: must be at least 1"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--step 5", "unrecognized arguments: --step"),
        ("--out result.png", "must end in .json"),
        ("run.seed=3", "run.seed=3: is set by the experiment itself"),
        ("etr", "'etr': must be key=value"),
        ("--report-only --steps 9", "leave out --steps"),
        ("--report-only --runs-dir nowhere", "holds no experiment"),
        ("train.lrr=1", "train.lrr"),
        ("--steps 3", "train.lr_warmup_updates"),  # violates a constraint of the config; refused before anything starts
        ("eval.every=0", "eval.every must stay on"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    line: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = line.split()
    if "--runs-dir" not in words:
        words += ["--runs-dir", str(tmp_path / "runs")]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and part in printed.err and "Traceback" not in printed.err
    assert printed.out == ""
    assert not (tmp_path / "runs").exists()


def test_missing_matplotlib_is_reported_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiment_report.importlib.util, "find_spec", lambda name: None)
    assert main(["--runs-dir", str(tmp_path / "runs")]) == 2
    assert "needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# The directory of the runs


def test_runs_under_other_settings_are_not_mixed(tmp_path: Path) -> None:
    keep_record(tmp_path, {"train.lr": 1e-3, "run.steps": 60}, {"cpu": "a", "date": "2030-01-01"})
    with pytest.raises(UserError, match=r"made with train\.lr=0\.001, not 0\.002"):
        keep_record(tmp_path, {"train.lr": 2e-3}, {"cpu": "a", "date": "2030-01-01"})
    # A key that a later version added is not a conflict. Another machine is recorded, another date is not.
    keep_record(tmp_path, {"train.lr": 1e-3, "run.steps": 60, "train.new": 1}, {"cpu": "a", "date": "2030-01-02"})
    keep_record(tmp_path, {"train.lr": 1e-3, "run.steps": 60}, {"cpu": "b", "date": "2030-01-02"})
    record = read_record(tmp_path)
    assert record is not None
    assert record["settings"] == {"train.lr": 1e-3, "run.steps": 60}
    assert record["environments"] == [{"cpu": "a", "date": "2030-01-01"}, {"cpu": "b", "date": "2030-01-02"}]


def test_settings_hold_what_shapes_the_numbers_and_nothing_of_a_single_run() -> None:
    experiment = Experiment(Path("a"), 60, (*OVERRIDES, "train.epochs=3"))
    one, other = (shared_settings(experiment.config(run)) for run in (Run("grpo", 1), Run("etr", 2)))
    assert one == other
    assert (one["train.epochs"], one["run.steps"], one["eval.temperature"]) == (3, 60, 1.0)
    assert not {"run.seed", "run.name", "objective.preset", "checkpoint.every"} & set(one)


def test_a_second_experiment_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with only_user(tmp_path), pytest.raises(UserError, match="in use by another experiment"), only_user(tmp_path):
        pass


# Starting and watching


@dataclass(frozen=True)
class Scripted(Experiment):
    """Runs are a few lines of Python instead of training."""

    scripts: dict[Run, str] = field(default_factory=dict)
    pids: list[int] = field(default_factory=list)

    def start(self, run: Run) -> subprocess.Popen[bytes]:
        finish = f"import json; open({str(self.runs_dir / run.name / 'metrics.jsonl')!r}, 'w').write('{{\"step\": 4}}\\n')\n"
        (self.runs_dir / run.name).mkdir(exist_ok=True)
        code = self.scripts.get(run, finish)
        with self.log(run).open("wb") as log:
            process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, start_new_session=True)
        self.pids.append(process.pid)
        return process


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    broken, silent = Run("etr", 1), Run("dapo", 1)
    scripts = {broken: "print('one\\n' * 50 + 'disk on fire'); raise SystemExit(3)", silent: "pass"}
    experiment = Scripted(tmp_path, STEPS, scripts=scripts)
    runs, said = [broken, Run("grpo", 1), silent, Run("grpo", 2)], list[str]()
    failures = run_all(experiment, runs, 1, said.append)
    assert [(failure.run, failure.exit_code) for failure in failures] == [(broken, 3), (silent, 0)]
    assert failures[0].last_lines.endswith("one\ndisk on fire") and failures[0].last_lines.count("\n") < 20
    assert experiment.is_finished(Run("grpo", 1)) and experiment.is_finished(Run("grpo", 2))
    assert said[0].startswith("[1/4] etr-seed1 FAILED with exit code 3") and said[1].startswith("[2/4] grpo-seed1 finished")


@pytest.mark.parametrize("how", ["ctrl_c", "sigterm"])
def test_interrupted_it_leaves_no_run_behind_and_has_started_no_more_than_jobs(tmp_path: Path, how: str) -> None:
    code = "open({!r}, 'w').close(); import time; time.sleep(600)"
    long = {Run(preset, 1): code.format(str(tmp_path / preset)) for preset in ("etr", "dapo")}
    experiment = Scripted(tmp_path, STEPS, scripts=long)

    def interrupt(line: str) -> None:
        wait_for(lambda: (tmp_path / "etr").exists() and (tmp_path / "dapo").exists())
        if how == "ctrl_c":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # the signal is handled here

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt if how == "ctrl_c" else SystemExit):
        run_all(experiment, [*long, Run("grpo", 1), Run("grpo", 2)], 3, interrupt)
    assert len(experiment.pids) == 3
    assert not any(psutil.pid_exists(pid) for pid in experiment.pids)
    assert signal.getsignal(signal.SIGTERM) is before


# Real training runs

SMALL = (
    "tiny.hidden_size=32 tiny.layers=2 tiny.head_dim=12 tiny.intermediate_size=72 tiny.warm_start_steps=40 "
    "rollout.prompts_per_step=6 rollout.samples_per_prompt=4 rollout.max_response_tokens=24 rollout.batch_samples=8 "
    "train.minibatches=3 train.epochs=2 train.lr=0.01 train.lr_warmup_updates=1 reward.timeout_s=60 "
    "reward.function=tests.rewards:digit_sum_is_even eval.every=2 eval.problems=8 arithmetic.eval_problems=8"
)


@pytest.fixture
def arguments(tmp_path: Path, _tiny_cache: Path) -> list[str]:
    folders = ["--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "one.json"), f"tiny.cache_dir={_tiny_cache}"]
    return ["--presets", "grpo,etr", "--seeds", "1", *folders, *SMALL.split()]


@pytest.mark.slow
@pytest.mark.usefixtures("deadline")
def test_real_runs_one_blocked_then_continued_and_not_repeated(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiment_runs, "subprocess", warm.Subprocess)

    def start() -> tuple[int, str]:
        return main([*arguments, "--steps", "4"]), capsys.readouterr().out

    blocked, metrics = tmp_path / "runs" / "etr-seed1", tmp_path / "runs" / "grpo-seed1" / "metrics.jsonl"
    blocked.parent.mkdir()
    blocked.write_text("a file where the run's directory should be")
    code, printed = start()
    assert code == 1
    assert "etr-seed1 FAILED with exit code 2" in printed
    assert f"last lines:\nerror: {blocked}" in printed  # the run's own error message
    assert "- etr, seed 1: missing: not started" in printed
    finished = metrics.read_bytes(), metrics.stat().st_mtime_ns

    blocked.unlink()
    code, printed = start()
    assert code == 0, printed
    assert "2 runs, 1 of them finished before" in printed
    assert (metrics.read_bytes(), metrics.stat().st_mtime_ns) == finished
    found = json.loads((tmp_path / "one.json").read_text())
    first = {run["preset"]: run["evaluations"][0] for run in found["runs"]}
    assert first["grpo"] == first["etr"]  # same warm start
    assert [[step for step, _ in run["evaluations"]] for run in found["runs"]] == [[0, 2, 4], [0, 2, 4]]


@pytest.mark.slow
def test_killed_outright_it_leaves_no_process(arguments: list[str], tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.etr_vs_grpo", *arguments, "--steps", "500"]
    process = subprocess.Popen(line, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: all((tmp_path / "runs" / f"{p}-seed1" / "metrics.jsonl").exists() for p in ("grpo", "etr")))
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4  # two launchers, their ranks, and the ranks' graders
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
