"""What a step's grades are reported as: a reward function that fails must not look like a policy that is always wrong."""

from __future__ import annotations

import logging

import pytest

from etr_megatron.errors import UserError
from etr_megatron.reward import Grade
from etr_megatron.rollout.collect import report_errors

OK, LATE, ERROR = Grade(1.0, "ok", ""), Grade(0.0, "timeout", "no grade within 10 s"), Grade(0.0, "error", "it raised KeyError")


def named(*grades: Grade) -> list[tuple[Grade, str]]:
    return [(grade, f"p{number}") for number, grade in enumerate(grades)]


@pytest.mark.parametrize("grades", [(ERROR, ERROR), (LATE, ERROR, LATE)], ids=["errors", "errors_and_timeouts"])
def test_a_step_that_only_fails_stops_the_run_with_the_first_reason(grades):
    with pytest.raises(UserError, match=r"answers could not be graded; the first, to problem p[01]: it raised KeyError; mend"):
        report_errors(named(*grades))


@pytest.mark.parametrize(
    ("grades", "warning"),
    [
        ((LATE, LATE, LATE), "none of 3 answers was graded, and all count as wrong: no grade within 10 s"),
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
