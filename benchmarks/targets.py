"""What the benchmarks' reports have in common: the figures of a contestant's times, and targets that are met or missed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """text: what is compared. value: what was measured. limit: the largest that meets the target."""

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
    """Median, minimum and spread (maximum minus minimum) of the passes, in seconds, and the passes themselves."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "spread_s": max(seconds) - min(seconds),
        "seconds": seconds,
    }
