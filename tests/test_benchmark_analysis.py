"""The analysis in benchmarks/etr_vs_grpo.py: statistics, which runs count, differences, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import experiment_report
from benchmarks.etr_vs_grpo import OVERRIDES, main
from benchmarks.experiment_analysis import (
    RunResult,
    analyse,
    analyse_again,
    analyse_run,
    curve,
    interval,
    mean_curve,
    t_quantile,
)
from benchmarks.experiment_environment import environment
from benchmarks.experiment_runs import REPO, Experiment, Run, keep_record, shared_settings

STEPS = 4


def row(step: int, **values: Any) -> dict[str, Any]:
    """The columns that the analysis reads; by default 1.5% of the tokens are clipped."""
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
    assert t_quantile(500) == t_quantile(30) > 1.96  # beyond the table: too wide rather than too narrow


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


# A run's figures, and whether the run counts


def test_figures_of_a_run_by_hand() -> None:
    rows = [row(step, reward_mean=step / 100, entropy=1 / step) for step in range(1, 21)]
    for one in rows:
        one["clip_frac_upper"] = 0.02 if one["step"] % 2 else 0.0
        one["clip_frac_lower"] = 0.03 if one["step"] <= 5 else 0.01
        one["clip_radius_mean"] = 0.1 if one["step"] <= 15 else 0.3
    rows[0]["eval_accuracy_start"] = 0.9  # not part of any figure: measured before the preset has any effect
    rows[7]["eval_accuracy"], rows[15]["eval_accuracy"], rows[19]["eval_accuracy"] = 0.4, 0.9, 0.8
    figures = {"final_accuracy": 0.8, "accuracy_area": 0.7, "clip_upper": 0.01, "clip_lower": 0.015, "radius": 0.15}
    last = {"final_reward": 0.195, "final_entropy": (1 / 19 + 1 / 20) / 2}  # steps 19 and 20: the last tenth
    assert analyse_run(Run("etr", 3), rows, 20).figures == pytest.approx(figures | last)


@pytest.mark.parametrize(("lower", "state"), [(0.0039, "void"), (0.0041, "ok")])
def test_a_run_with_under_one_percent_of_tokens_clipped_is_void(lower: float, state: str) -> None:
    one = result("etr", 1, clip_frac_upper=0.006, clip_frac_lower=lower)
    assert one.state == state
    assert one.reason == ("0.99% of the tokens clipped" if state == "void" else "")


def test_a_loss_without_a_clip_range_is_never_void() -> None:
    assert result("rloo", 1, clip_frac_upper=0.0, clip_frac_lower=0.0).state == "ok"
    assert result("cispo", 1, clip_frac_upper=0.0, clip_frac_lower=0.0).state == "void"


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


def test_a_preset_is_compared_with_its_control_too_where_both_were_run() -> None:
    accuracies = {"grpo": (0.1, 0.6, 0.35), "etr": (0.3, 0.8, 0.55), "etr_matched": (0.29, 0.77, 0.53), "dapo": (0.5, 0.5, 0.5)}
    results = [result(preset, seed, one) for preset, some in accuracies.items() for seed, one in enumerate(some, start=1)]
    results[-4] = result("etr_matched", 3, 0.53, clip_frac_upper=0.0)  # void: no pair under seed 3
    analysis = analyse(results, "grpo")
    assert "etr_matched" in analysis["differences"]
    (control,) = analysis["controls"]
    assert (control["preset"], control["baseline"], control["seeds"]) == ("etr", "etr_matched", [1, 2])
    assert control["figures"]["final_accuracy"]["mean"] == pytest.approx(0.02)  # 0.01, 0.03
    assert analyse([one for one in results if one.run.preset != "etr"], "grpo")["controls"] == []
    other = analyse(results, "grpo", [("dapo", "etr"), ("dapo", "rloo")])["controls"]
    assert [(one["preset"], one["baseline"]) for one in other] == [("dapo", "etr")]


# Reports on existing runs


def write_run(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Three seeds of grpo, etr (better) and dapo (equal on average); seed 2 of dapo is void."""
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


def test_report_compares_with_a_control_and_its_tables_can_be_written_again_from_the_file(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, base in ((1, 0.3), (2, 0.5), (3, 0.7)):
        write_run(finished, f"etr_matched-seed{seed}", rows_of(base + 0.09))
    out = tmp_path / "one.json"
    assert report(finished, out, "grpo,etr,etr_matched") == 0
    text = out.with_suffix(".md").read_text()
    assert "| etr - etr_matched | 3 | +0.012 (+0.010 to +0.014): higher |" in text  # 0.011, 0.012, 0.013
    assert "- etr against etr_matched, held-out accuracy at the end, pairs 3: +0.012 (+0.010 to +0.014): higher." in text
    older = {key: value for key, value in json.loads(out.read_text()).items() if key not in ("controls", "presets")}
    out.write_text(json.dumps(older))
    out.with_suffix(".md").unlink()
    assert experiment_report.main([str(out)]) == 0
    assert out.with_suffix(".md").read_text() == text
    out.write_text("{}")
    assert experiment_report.main([str(out)]) == experiment_report.main([]) == experiment_report.main(["none.json"]) == 2
    assert out.with_suffix(".md").read_text() == text
    assert capsys.readouterr().err.count("error: ") == 3


def test_the_published_tables_are_those_of_the_published_result() -> None:
    published = REPO / "benchmarks" / "results" / "etr_vs_grpo.json"
    found = json.loads(published.read_text())
    again = analyse_again(found)
    assert all(again[key] == found[key] for key in ("presets", "differences"))
    wanted = experiment_report.markdown(again)
    assert published.with_suffix(".md").read_text() == wanted, f"run: python -m benchmarks.experiment_report {published}"


def test_report_names_missing_runs_and_ends_with_1(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "one.json"
    with (finished / "grpo-seed2" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "torn')  # killed in mid-write: a finished run still counts as finished
    assert report(finished, out, "grpo,etr,etr_matched", seeds=1) == 1
    text = out.with_suffix(".md").read_text()
    assert "- etr_matched, seed 1: missing: not started; left out." in text
    assert "| etr_matched | 0 | too few pairs |" in text
    assert "| etr_matched | 0 of 1 | 0 | - |" in text
    assert report(finished, out, "grpo,etr", seeds=2) == 0
    assert report(finished, finished / "grpo-seed1" / "metrics.jsonl" / "one.json") == 2
    assert "--out" in capsys.readouterr().err
