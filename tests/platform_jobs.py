"""Jobs that gang ranks run for the tests of the platform."""

from __future__ import annotations

import datetime

import torch.distributed as dist

from etr_megatron.data import ProblemSet
from etr_megatron.errors import UserError
from etr_megatron.platform.phases import PhaseBarriers, StopAskedError
from etr_megatron.problem_sets import refuse_other_problems
from etr_megatron.types import Problem
from tests.hang import Hang


def meet_without(missing: int) -> str:
    """Result on this rank if the rank `missing` does not come (-1: all come)."""
    phases, hang = PhaseBarriers(timeout_s=60), Hang()
    if missing >= 0:
        phases._timeout = datetime.timedelta(seconds=2)
    if dist.get_rank() == missing:
        hang()  # alive, but not in the meeting
        return "absent"
    try:
        phases.barrier("rollout of step 7")
    except TimeoutError as error:
        hang.given_up()
        return str(error)
    return "met"


def stopped_once(told: int) -> list[str]:
    """Results of four meetings on this rank; the rank `told` is asked to stop before the second. Then meets without asking."""
    asked = [False]
    phases, saving = (PhaseBarriers(timeout_s=60, must_stop=lambda: asked[0] and dist.get_rank() == told) for _ in range(2))
    seen = []
    for number in range(4):
        asked[0] = number > 0
        try:
            phases.barrier(f"step {number}")
            seen.append("met")
        except StopAskedError as error:
            seen.append(str(error))
    saving.ignore_stop_requests()
    saving.barrier("save")
    return seen


def other_problems(changed: str, rank: int) -> str:
    """The error on this rank if `rank` has another answer in the set `changed`."""
    sets = {}
    for key in ("data.train", "data.eval.aime24"):
        answer = "43" if dist.get_rank() == rank and key == changed else "42"
        sets[key] = ProblemSet([Problem("a", "6 times 7?", answer, [1, 2])])
    try:
        refuse_other_problems(sets)
    except UserError as error:
        return str(error)
    return ""
