"""Deadlines that name who is missing: ranks meet at the start of every phase of a step."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable

import torch
import torch.distributed as dist


class StopAskedError(RuntimeError):
    """Some rank was told to stop (see `StopRequest`); raised on every rank, at the same meeting."""


class Phases:
    """A control group on gloo, whatever the policy's backend, on which ranks meet.

    phases = Phases(timeout_s=1800, must_stop=request)
    phases.meet("rollout of step 12")

    must_stop: whether this rank was told to stop.
    """

    def __init__(self, timeout_s: float, must_stop: Callable[[], bool] = lambda: False) -> None:
        """A collective: every rank creates it."""
        self._timeout, self._must_stop, self._stopping = datetime.timedelta(seconds=timeout_s), must_stop, False
        # The world may be NCCL, which has no monitored barrier.
        self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def meet(self, phase: str) -> None:
        """Wait for every rank to arrive.

        Raises TimeoutError naming the phase and the ranks that are missing, and StopAskedError when a rank must stop: once,
        so that ranks can still meet to save.
        """
        try:
            dist.monitored_barrier(self._group, timeout=self._timeout, wait_all_ranks=True)
        except RuntimeError as error:
            missing = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
            who = f"rank {missing[1]}" if missing else "rank 0 or another"
            raise TimeoutError(
                f"rank {dist.get_rank()} waited {self._timeout.total_seconds():g} s at the {phase} for {who}"
            ) from error
        asked = torch.tensor(int(self._must_stop() and not self._stopping))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        if asked:
            self._stopping = True
            raise StopAskedError(f"told to stop (SIGTERM) before the {phase}")
