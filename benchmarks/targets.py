"""Common parts of the benchmarks' reports: the figures of a contestant's times, and targets that are met or missed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """text: what is compared. value: the measurement. limit: the largest value that meets the target."""

    text: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def as_json(targets: Iterable[Target]) -> list[dict[str, Any]]:
    """Targets for a result file."""
    return [{**asdict(target), "met": target.met} for target in targets]


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median, minimum and spread (maximum minus minimum) of the passes, and the passes themselves, all in seconds."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "spread_s": max(seconds) - min(seconds),
        "seconds": seconds,
    }
