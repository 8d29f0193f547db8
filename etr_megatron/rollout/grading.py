"""The rewards of responses that are graded while others are generated, and while the ranks train."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from etr_megatron.reward import Grade, GradeRequest
from etr_megatron.rollout.collect import grade_request, refuse_outside, saved_first
from etr_megatron.rollout.pending_group import PendingGroup
from etr_megatron.types import Sample


class StreamingGrader(Protocol):
    """The part of `GraderPool` that is used here."""

    def submit(self, requests: Sequence[GradeRequest]) -> list[int]:
        """See `GraderPool.submit`."""
        ...

    def poll(self, keys: AbstractSet[int], timeout_s: float) -> dict[int, Grade]:
        """See `GraderPool.poll`."""
        ...


class Grading:
    """The responses of a `RolloutBuffer` that are being graded."""

    def __init__(self, grader: StreamingGrader) -> None:
        self._grader = grader
        self._pending: dict[int, tuple[PendingGroup, Sample]] = {}
        self._known: set[int] = set()  # id(sample) of those

    @property
    def is_pending(self) -> bool:
        """Whether `poll` has grades to wait for."""
        return bool(self._pending)

    def submit(self, ended: Sequence[tuple[PendingGroup, Sample]]) -> None:
        """Have responses graded that have ended, except those that have a reward or are being graded.

        Raises UngradedError if `reward.function` can no longer be loaded.
        """
        new = [(held, sample) for held, sample in ended if sample.reward is None and id(sample) not in self._known]
        if not new:
            return
        with saved_first():
            keys = self._grader.submit([grade_request(held.group.problem, sample) for held, sample in new])
        self._pending |= zip(keys, new, strict=True)
        self._known |= {id(sample) for _, sample in new}

    def poll(self, timeout_s: float) -> list[tuple[PendingGroup, Sample, Grade]]:
        """The grades that have arrived since the last call; waits up to `timeout_s` for at least one if there are any to come.

        Raises UngradedError if `reward.function` can no longer be loaded, or a reward is outside the configured range. The
        responses whose grades had arrived then have none, and can be submitted again.
        """
        if not self._pending:
            return []
        with saved_first():
            grades = self._grader.poll(self._pending.keys(), timeout_s)
        found = [(*self._pending.pop(key), grade) for key, grade in grades.items()]
        self._known -= {id(sample) for _, sample, _ in found}
        refuse_outside([(grade, held.group.problem.id) for held, _, grade in found])
        return found
