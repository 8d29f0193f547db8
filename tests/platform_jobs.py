"""What gang ranks run for the platform's tests."""

from __future__ import annotations

import time

import torch.distributed as dist

from etr_megatron.platform.phases import Phases


def meet_without(missing: int) -> str:
    """What a rank sees when the rank `missing` does not come (-1: all come)."""
    phases = Phases(timeout_s=2)
    if dist.get_rank() == missing:
        time.sleep(4)  # alive, but elsewhere
        return "absent"
    try:
        phases.meet("rollout of step 7")
    except TimeoutError as error:
        return str(error)
    return "met"
