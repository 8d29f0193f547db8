"""Dialogues go on in a thread of their own while complete groups are graded."""

from __future__ import annotations

import pytest

from etr_megatron.rollout import EngineGoneError, NeedsSyncError
from etr_megatron.rollout.collect import UngradedError
from tests.rollout_buffers import Environment, Talker, assert_dialogue, buffer_of, timer
from tests.test_background_loop import no_thread_is_left, until

__all__ = ["no_thread_is_left"]  # a fixture


def broken(_timeout_s):
    raise RuntimeError("a bug")


OPTIONS = dict(partial=True, max_staleness=0, max_oversample=4)


def test_turns_are_drawn_while_complete_groups_are_graded():
    """The grader waits for replies to groups that are not complete yet."""
    engine, environment = Talker(), Environment(slow=lambda number: number > 5)
    buffer = buffer_of(engine, environment=environment, **OPTIONS)
    grade, calls = buffer._grader, []

    def slow_grader(requests):
        if not calls:
            asked, drawn = len(environment.asked), len(engine.submitted)
            environment.slow = lambda number: False
            until(lambda: len(environment.asked) > asked and len(engine.submitted) > drawn)
        calls.append(len(requests))
        return grade(requests)

    buffer._grader = slow_grader
    taken = buffer.take(1, timer)
    assert calls and len(taken.groups) == 4
    for group in taken.groups:
        for sample in group.samples:
            assert_dialogue(group.problem, sample)
    buffer.close()


def test_what_goes_wrong_in_a_turn_during_grading_is_raised_after_it():
    environment = Environment(slow=lambda number: number > 5)
    buffer = buffer_of(Talker(), environment=environment, **OPTIONS)
    grade, graded = buffer._grader, []

    def grader(requests):
        if not graded:
            environment.poll = broken
            until(lambda: buffer._background._error is not None)
        graded.append(len(requests))
        return grade(requests)

    buffer._grader = grader
    with pytest.raises(RuntimeError, match="a bug"):
        buffer.take(1, timer)
    assert (
        len(graded) == 1 and sum(one.reward is not None for held in buffer._groups for one in held.group.samples) == graded[0]
    )


def test_a_reward_that_cannot_be_had_matters_more_than_what_goes_wrong_in_a_turn_meanwhile():
    environment = Environment(slow=lambda number: number > 5)
    buffer = buffer_of(Talker(), environment=environment, **OPTIONS)

    def grader(_requests):
        environment.poll = broken
        until(lambda: buffer._background._error is not None)
        raise UngradedError("no judge")

    buffer._grader = grader
    with pytest.raises(UngradedError, match="no judge"):
        buffer.take(1, timer)


@pytest.mark.parametrize("lost", ["is_gone", "needs_sync"])
def test_what_was_graded_while_the_engine_was_lost_is_judged_once(lost):
    """A group without a learning signal is left out when the step goes on, and its grades are among those reported."""
    engine, environment = Talker(), Environment(slow=lambda number: number > 5)
    buffer = buffer_of(engine, environment=environment, flat=("p0", "p3"), dynamic_sampling=True, **OPTIONS)
    grade, graded = buffer._grader, []

    def grader(requests):
        if not graded:
            setattr(engine, lost, True)
            environment.slow = lambda number: False  # so that there are turns to draw
            until(lambda: buffer._background._error is not None)
        graded.extend(one.answer for one in requests)
        return grade(requests)

    buffer._grader = grader
    with pytest.raises((EngineGoneError, NeedsSyncError)):
        buffer.take(1, timer)
    grades, before = len(buffer._grades), len(graded)
    setattr(engine, lost, False)
    taken = buffer.take(1, timer)
    assert grades == before and len(graded) == len(set(graded)) * 2
    assert all(len({sample.reward for sample in group.samples}) == 2 for group in taken.groups)
    buffer.close()
