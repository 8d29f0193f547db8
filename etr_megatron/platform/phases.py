"""Deadlines that name who is missing: ranks meet at the start of every phase of a step."""

from __future__ import annotations

import datetime
import re

import torch.distributed as dist


class Phases:
    """A control group on gloo, whatever the policy's backend, on which ranks meet.

    phases = Phases(timeout_s=1800)
    phases.meet("rollout of step 12")
    """

    def __init__(self, timeout_s: float) -> None:
        """A collective: every rank creates it."""
        self._timeout = datetime.timedelta(seconds=timeout_s)
        # The world may be NCCL, which has no monitored barrier.
        self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def meet(self, phase: str) -> None:
        """Wait for every rank to arrive. Raises TimeoutError naming the phase and the ranks that are missing."""
        try:
            dist.monitored_barrier(self._group, timeout=self._timeout, wait_all_ranks=True)
        except RuntimeError as error:
            missing = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
            who = f"rank {missing[1]}" if missing else "rank 0 or another"
            raise TimeoutError(
                f"rank {dist.get_rank()} waited {self._timeout.total_seconds():g} s at the {phase} for {who}"
            ) from error
