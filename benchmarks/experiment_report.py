"""An experiment's result as JSON, as markdown tables, and as a plot of its curves.

`python -m benchmarks.experiment_report benchmarks/results/etr_vs_grpo.json` rewrites the tables from the figures of each run in
the file.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiment_analysis import CURVES, FIGURES, VOID_BELOW, RunResult, analyse_again, mean_curve
from etr_megatron.errors import UserError

_SHARES = ("clip_upper", "clip_lower")
_HEADLINES = ("final_accuracy", "accuracy_area")


def require_matplotlib() -> None:
    """Raise `UserError` if matplotlib is missing: before an hour of runs, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the picture needs matplotlib, which is not installed; `pip install -e '.[test]'` brings it")


def write_report(out: Path, result: Mapping[str, Any], results: Sequence[RunResult]) -> str:
    """Write `out` (JSON) and, beside it, .md and .png; returns the markdown. Raises `UserError` if they cannot be written."""
    text = markdown(result)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
        out.with_suffix(".md").write_text(text)
        plot(results, list(result["presets"]), out.with_suffix(".png"))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): name another file") from error
    return text


def markdown(result: Mapping[str, Any]) -> str:
    """The tables, and sentences on which runs do not count and what the intervals show."""
    baseline, settings = result["baseline"], result["settings"]
    seeds, updates = result["seeds"], settings["train.epochs"] * settings["train.minibatches"]
    parts = [
        "# " + ", ".join(result["presets"]),
        f"The tiny arithmetic task: {settings['run.steps']} steps of {settings['rollout.prompts_per_step']} prompts x "
        f"{settings['rollout.samples_per_prompt']} samples, {updates} optimizer steps each, learning rate "
        f"{settings['train.lr']:g}; seeds {seeds[0]} to {seeds[-1]} from one warm start.\n"
        "Mean over the runs that count +- half the width of its 95% confidence interval (t distribution over seeds).",
        _table(
            ["preset", "runs", "void", *FIGURES.values()], [_mean_row(name, one) for name, one in result["presets"].items()]
        ),
        f"## Differences to {baseline}, paired by seed\n\nMean and 95% confidence interval of preset - {baseline} under the "
        "same seed. The intervals are not corrected for their number: of twenty, one excludes 0 by chance.",
        _table(
            ["preset", "pairs", *FIGURES.values()], [_difference_row(name, one) for name, one in result["differences"].items()]
        ),
        *_controls(result["controls"]),
        "## In words\n\n" + "\n".join([*_verdicts(result), *_left_out(result)]),
        "\n".join(_environment(one) for one in result["environments"]),
    ]
    return "\n\n".join(parts) + "\n"


def _controls(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section on second baselines; empty if none was run."""
    if not pairs:
        return []
    rows = [_difference_row(f"{one['preset']} - {one['baseline']}", one) for one in pairs]
    return [
        "## Differences to controls, paired by seed\n\nMean and 95% confidence interval, as above.",
        _table(["difference", "pairs", *FIGURES.values()], rows),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean_row(preset: str, one: Mapping[str, Any]) -> list[str]:
    cells = [preset, f"{one['counted']} of {one['runs']}", str(len(one["void"]))]
    for key, figure in one["figures"].items():
        if figure["mean"] is None:
            cells.append("-")
        else:
            half = "" if figure["high"] is None else f" +- {_number(key, figure['high'] - figure['mean'])}"
            cells.append(_number(key, figure["mean"]) + half)
    return cells


def _difference_row(name: str, one: Mapping[str, Any]) -> list[str]:
    return [name, str(len(one["seeds"])), *(_difference(key, figure) for key, figure in one["figures"].items())]


def _difference(key: str, figure: Mapping[str, Any]) -> str:
    if figure["low"] is None:
        return figure["verdict"]
    ends = f"{_number(key, figure['low'], '+')} to {_number(key, figure['high'], '+')}"
    return f"{_number(key, figure['mean'], '+')} ({ends}): {figure['verdict']}"


def _number(key: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.2%}" if key in _SHARES else f"{value:{sign}.3f}"


def _verdicts(result: Mapping[str, Any]) -> list[str]:
    differences = [(preset, result["baseline"], one) for preset, one in result["differences"].items()]
    differences += [(one["preset"], one["baseline"], one) for one in result["controls"]]
    return [
        f"- {preset} against {baseline}, {FIGURES[key]}, pairs {len(one['seeds'])}: {_difference(key, one['figures'][key])}."
        for preset, baseline, one in differences
        for key in _HEADLINES
    ]


def _left_out(result: Mapping[str, Any]) -> list[str]:
    """All runs that do not count, by name."""
    meaning = {
        "void": f"void (under {VOID_BELOW:.0%} of its tokens clipped, so its clip range was not at work)",
        "missing": "missing",
        "not finite": "not finite",
    }
    lines = [
        f"- {run['preset']}, seed {run['seed']}: {meaning[run['state']]}: {run['reason']}; left out."
        for run in result["runs"]
        if run["state"] != "ok"
    ]
    return lines or ["- Every run counts: none is void, missing or not finite."]


def _environment(one: Mapping[str, Any]) -> str:
    return (
        f"Run on {one['date']}: {one['cpu']}, {one['cores']} cores, torch {one['torch']}, "
        f"megatron-core {one['megatron_core']}, python {one['python']}, commit {one['commit'] or 'unknown'}."
    )


def plot(results: Sequence[RunResult], presets: Sequence[str], path: Path) -> None:
    """One panel per curve: a line for the mean over the runs that count, a band for its 95% confidence interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (column, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for number, preset in enumerate(presets):
            points = mean_curve(results, preset, column)
            runs = max((one.n for one in points.values()), default=0)
            axes.plot(list(points), [one.mean for one in points.values()], color=f"C{number}", label=f"{preset} (n={runs})")
            band = {step: one for step, one in points.items() if one.half is not None}
            low, high = [one.low for one in band.values()], [one.high for one in band.values()]
            axes.fill_between(list(band), low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        axes.set_title(title)
        axes.set_xlabel("step")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite a result's .md from its JSON file; the plot needs the runs themselves. Returns 2 for a user's mistake."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if len(given) != 1:
            raise UserError("name one result: python -m benchmarks.experiment_report benchmarks/results/etr_vs_grpo.json")
        path = Path(given[0])
        try:
            path.with_suffix(".md").write_text(markdown(analyse_again(json.loads(path.read_text()))))
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of benchmarks.etr_vs_grpo ({error!r})") from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
