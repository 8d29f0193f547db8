"""Analysis of an experiment: figures per run, means with confidence intervals, paired differences by seed.

Confidence intervals are 95% intervals of Student's t distribution over seeds: mean +- t(0.975, n - 1) s / sqrt(n), where s is
the sample standard deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.experiment_runs import Run
from etr_megatron.config.presets import PRESETS

VOID_BELOW = 0.01
"""A run that clipped a smaller share of its tokens is void: it shows nothing about clip ranges."""

CONTROLS = tuple(("etr", control) for control in ("etr_matched", "etr_shuffled", "etr_inverted_macro"))
"""(preset, second baseline): a claim about elastic ranges must hold against these as well as against a fixed range."""

FIGURES: dict[str, str] = {
    "final_accuracy": "held-out accuracy at the end",
    "accuracy_area": "mean of the accuracy curve",
    "final_reward": "training reward at the end",
    "final_entropy": "entropy at the end (nats)",
    "clip_upper": "clipped, upper side",
    "clip_lower": "clipped, lower side",
    "radius": "mean radius",
}
"""Key in the result -> heading."""

CURVES: dict[str, str] = {
    "eval_accuracy": "held-out accuracy",
    "reward_mean": "training reward",
    "entropy": "policy entropy (nats per token)",
}
"""Column of metrics.jsonl -> title of its panel."""

_COLUMNS = (*CURVES, "clip_frac_upper", "clip_frac_lower", "clip_radius_mean")

# fmt: off
_T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314,
    2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)
# fmt: on

State = Literal["ok", "void", "missing", "not finite"]


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values and its 95% confidence interval; `mean` is None without values, `half` with fewer than two."""

    n: int
    mean: float | None = None
    half: float | None = None

    @property
    def low(self) -> float | None:
        """Lower bound."""
        return None if self.mean is None or self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper bound."""
        return None if self.mean is None or self.half is None else self.mean + self.half

    @property
    def verdict(self) -> str:
        """What an interval of differences says; an interval that touches 0 contains it."""
        if self.low is None or self.high is None:
            return "too few pairs"
        if self.low <= 0.0 <= self.high:
            return "no difference shown"
        return "higher" if self.low > 0.0 else "lower"


@dataclass(frozen=True)
class RunResult:
    """One run: whether it counts, why not, and its figures (none if it is missing or not finite)."""

    run: Run
    state: State
    reason: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()


def t_quantile(df: int) -> float:
    """0.975 quantile of Student's t. Above 30 degrees of freedom, the value for 30, which is too large by at most 0.083.

    Raises ValueError for df < 1.
    """
    if df < 1:
        raise ValueError(f"t distribution with {df} degrees of freedom")
    return _T_975[min(df, len(_T_975)) - 1]


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% confidence interval of independent values."""
    n = len(values)
    if n < 2:
        return Interval(n, values[0] if n else None)
    return Interval(n, statistics.fmean(values), t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n))


