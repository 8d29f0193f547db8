"""From problems to groups of rewarded samples, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from etr_megatron.reward import Grade, GradeRequest
from etr_megatron.rollout.engine import RolloutEngine, Sampling
from etr_megatron.types import Group, Problem

Grader = Callable[[Sequence[GradeRequest]], list[Grade]]
Decode = Callable[[list[int]], str]


def generate_groups(engine: RolloutEngine, problems: Sequence[Problem], sampling: Sampling, decode: Decode) -> list[Group]:
    """One group per problem, texts filled in by `decode`, rewards not."""
    groups = []
    for problem, samples in zip(problems, engine.generate(problems, sampling), strict=True):
        for sample in samples:
            sample.text = decode(sample.response_ids)
        groups.append(Group(id=f"{problem.id}@{sampling.step}", problem=problem, samples=samples))
    return groups


def grade_groups(groups: Sequence[Group], grader: Grader | None) -> None:
    """Fill in rewards and their status (in place; the caller owns the groups). `grader` is given on rank 0, None elsewhere."""
    samples = [(group.problem, sample) for group in groups for sample in group.samples]
    box: list[list[Grade] | None] = [None]
    if grader is not None:
        box[0] = grader([GradeRequest(problem.prompt, sample.text, problem.answer) for problem, sample in samples])
    dist.broadcast_object_list(box, src=0)
    for (_, sample), grade in zip(samples, box[0], strict=True):
        sample.reward, sample.reward_status = grade.reward, grade.status
