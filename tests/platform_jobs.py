"""What gang ranks run for the platform's tests."""

from __future__ import annotations

import time

import torch.distributed as dist

from etr_megatron.platform.phases import Phases, StopAskedError


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


def stopped_once(told: int) -> list[str]:
    """What a rank sees at four meetings where the rank `told` is told to stop before the second; it may save without."""
    asked = [False]
    phases, saving = (Phases(timeout_s=60, must_stop=lambda: asked[0] and dist.get_rank() == told) for _ in range(2))
    seen = []
    for number in range(4):
        asked[0] = number > 0
        try:
            phases.meet(f"step {number}")
            seen.append("met")
        except StopAskedError as error:
            seen.append(str(error))
    saving.stop_asking()
    saving.meet("save")
    return seen
