"""The experiment of benchmarks/etr_vs_grpo.py: its statistics, which runs count, its report, and how it runs the product."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks import experiment_report
from benchmarks.etr_vs_grpo import OVERRIDES, main
from benchmarks.experiment_analysis import RunResult, analyse, analyse_run, curve, interval, mean_curve, t_quantile
from benchmarks.experiment_environment import environment
from benchmarks.experiment_runs import REPO, Experiment, Run, keep_record, only_user, read_record, run_all, shared_settings
from etr_megatron.errors import UserError
from tests.runs import wait_for

STEPS = 4


def row(step: int, **values: Any) -> dict[str, Any]:
    """The columns that the analysis reads; 1.5% of the tokens are clipped unless told otherwise."""
    usual = dict(reward_mean=0.5, entropy=0.2, clip_frac_upper=0.01, clip_frac_lower=0.005, clip_radius_mean=0.2, time_step=3.0)
    return {"step": step, **usual, **values}


def rows_of(accuracy: float = 0.5, **values: Any) -> list[dict[str, Any]]:
    """A finished run of `STEPS` steps, evaluated after steps 2 and 4."""
    rows = [row(step, **values) for step in range(1, STEPS + 1)]
    rows[0]["eval_accuracy_start"] = 0.25
    rows[1]["eval_accuracy"] = rows[3]["eval_accuracy"] = accuracy
    return rows


def result(preset: str, seed: int, accuracy: float = 0.5, **values: Any) -> RunResult:
    return analyse_run(Run(preset, seed), rows_of(accuracy, **values), STEPS)


# Statistics


@pytest.mark.parametrize("df", [1, 2, 3, 4, 6, 9, 14, 20, 30])
def test_t_quantile_leaves_two_and_a_half_percent_above_it(df: int) -> None:
    # P(0 < T < t) with T = sqrt(df) tan(u): the density of u is proportional to cos(u) ** (df - 1).
    def area(upper: float) -> float:
        u = np.linspace(0.0, upper, 200_001)
        return float(np.trapezoid(np.cos(u) ** (df - 1), u))

    below = 0.5 + 0.5 * area(np.arctan(t_quantile(df) / np.sqrt(df))) / area(np.pi / 2)
    assert below == pytest.approx(0.975, abs=2e-6)
    assert t_quantile(500) == t_quantile(30) > 1.96  # above the table: too wide rather than too narrow


def test_interval_of_four_values_by_hand() -> None:
    one = interval([1.0, 2.0, 3.0, 6.0])  # deviations -2, -1, 0, 3: s^2 = 14 / 3
    assert (one.n, one.mean) == (4, 3.0)
    assert one.half == pytest.approx(3.1824 * np.sqrt(14 / 3) / 2)
    assert (one.low, one.high) == (pytest.approx(-0.43739, abs=1e-5), pytest.approx(6.43739, abs=1e-5))
    assert (interval([0.7]).mean, interval([0.7]).low, interval([]).mean) == (0.7, None, None)


def test_a_difference_is_claimed_only_where_the_interval_excludes_zero() -> None:
    assert interval([0.1, 0.2, 0.3]).verdict == "no difference shown"  # mean 0.2, half 4.3027 * 0.1 / sqrt(3) = 0.248
    assert interval([0.0, 0.0]).verdict == "no difference shown"
    assert (interval([0.19, 0.2, 0.21]).verdict, interval([-0.19, -0.2, -0.21]).verdict) == ("higher", "lower")
    assert interval([0.3]).verdict == interval([]).verdict == "too few pairs"


# A run's figures, and whether it counts


def test_figures_of_a_run_by_hand() -> None:
    rows = [row(step, reward_mean=step / 100, entropy=1 / step) for step in range(1, 21)]
    for one in rows:
        one["clip_frac_upper"] = 0.02 if one["step"] % 2 else 0.0
        one["clip_frac_lower"] = 0.03 if one["step"] <= 5 else 0.01
        one["clip_radius_mean"] = 0.1 if one["step"] <= 15 else 0.3
    rows[0]["eval_accuracy_start"] = 0.9  # no part of any figure: no preset has acted yet
    rows[7]["eval_accuracy"], rows[15]["eval_accuracy"], rows[19]["eval_accuracy"] = 0.4, 0.9, 0.8
    figures = {"final_accuracy": 0.8, "accuracy_area": 0.7, "clip_upper": 0.01, "clip_lower": 0.015, "radius": 0.15}
    last = {"final_reward": 0.195, "final_entropy": (1 / 19 + 1 / 20) / 2}  # steps 19 and 20: the last tenth
    assert analyse_run(Run("etr", 3), rows, 20).figures == pytest.approx(figures | last)


@pytest.mark.parametrize(("lower", "state"), [(0.0039, "void"), (0.0041, "ok")])
def test_a_run_with_under_one_percent_of_tokens_clipped_is_void(lower: float, state: str) -> None:
    one = result("etr", 1, clip_frac_upper=0.006, clip_frac_lower=lower)
    assert one.state == state
    assert one.reason == ("0.99% of the tokens clipped" if state == "void" else "")


def test_runs_that_are_not_there_or_not_at_their_end_or_not_finite_do_not_count() -> None:
    broken = rows_of()
    broken[2]["entropy"] = None
    found = [analyse_run(Run("etr", 1), rows, STEPS) for rows in ([], rows_of()[:3], broken)]
    assert [one.state for one in found] == ["missing", "missing", "not finite"]
    assert [one.reason for one in found] == ["not started", "step 3 of 4", "entropy at step 3"]
    assert not any(one.figures for one in found)


def test_mean_curve_is_over_the_runs_that_count() -> None:
    results = [result("etr", 1, 0.4), result("etr", 2, 0.6), result("etr", 3, 0.9, clip_frac_upper=0.0), result("grpo", 1, 0.1)]
    points = mean_curve(results, "etr", "eval_accuracy")
    assert list(points) == list(curve(rows_of(), "eval_accuracy")) == [0, 2, 4]  # 0: before the first update
    assert points[0].mean == 0.25
    assert (points[4].n, points[4].mean) == (2, pytest.approx(0.5))
    assert points[4].half == pytest.approx(12.7062 * 0.1)  # s = 0.2 / sqrt(2), over sqrt(2)


# Differences


def test_differences_are_taken_seed_by_seed() -> None:
    # Seeds differ by 0.5, presets by about 0.02: only pairs show it.
    grpo = [result("grpo", seed, accuracy) for seed, accuracy in ((1, 0.10), (2, 0.60), (3, 0.35))]
    etr = [result("etr", seed, accuracy) for seed, accuracy in ((3, 0.37), (1, 0.11), (2, 0.63))]
    one = analyse([*grpo, *etr], "grpo")["differences"]["etr"]["figures"]["final_accuracy"]
    assert (one["n"], one["mean"]) == (3, pytest.approx(0.02))  # 0.01, 0.03, 0.02
    assert one["high"] - one["mean"] == pytest.approx(4.3027 * 0.01 / np.sqrt(3))


def test_a_pair_needs_both_runs_to_count() -> None:
    results = [
        *(result("grpo", seed, 0.5) for seed in (1, 2, 4)),
        result("grpo", 3, 0.5, clip_frac_upper=0.0),  # void
        *(result("etr", seed, 0.5 + seed / 10) for seed in (1, 2, 3)),
        analyse_run(Run("etr", 4), [], STEPS),  # missing
    ]
    analysis = analyse(results, "grpo")
    assert analysis["differences"]["etr"]["seeds"] == [1, 2]
    assert analysis["differences"]["etr"]["figures"]["final_accuracy"]["mean"] == pytest.approx(0.15)
    assert (analysis["presets"]["grpo"]["counted"], analysis["presets"]["grpo"]["void"]) == (3, [3])
    assert (analysis["presets"]["etr"]["counted"], analysis["presets"]["etr"]["missing"]) == (3, [4])
    assert "grpo" not in analysis["differences"]
    void = analysis["runs"][3]
    assert (void["preset"], void["seed"], void["state"]) == ("grpo", 3, "void")
    assert void["figures"]["clip_lower"] == pytest.approx(0.005)
    assert (analysis["runs"][0]["seconds"], analysis["runs"][0]["evaluations"]) == (12, [[0, 0.25], [2, 0.5], [4, 0.5]])


# The report of runs that are there


def write_run(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Three seeds of grpo, etr (better) and dapo (the same in the mean); seed 2 of dapo is void."""
    folder = tmp_path / "finished"
    for seed, base in ((1, 0.3), (2, 0.5), (3, 0.7)):
        write_run(folder, f"grpo-seed{seed}", rows_of(base))
        write_run(folder, f"etr-seed{seed}", rows_of(base + 0.1 + seed / 1000))
        write_run(folder, f"dapo-seed{seed}", rows_of(base + 0.01 * (seed - 2), clip_frac_upper=0.002 if seed == 2 else 0.01))
    config = Experiment(folder, 60, OVERRIDES).config(Run("grpo", 1))
    settings = shared_settings(config) | {"run.steps": STEPS}
    keep_record(folder, settings, environment(REPO))
    return folder