def analyse_run(run: Run, rows: Sequence[Mapping[str, Any]], steps: int) -> RunResult:
    """Figures of a run from its rows of metrics.jsonl.

    Status: "missing" without the row of step `steps`; "not finite" with a null in a column that is used; "void" if the loss has
    a clip range and clipped less than `VOID_BELOW` of the tokens, in the mean over steps.
    """
    done = rows[-1]["step"] if rows else 0
    if done < steps:
        return RunResult(run, "missing", f"step {done} of {steps}" if done else "not started")
    for row in rows:
        for column in _COLUMNS:
            if column in row and row[column] is None:
                return RunResult(run, "not finite", f"{column} at step {row['step']}")
    figures = _figures(rows)
    clipped = figures["clip_upper"] + figures["clip_lower"]
    if clipped < VOID_BELOW and PRESETS[run.preset]["loss"] != "reinforce":
        return RunResult(run, "void", f"{clipped:.2%} of the tokens clipped", figures, rows)
    return RunResult(run, "ok", "", figures, rows)


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A run's figures. "At the end" is the mean over the last tenth of the steps (at least one), as single steps are noisy."""
    last = rows[-max(1, len(rows) // 10) :]
    evaluations = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]

    def mean(column: str, of: Sequence[Mapping[str, Any]] = rows) -> float:
        return statistics.fmean(row[column] for row in of)

    return {
        "final_accuracy": evaluations[-1],
        "accuracy_area": statistics.fmean(evaluations),
        "final_reward": mean("reward_mean", last),
        "final_entropy": mean("entropy", last),
        "clip_upper": mean("clip_frac_upper"),
        "clip_lower": mean("clip_frac_lower"),
        "radius": mean("clip_radius_mean"),
    }


def curve(rows: Sequence[Mapping[str, Any]], column: str) -> dict[int, float]:
    """Step -> value of a column; the evaluation before the first update is at step 0."""
    points: dict[int, float] = {}
    for row in rows:
        if column == "eval_accuracy" and "eval_accuracy_start" in row:
            points[row["step"] - 1] = row["eval_accuracy_start"]
        if column in row:
            points[row["step"]] = row[column]
    return points


def mean_curve(results: Sequence[RunResult], preset: str, column: str) -> dict[int, Interval]:
    """Step -> mean and interval over the preset's runs that count."""
    curves = [curve(one.rows, column) for one in counted(results, preset)]
    return {step: interval([one[step] for one in curves]) for step in (curves[0] if curves else {})}


def counted(results: Sequence[RunResult], preset: str) -> list[RunResult]:
    """The preset's runs that take part in comparisons."""
    return [one for one in results if one.run.preset == preset and one.state == "ok"]


def paired_seeds(results: Sequence[RunResult], preset: str, baseline: str) -> list[int]:
    """Seeds for which both presets have a run that counts: same data order, same sampling seeds."""
    ours = {one.run.seed for one in counted(results, preset)}
    return sorted(ours & {one.run.seed for one in counted(results, baseline)})


def paired_difference(results: Sequence[RunResult], preset: str, baseline: str, figure: str) -> Interval:
    """preset - baseline, seed by seed."""
    by_run = {one.run: one.figures for one in results}
    return interval(
        [
            by_run[Run(preset, seed)][figure] - by_run[Run(baseline, seed)][figure]
            for seed in paired_seeds(results, preset, baseline)
        ]
    )


def analyse(results: Sequence[RunResult], baseline: str, controls: Sequence[tuple[str, str]] = CONTROLS) -> dict[str, Any]:
    """Everything in the tables and the JSON, as plain data: `presets`, `differences` to the baseline, `controls`, `runs`.

    controls: (preset, second baseline) pairs. The list `controls` in the result has the pairs whose two presets were both run.
    """
    presets = list(dict.fromkeys(one.run.preset for one in results))
    return {
        "presets": {preset: _preset(results, preset) for preset in presets},
        "differences": {preset: _differences(results, preset, baseline) for preset in presets if preset != baseline},
        "controls": [
            {"preset": preset, "baseline": control, **_differences(results, preset, control)}
            for preset, control in controls
            if {preset, control} <= set(presets)
        ],
        "runs": [_run(one) for one in results],
    }


def analyse_again(result: Mapping[str, Any]) -> dict[str, Any]:
    """Recompute everything in a written result from the figures of each run that it holds."""
    results = [
        RunResult(Run(one["preset"], one["seed"]), one["state"], one["reason"], one["figures"]) for one in result["runs"]
    ]
    return {**result, **analyse(results, result["baseline"]), "runs": result["runs"]}


def _preset(results: Sequence[RunResult], preset: str) -> dict[str, Any]:
    runs = [one for one in results if one.run.preset == preset]
    ok = counted(results, preset)
    left_out = {state: [one.run.seed for one in runs if one.state == state] for state in ("void", "missing", "not finite")}
    figures = {key: _plain(interval([one.figures[key] for one in ok])) for key in FIGURES}
    return {"runs": len(runs), "counted": len(ok), **left_out, "figures": figures}


def _differences(results: Sequence[RunResult], preset: str, baseline: str) -> dict[str, Any]:
    differences = {key: paired_difference(results, preset, baseline, key) for key in FIGURES}
    return {
        "seeds": paired_seeds(results, preset, baseline),
        "figures": {key: {**_plain(one), "verdict": one.verdict} for key, one in differences.items()},
    }


def _plain(one: Interval) -> dict[str, Any]:
    return {"n": one.n, "mean": one.mean, "low": one.low, "high": one.high}


def _run(one: RunResult) -> dict[str, Any]:
    return {
        "preset": one.run.preset,
        "seed": one.run.seed,
        "state": one.state,
        "reason": one.reason,
        "figures": dict(one.figures),
        "evaluations": [[step, value] for step, value in curve(one.rows, "eval_accuracy").items()],
        "seconds": round(sum(row["time_step"] for row in one.rows)),
    }
