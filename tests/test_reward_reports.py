"""How a step's grades are reported: a failing reward function must not look like a policy that is always wrong."""

from __future__ import annotations

import logging

import pytest

from etr_megatron.errors import UserError
from etr_megatron.reward import Grade
from etr_megatron.rollout import UngradedError
from etr_megatron.rollout.collect import grade_samples, report_errors
from etr_megatron.types import Problem, Sample
from tests.rollout_buffers import graders_of
from tests.test_sampler import Engine, buffer_of, names, sync, through_disk, timer

OK, LATE, ERROR = Grade(1.0, "ok", ""), Grade(0.0, "timeout", "no grade within 10 s"), Grade(0.0, "error", "it raised KeyError")


def named(*grades: Grade) -> list[tuple[Grade, str]]:
    return [(grade, f"p{number}") for number, grade in enumerate(grades)]


@pytest.mark.parametrize("grades", [(ERROR, ERROR), (LATE, ERROR, LATE)], ids=["errors", "errors_and_timeouts"])
def test_a_step_that_only_fails_stops_the_run_with_the_first_reason(grades):
    with pytest.raises(UserError, match=r"answers could not be graded; the first, to problem p[01]: it raised KeyError; fix"):
        report_errors(named(*grades))


@pytest.mark.parametrize(
    ("grades", "warning"),
    [
        ((LATE, LATE, LATE), "grading timed out for all 3 answers, which count as wrong: no grade within 10 s"),
        ((OK, ERROR, LATE), "1 of 3 answers could not be graded; the first, to problem p1: it raised KeyError"),
        ((OK, LATE), ""),
        ((), ""),
    ],
    ids=["timeouts", "one_of_each", "one_timeout", "nothing"],
)
def test_a_step_that_others_may_follow_is_warned_of_at_most(caplog, grades, warning):
    with caplog.at_level(logging.WARNING):
        report_errors(named(*grades))
    assert caplog.messages == ([warning] if warning else [])


@pytest.mark.parametrize("status", ["error", "out_of_range"])
@pytest.mark.parametrize("options", [{}, {"dynamic_sampling": True}], ids=["static", "dynamic"])
def test_what_could_not_be_graded_is_graded_again_once_that_is_mended(status, options):
    engine = Engine()
    buffer = buffer_of(engine, **options)
    graders_of(buffer).grade = lambda requests: [Grade(0.0, status, "it gave 2.0")] * len(requests)
    with pytest.raises(UngradedError, match=r" answers .*: it gave 2\.0; "):
        buffer.take(1, timer)
    buffer.put_back(1)
    resumed = buffer_of(Engine())
    resumed._cursor.load_state_dict(buffer._cursor.state_dict())
    resumed.load_state_dict(through_disk(buffer.state_dict()))
    taken = resumed.take(1, timer)
    assert names(taken) == ["p0", "p1", "p2", "p3"] and not resumed._engine.asked
    assert all(sample.reward_status == "ok" for group in taken.groups for sample in group.samples)


def test_answers_that_time_out_for_three_steps_in_a_row_are_graded_again_after_a_restart():
    buffer = buffer_of(engine := Engine())
    graders, late = graders_of(buffer), lambda requests: [LATE] * len(requests)
    grade = graders.grade
    for step, graders.grade in enumerate((late, late, grade, late, late), 1):
        buffer.take(step, timer)
        sync(buffer, engine)
    graders.grade = late
    with pytest.raises(
        UngradedError, match=r"^reward\.function timed out for all responses of 3 steps in a row; raise reward\.ti"
    ):
        buffer.take(6, timer)
    graders.grade = grade
    assert all(sample.reward_status == "ok" for group in buffer.take(6, timer).groups for sample in group.samples)


def test_graders_that_can_no_longer_be_started_let_the_run_save_first():
    def grade(requests):
        raise UserError("reward.function = 'mine:score' cannot be used: No module named 'mine'")

    sample = Sample(0, [5], [-0.5], "stop", 0)
    with pytest.raises(UngradedError, match="No module named 'mine'"):
        grade_samples([(Problem("p", "", ""), sample)], grade)
    assert sample.reward is None
