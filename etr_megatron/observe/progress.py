"""Progress of the run: a bar on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
import time
from typing import NoReturn

from tqdm import tqdm

from etr_megatron.observe.metrics import MetricsRow, set_accuracies


class Progress:
    """Reward, entropy, tokens/s and the time left, on the standard error stream.

    progress = Progress(total=100, done=25)     # a run resumed after step 25
    progress.update(row)
    progress.close()
    """

    def __init__(self, total: int, done: int = 0) -> None:
        """`total` and `done` count steps; the time left is estimated from the steps seen here."""
        self._total, self._done_before = total, done
        self._started = time.monotonic()
        self._bar: tqdm[NoReturn] | None = None  # used without an iterable
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def update(self, row: MetricsRow) -> None:
        """Show the row of the step just finished."""
        entropy = f"entropy {row['entropy']:.3f}, " if "entropy" in row else ""  # absent if nothing is trained
        facts = f"reward {row['reward_mean']:.3f}, {entropy}{row['tokens_per_s']:,.0f} tokens/s"
        if "eval_accuracy" in row:
            facts += f", eval accuracy {row['eval_accuracy']:.3f}"
            each = ", ".join(f"{name} {value:.3f}" for name, value in set_accuracies(row).items())
            facts += f" ({each})" if each else ""
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(row["step"] - self._bar.n)
            return
        left = format_seconds(self._seconds_left(row["step"]))
        print(f"step {row['step']}/{self._total}: {facts}, {left} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()

    def _seconds_left(self, step: int) -> float:
        seen = max(1, step - self._done_before)
        return (time.monotonic() - self._started) / seen * max(0, self._total - step)


def format_seconds(seconds: float) -> str:
    """`45s`, `3m 20s`, `2h 05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
