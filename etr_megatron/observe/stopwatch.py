"""Time of a step by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NotRequired, TypedDict, get_args

Phase = Literal["rollout", "reward", "train", "sync"]
Part = Literal["logprobs", "reference", "update"]
"""Parts of the training phase."""


_PART_KEYS: dict[Part, Literal["time_logprobs", "time_reference", "time_update"]] = {
    "logprobs": "time_logprobs",
    "reference": "time_reference",
    "update": "time_update",
}


class StepTimes(TypedDict):
    """Seconds; `time_step` also includes evaluation, checkpoints and bookkeeping."""

    time_rollout: float
    time_reward: float
    time_train: float
    time_sync: float
    time_step: float
    time_logprobs: NotRequired[float]  # parts of `time_train`, if there were any
    time_reference: NotRequired[float]
    time_update: NotRequired[float]


class Stopwatch:
    """Wall-clock time of this process, per phase.

        watch = Stopwatch()
        with watch.phase("rollout"):
            ...
        times = watch.lap()     # {"time_rollout": 1.2, ..., "time_step": 3.4}; the next step starts here

    CUDA work still queued when a block ends counts in the phase where the host waits for it, so a phase should end with a
    synchronization (all four do: they return Python numbers or wait for other ranks).
    """

    def __init__(self) -> None:
        self._seconds: dict[Phase, float] = dict.fromkeys(get_args(Phase), 0.0)
        self._parts: dict[Part, float] = {}
        self._running: Phase | None = None
        self._step_started = time.perf_counter()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the block's duration to `name`, even if it raises; phases must not nest (`RuntimeError`)."""
        if self._running is not None:
            raise RuntimeError(f"phase {name!r} inside phase {self._running!r}: its time would count twice")
        self._running = name
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started
            self._running = None

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Add the block's duration to this part of the running phase. The block should end with a synchronization too."""
        started = time.perf_counter()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - started

    def lap(self) -> StepTimes:
        """Return the times since the last lap and restart at zero."""
        now = time.perf_counter()
        seconds, self._seconds = self._seconds, dict.fromkeys(get_args(Phase), 0.0)
        parts, self._parts = self._parts, {}
        step, self._step_started = now - self._step_started, now
        times = StepTimes(
            time_rollout=seconds["rollout"],
            time_reward=seconds["reward"],
            time_train=seconds["train"],
            time_sync=seconds["sync"],
            time_step=step,
        )
        for part, spent in parts.items():
            times[_PART_KEYS[part]] = spent
        return times
