"""Barriers at the start of every phase of a step. On a timeout the error names the missing ranks."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable

import torch
import torch.distributed as dist


class StopAskedError(RuntimeError):
    """A rank was asked to stop (see `StopRequest`). Raised on every rank, at the same barrier."""


class PhaseBarriers:
    """Barriers on a gloo control group, independent of the policy's backend.

    phases = PhaseBarriers(timeout_s=1800, must_stop=request)
    phases.barrier("rollout of step 12")

    must_stop: whether this rank was asked to stop.
    """

    def __init__(self, timeout_s: float, must_stop: Callable[[], bool] = lambda: False) -> None:
        """A collective: every rank must create it."""
        self._timeout, self._must_stop, self._stopping = datetime.timedelta(seconds=timeout_s), must_stop, False
        # The world's backend may be NCCL, which has no monitored barrier.
        self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    @property
    def group(self) -> dist.ProcessGroup:
        """The group, for other collectives between two barriers."""
        return self._group

    def all_reduce_max(self, number: int) -> int:
        """The highest `number` of any rank. A collective."""
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return int(found)

    def ignore_stop_requests(self) -> None:
        """Stop raising StopAskedError. Call it when every rank knows that the run stops, and only saves."""
        self._stopping = True

    def barrier(self, phase: str, within_s: float | None = None) -> None:
        """Wait for every rank to arrive, for at most `within_s` seconds (default: `timeout_s`).

        Raises, with the phase, the ranks and the seconds waited, TimeoutError if some ranks did not arrive in time, and
        ConnectionError if they are gone. Raises StopAskedError if a rank must stop, but only once, so that ranks can still save
        together.
        """
        start = time.monotonic()
        timeout = self._timeout if within_s is None else datetime.timedelta(seconds=within_s)
        try:
            dist.monitored_barrier(self._group, timeout=timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise self._failure(phase, time.monotonic() - start, timeout, str(error)) from error
        if self.all_reduce_max(int(self._must_stop() and not self._stopping)):
            self._stopping = True
            raise StopAskedError(f"told to stop (SIGTERM) before the {phase}")

    def _failure(self, phase: str, waited_s: float, timeout: datetime.timedelta, said: str) -> TimeoutError | ConnectionError:
        missing = re.search(r"Ranks? ([\d, ]+) failed to pass", said)
        # Rank 0's error names the ranks that did not arrive. If it comes before the deadline, connections were closed.
        if waited_s < 0.99 * timeout.total_seconds() or "closed by peer" in said or "reset by peer" in said:
            who = f"rank {missing[1]}" if missing else "rank 0, which may have lost another"
            return ConnectionError(
                f"rank {dist.get_rank()} lost its connection to {who} at the {phase}, after {waited_s:.0f} s"
            )
        who = f"rank {missing[1]}" if missing else "rank 0 or another"
        return TimeoutError(f"rank {dist.get_rank()} waited {waited_s:.0f} s at the {phase} for {who}")
