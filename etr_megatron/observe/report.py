"""Report of a finished (or running) run in a dozen lines, and its curves as one picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from etr_megatron.errors import UserError
from etr_megatron.observe.metrics import SET_PREFIX, TRAIN_SET_PREFIX, MetricsRow, keys_by_set
from etr_megatron.observe.progress import format_seconds
from etr_megatron.observe.run_directory import RunDirectory

_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward_mean",)),
    ("held-out accuracy", ("eval_accuracy",)),
    ("clipped tokens", ("clip_frac_upper", "clip_frac_lower")),
    ("clip radius", ("clip_radius_p10", "clip_radius_mean", "clip_radius_p90")),
    ("effective sample size", ("effective_sample_size",)),
    ("entropy (nats)", ("entropy",)),
    ("engine/trainer gap (nats)", ("logprob_gap_mean",)),
    ("seconds per step", ("time_rollout", "time_reward", "time_train", "time_sync")),
)


_SUMMARISED = ("reward_mean", "tokens_per_s", "time_step", "truncated", "zero_variance_groups", "reward_timeouts")
"""Keys in every row, including those of rollout-only runs."""


def load_rows(run: Path) -> list[MetricsRow]:
    """The rows of the run directory `run`; raises `UserError` if there are none or one has missing or non-numeric values."""
    path = RunDirectory(run).metrics.path
    if run.is_file():
        raise UserError(f"{run} is a file; give the directory of a run, such as {run.parent}")
    if not path.exists():
        raise UserError(f"{path} does not exist; give the directory of a run, such as runs/<run.name>")
    rows = RunDirectory(run).metrics.rows()
    if not rows:
        raise UserError(f"{path} has no rows yet; wait for the first step")
    for row in rows:
        for key in (*_SUMMARISED, *row):
            if key not in row or not isinstance(row.get(key), int | float | None):
                raise UserError(f"{path}: {key} of step {row['step']} is missing or not a number; fix or remove the line")
    return rows


def summary(rows: list[MetricsRow]) -> str:
    """The report's text; a tenth is at least one step, means ignore values that were not finite."""
    tenth = max(1, len(rows) // 10)
    first_rows, last_rows = rows[:tenth], rows[-tenth:]
    training, held_out = _sets(rows, TRAIN_SET_PREFIX, "reward_mean"), _sets(rows, SET_PREFIX, "accuracy")
    trained = [row for row in rows if "loss" in row]
    upper, lower = _mean(row.get("clip_frac_upper") for row in trained), _mean(row.get("clip_frac_lower") for row in trained)
    clipped = f"clipped tokens    {_percent(upper)} at the upper bound, {_percent(lower)} at the lower"
    tokens = sum((row["tokens_per_s"] or 0) * (row["time_step"] or 0) for row in rows)
    lines = [
        f"steps             {rows[0]['step']} to {rows[-1]['step']} ({len(rows)} rows)",
        f"reward            {_change('reward_mean', first_rows, last_rows)}",
        *(f"  {name:<15} {_change(key, first_rows, last_rows)}" for name, key in training.items()),
        f"eval accuracy     {_evaluations(rows, 'eval_accuracy')}",
        *(f"  {name:<15} {_evaluations(rows, key)}" for name, key in held_out.items()),
        *([f"eval pass@k       {_evaluations(rows, 'eval_pass_at_k')}"] if _points(rows, "eval_pass_at_k") else []),
        *([clipped] if trained else []),
        f"response tokens   {tokens:,.0f}",
        f"time              {format_seconds(sum(row['time_step'] or 0 for row in rows))}",
        f"truncated         {_count(sum(row['truncated'] or 0 for row in rows), 'sample')}",
        f"zero variance     {_count(sum(row['zero_variance_groups'] or 0 for row in rows), 'group')}",
        f"reward timeouts   {sum(row['reward_timeouts'] or 0 for row in rows)}",
    ]
    if errors := sum(row["reward_errors"] or 0 for row in rows):
        lines.append(f"reward errors     {errors}")
    failed = sum(row.get("environment_errors") or 0 for row in rows)
    stuck = sum(row.get("environment_timeouts") or 0 for row in rows)
    if failed or stuck:
        lines.append(f"environment       {_count(failed, 'error')}, {_count(stuck, 'timeout')}")
    return "\n".join(lines)


def plot(rows: list[MetricsRow], path: Path) -> None:
    """Draw the curves to the PNG file `path`; raises `UserError` if matplotlib is missing or the file cannot be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--png needs matplotlib, which is not installed; `pip install matplotlib` into .venv")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, keys) in zip(figure.subplots(2, 4).flat, _PANELS, strict=True):
        for key in keys:
            points = _points(rows, key)
            axes.plot([step for step, _ in points], [value for _, value in points], label=key)
        axes.set_title(title)
        axes.set_xlabel("step")
        if len(keys) > 1:
            axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"--png {path}: cannot be written ({error.strerror})") from error


def _points(rows: list[MetricsRow], key: str) -> list[tuple[int, float]]:
    points: list[tuple[int, float]] = []
    for row in rows:
        values: dict[str, Any] = dict(row)
        if values.get(f"{key}_start") is not None:
            points.append((row["step"] - 1, values[f"{key}_start"]))
        if values.get(key) is not None:
            points.append((row["step"], values[key]))
    return points


def _sets(rows: list[MetricsRow], prefix: str, metric: str) -> dict[str, str]:
    """`keys_by_set` of all rows."""
    return {name: key for row in rows for name, key in keys_by_set(row, prefix, metric).items()}


def _evaluations(rows: list[MetricsRow], key: str) -> str:
    points = _points(rows, key)
    if not points:
        return "not evaluated"
    (first_step, first), (last_step, last) = points[0], points[-1]
    best_step, best = max(points, key=lambda point: (point[1], point[0]))
    text = f"{_number(first)} (step {first_step}) to {_number(last)} (step {last_step})"
    return text if best == last else f"{text}, best {_number(best)} (step {best_step})"


def _change(key: str, first: list[MetricsRow], last: list[MetricsRow]) -> str:
    """Means over the rows of a run's first and last tenth; rows without groups of a training set lack its keys."""
    tenths = []
    for rows in (first, last):
        values: list[dict[str, Any]] = [dict(row) for row in rows if key in row]
        tenths.append(_number(_mean(row[key] for row in values)) if values else "no groups")
    return f"first tenth {tenths[0]}, last tenth {tenths[1]}"


def _mean(values: Iterable[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if finite else None


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2%}"
