"""From problems to groups of rewarded samples, the same on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch.distributed as dist

from etr_megatron.errors import UserError
from etr_megatron.reward import Grade, GradeRequest
from etr_megatron.rollout.engine import MustStop, RolloutEngine, Sampling, never
from etr_megatron.types import Group, Problem, Sample

logger = logging.getLogger(__name__)

Grader = Callable[[Sequence[GradeRequest]], list[Grade]]
Decode = Callable[[list[int]], str]


def generate_groups(
    engine: RolloutEngine, problems: Sequence[Problem], sampling: Sampling, decode: Decode, must_stop: MustStop = never
) -> list[Group]:
    """One group per problem, texts filled in by `decode`, rewards not. must_stop: see `RolloutEngine.generate`."""
    groups = []
    for problem, samples in zip(problems, engine.generate(problems, sampling, must_stop), strict=True):
        for sample in samples:
            sample.text = decode(sample.response_ids.tolist())
        groups.append(Group(id=f"{problem.id}@{sampling.step}", problem=problem, samples=samples))
    return groups


def grade_groups(groups: Sequence[Group], grader: Grader | None) -> None:
    """Fill in rewards and their status (in place; the caller owns the groups). `grader` is given on rank 0, None elsewhere.

    A collective. Raises UserError as `report_errors` does.
    """
    samples = [(group.problem, sample) for group in groups for sample in group.samples]
    box: list[list[Grade] | None] = [None]
    if grader is not None:
        box[0] = grade_samples(samples, grader)
        report_errors([(grade, problem.id) for grade, (problem, _) in zip(box[0], samples, strict=True)])
    dist.broadcast_object_list(box, src=0)
    for (_, sample), grade in zip(samples, box[0], strict=True):
        sample.reward, sample.reward_status = grade.reward, grade.status


def grade_samples(samples: Sequence[tuple[Problem, Sample]], grader: Grader) -> list[Grade]:
    """Fill in rewards and their status (in place), on this rank alone."""
    grades = grader([GradeRequest(problem.prompt, sample.text, problem.answer) for problem, sample in samples])
    for (_, sample), grade in zip(samples, grades, strict=True):
        sample.reward, sample.reward_status = grade.reward, grade.status
    return grades


def report_errors(grades: Sequence[tuple[Grade, str]]) -> None:
    """Answers that cannot be graded are reported with the first one's reason. grades: of a step, with the problems' ids.

    Raises UserError when none can be: a reward function that always fails must not look like a policy that is always wrong.
    Where all only take too long that is said: a judge that others load as well may be quicker at the next step.
    """
    failed = [(grade, name) for grade, name in grades if grade.status == "error"]
    late = [grade for grade, _ in grades if grade.status == "timeout"]
    if late and len(late) == len(grades):
        logger.warning("none of %d answers was graded, and all count as wrong: %s", len(late), late[0].detail)
    if not failed:
        return
    grade, name = failed[0]
    what = f"{len(failed)} of {len(grades)} answers could not be graded; the first, to problem {name}: {grade.detail}"
    if len(failed) + len(late) == len(grades):
        raise UserError(f"{what}; mend reward.function or the reference answers")
    logger.warning("%s", what)
