"""Turns problems into groups of rewarded samples, which are the same on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from etr_megatron.errors import UserError
from etr_megatron.reward import Grade, GradeRequest
from etr_megatron.rollout.engine import MustStop, RolloutEngine, Sampling, never
from etr_megatron.rollout.rank0 import on_rank0
from etr_megatron.types import Group, Problem, Sample

logger = logging.getLogger(__name__)

Grader = Callable[[Sequence[GradeRequest]], list[Grade]]
Decode = Callable[[list[int]], str]


class UngradedError(UserError):
    """Rewards are unavailable or not credible until the user fixes something; the policy is unharmed."""


@contextmanager
def saved_first() -> Iterator[None]:
    """Re-raise a UserError as UngradedError, for which the run saves a checkpoint before it ends."""
    try:
        yield
    except UserError as error:
        raise UngradedError(str(error)) from error


LATE_STEPS = 3
"""Steps in a row of which all calls may time out; the last of them stops the run. A shared judge or tool may be slow for a
while."""


class LateSteps:
    """Stops a run if the calls of a user's function time out for all responses of `LATE_STEPS` steps in a row: there is nothing
    to learn. In the steps before, `report_errors` and `Dialogues.report` have warned."""

    def __init__(self, section: Literal["reward", "environment"]) -> None:
        """section: of the function, in the config."""
        self._section = section
        self._last: int | None = None  # the last step with another response, or the one before the first step

    def check(self, step: int, statuses: Iterable[str | None]) -> None:
        """Raise UngradedError if this is the last of these steps. May be called several times in a step. statuses: of the last
        call for each response, None without one."""
        if self._last is None:
            self._last = step - 1
        if set(statuses) != {"timeout"}:
            self._last = step
        elif step - self._last >= LATE_STEPS:
            raise UngradedError(
                f"{self._section}.function timed out for all responses of {LATE_STEPS} steps in a row; raise "
                f"{self._section}.timeout_s, or make the function, or what it calls, faster"
            )


def generate_groups(
    engine: RolloutEngine, problems: Sequence[Problem], sampling: Sampling, must_stop: MustStop = never
) -> list[Group]:
    """One group per problem, without texts and rewards. must_stop: see `RolloutEngine.generate`."""
    drawn = zip(problems, engine.generate(problems, sampling, must_stop), strict=True)
    return [Group(id=f"{problem.id}@{sampling.step}", problem=problem, samples=samples) for problem, samples in drawn]


def grade_groups(groups: Sequence[Group], decode: Decode, grader: Grader | None) -> None:
    """Fill in rewards and their status on every rank, and texts on rank 0 (in place; the caller owns the groups). Only rank 0
    uses the texts. `grader` is None on the other ranks.

    A collective. Raises UngradedError on every rank, as `grade_samples` and `report_errors` do.
    """
    samples = [(group.problem, sample) for group in groups for sample in group.samples]

    def graded() -> list[Grade]:
        for _, sample in samples:
            sample.text = decode(sample.response_ids.tolist())
        assert grader is not None
        grades = grade_samples(samples, grader)
        report_errors([(grade, problem.id) for grade, (problem, _) in zip(grades, samples, strict=True)])
        return grades

    # Long: an evaluation may have thousands of answers, and a custom reward may be slow.
    for (_, sample), grade in zip(samples, on_rank0(graded, long=True), strict=True):
        fill_in(sample, grade)


def grade_samples(samples: Sequence[tuple[Problem, Sample]], grader: Grader) -> list[Grade]:
    """Fill in rewards and their status (in place), on this rank alone.

    Raises UngradedError, and fills in nothing, in two cases:
    - `reward.function` can no longer be loaded.
    - A reward is outside the configured range. Either the reward or the range is wrong. To train on would ruin the policy,
      because the best answers might count as the worst.
    """
    with saved_first():
        grades = grader([grade_request(problem, sample) for problem, sample in samples])
    refuse_outside([(grade, problem.id) for grade, (problem, _) in zip(grades, samples, strict=True)])
    for (_, sample), grade in zip(samples, grades, strict=True):
        fill_in(sample, grade)
    return grades


def refuse_outside(grades: Sequence[tuple[Grade, str]]) -> None:
    """Raise UngradedError if a reward is outside the configured range. grades: (grade, problem id)."""
    outside = [(grade, name) for grade, name in grades if grade.status == "out_of_range"]
    if outside:
        grade, name = outside[0]
        raise UngradedError(
            f"{len(outside)} of {len(grades)} answers got a reward outside the configured range; the first, to problem "
            f"{name}: {grade.detail}; set these two to the lowest and the highest reward that it returns, or fix it"
        )


def grade_request(problem: Problem, sample: Sample) -> GradeRequest:
    """The answer of a dialogue is the model's last turn; a reply of the environment must not count as an answer. If the engine
    gave the response up, the answer is empty: an earlier turn must not count either."""
    if not sample.messages:
        return GradeRequest(problem.prompt, sample.text, problem.answer, problem.extra)
    turn = next(message["content"] for message in reversed(sample.messages) if message["role"] == "assistant")
    turn = "" if sample.finish_reason == "abort" else turn
    return GradeRequest(problem.prompt, turn, problem.answer, problem.extra, [*problem.messages, *sample.messages])


def fill_in(sample: Sample, grade: Grade) -> None:
    """Fill in the sample's reward (in place; the caller owns the sample)."""
    sample.reward, sample.reward_status, sample.reward_parts = grade.reward, grade.status, grade.parts


def all_failed(grades: Sequence[tuple[Grade, str]]) -> bool:
    """Whether no answer could be graded. False if all timed out: a shared judge may be faster at the next step."""
    statuses = {grade.status for grade, _ in grades}
    return "error" in statuses and statuses <= {"error", "timeout"}


def report_errors(grades: Sequence[tuple[Grade, str]]) -> None:
    """Log a warning about answers that could not be graded, with the reason of the first.

    grades: (grade, problem id), of a step or of several steps that had few.

    Raises UngradedError when no answer could be graded: a reward function that always fails must not look like a policy that is
    always wrong. If all answers timed out, it only warns: a shared judge may be faster at the next step (see `LateSteps`).
    """
    failed = [(grade, name) for grade, name in grades if grade.status == "error"]
    late = [grade for grade, _ in grades if grade.status == "timeout"]
    if late and len(late) == len(grades):
        logger.warning("grading timed out for all %d answers, which count as wrong: %s", len(late), late[0].detail)
    if not failed:
        return
    grade, name = failed[0]
    what = f"{len(failed)} of {len(grades)} answers could not be graded; the first, to problem {name}: {grade.detail}"
    if all_failed(grades):
        raise UngradedError(f"{what}; fix reward.function or the reference answers")
    logger.warning("%s", what)