def report(folder: Path, out: Path, presets: str = "grpo,dapo,etr", seeds: int = 3) -> int:
    return main(["--report-only", "--runs-dir", str(folder), "--out", str(out), "--presets", presets, "--seeds", str(seeds)])


def test_report_says_what_is_shown_and_what_is_not(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "one.json"
    assert report(finished, out) == 0
    found = json.loads(out.read_text())
    etr = found["differences"]["etr"]["figures"]["final_accuracy"]
    assert (etr["n"], etr["mean"], etr["verdict"]) == (3, pytest.approx(0.102), "higher")
    assert found["differences"]["dapo"]["figures"]["accuracy_area"]["verdict"] == "no difference shown"
    assert found["settings"]["train.lr"] == 3e-4 and found["seeds"] == [1, 2, 3]
    assert {"torch", "megatron_core", "python", "cpu", "commit", "date"} <= set(found["environments"][0])
    assert len(found["runs"]) == 9
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert "- etr against grpo, held-out accuracy at the end, pairs 3: +0.102 (+0.100 to +0.104): higher." in text
    assert "- dapo against grpo, held-out accuracy at the end, pairs 2: +0.000 (-0.127 to +0.127): no difference shown." in text
    assert "- dapo, seed 2: void (under 1% of its tokens clipped, so its clip range was not at work): 0.70% of the" in text
    assert "| dapo | 2 of 3 | 1 | 0.500 +- 2.668 |" in text  # 12.7062 * 0.21, from 0.29 and 0.71


def test_report_names_missing_runs_and_ends_with_1(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "one.json"
    with (finished / "grpo-seed2" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "torn')  # a kill in mid-write: the finished run is still finished
    assert report(finished, out, "grpo,etr,etr_matched", seeds=1) == 1
    text = out.with_suffix(".md").read_text()
    assert "- etr_matched, seed 1: missing: not started; left out." in text
    assert "| etr_matched | 0 | too few pairs |" in text
    assert "| etr_matched | 0 of 1 | 0 | - |" in text
    assert report(finished, out, "grpo,etr", seeds=2) == 0
    assert report(finished, finished / "grpo-seed1" / "metrics.jsonl" / "one.json") == 2
    assert "--out" in capsys.readouterr().err


# Mistakes


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
        ("--steps 3", "train.lr_warmup_updates"),  # the config's own constraints, before anything is started
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
    # A key that a later version has added is no other setting; another machine is put on record, another day is not.
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
    """Instead of the product a run is a few lines of Python."""

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
        time.sleep(5)  # the signal is taken in here

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt if how == "ctrl_c" else SystemExit):
        run_all(experiment, [*long, Run("grpo", 1), Run("grpo", 2)], 3, interrupt)
    assert len(experiment.pids) == 3
    assert not any(psutil.pid_exists(pid) for pid in experiment.pids)
    assert signal.getsignal(signal.SIGTERM) is before


# The product itself

SMALL = (
    "tiny.hidden_size=32 tiny.layers=2 tiny.head_dim=12 tiny.intermediate_size=72 tiny.warm_start_steps=40 "
    "rollout.prompts_per_step=6 rollout.samples_per_prompt=4 rollout.max_response_tokens=24 rollout.batch_samples=8 "
    "train.minibatches=3 train.epochs=2 train.lr=0.01 train.lr_warmup_updates=1 reward.timeout_s=60 "
    "reward.function=tests.rewards:digit_sum_is_even eval.every=2 eval.problems=8 arithmetic.eval_problems=8"
)


@pytest.fixture
def command(tmp_path: Path, _tiny_cache: Path) -> Callable[..., list[str]]:
    def build(*more: str) -> list[str]:
        folders = ["--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "one.json"), f"tiny.cache_dir={_tiny_cache}"]
        return [sys.executable, "-m", "benchmarks.etr_vs_grpo", "--presets", "grpo,etr", *folders, *SMALL.split(), *more]

    return build


@pytest.mark.slow
def test_real_runs_one_blocked_then_continued_and_not_repeated(command: Callable[..., list[str]], tmp_path: Path) -> None:
    def start() -> tuple[int, str]:
        done = subprocess.run(command("--seeds", "1", "--steps", "4"), cwd=REPO, capture_output=True, text=True, timeout=240)
        return done.returncode, done.stdout + done.stderr

    blocked, metrics = tmp_path / "runs" / "etr-seed1", tmp_path / "runs" / "grpo-seed1" / "metrics.jsonl"
    blocked.parent.mkdir()
    blocked.write_text("a file where the run's directory should be")
    code, printed = start()
    assert code == 1
    assert "etr-seed1 FAILED with exit code 2" in printed
    assert f"last lines:\nerror: {blocked}" in printed  # what the product said about it
    assert "- etr, seed 1: missing: not started" in printed
    finished = metrics.read_bytes(), metrics.stat().st_mtime_ns

    blocked.unlink()
    code, printed = start()
    assert code == 0, printed
    assert "2 runs, 1 of them finished before" in printed
    assert (metrics.read_bytes(), metrics.stat().st_mtime_ns) == finished
    found = json.loads((tmp_path / "one.json").read_text())
    first = {run["preset"]: run["evaluations"][0] for run in found["runs"]}
    assert first["grpo"] == first["etr"]  # one warm start
    assert [[step for step, _ in run["evaluations"]] for run in found["runs"]] == [[0, 2, 4], [0, 2, 4]]


@pytest.mark.slow
def test_killed_outright_it_leaves_no_process(command: Callable[..., list[str]], tmp_path: Path) -> None:
    line = command("--seeds", "1", "--steps", "500")
    process = subprocess.Popen(line, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: all((tmp_path / "runs" / f"{p}-seed1" / "metrics.jsonl").exists() for p in ("grpo", "etr")))
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4  # two launchers, their ranks, and the ranks' graders
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
