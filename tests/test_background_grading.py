"""Responses are graded while others are drawn, and while the ranks train."""

from __future__ import annotations

import contextlib
import logging

import pytest

from etr_megatron.errors import UserError
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.reward import Grade
from etr_megatron.rollout import EngineGoneError
from etr_megatron.rollout.collect import UngradedError
from etr_megatron.rollout.pending_group import PendingGroup
from etr_megatron.rollout.rollout_buffer import RolloutBuffer
from tests.rollout_buffers import (
    Engine,
    Environment,
    Talker,
    assert_dialogue,
    buffer_of,
    graders_of,
    names,
    sync,
    through_disk,
    timer,
    without_background,
)
from tests.test_background_loop import no_thread_is_left, until

__all__ = ["no_thread_is_left", "without_background"]  # fixtures


def all_rewarded(buffer: RolloutBuffer) -> bool:
    return all(held.is_rewarded for held in buffer._groups)


@pytest.mark.parametrize("environment", [None, Environment()], ids=["single turns", "dialogues"])
def test_what_ends_while_the_ranks_train_is_graded_meanwhile(environment):
    buffer, phases = buffer_of(Talker(), environment=environment, max_staleness=1), []
    buffer.take(1, timer)
    assert len(buffer._groups) == 4
    until(lambda: all_rewarded(buffer))
    sync(buffer, buffer._engine)
    taken = buffer.take(2, lambda phase: phases.append(phase) or contextlib.nullcontext())
    assert not phases and all(sample.reward is not None for group in taken.groups for sample in group.samples)
    buffer.close()


def test_turns_are_drawn_while_other_responses_are_graded():
    """No grade arrives before all responses have ended. The time is that of responses until then, and that of rewards after."""
    engine, phases = Talker(), []
    buffer = buffer_of(engine, environment=Environment())
    graders_of(buffer).is_slow = lambda: any(held.missing for held in buffer._groups) or "reward" not in phases
    taken = buffer.take(1, lambda phase: phases.append(phase) or contextlib.nullcontext())
    for group in taken.groups:
        for sample in group.samples:
            assert_dialogue(group.problem, sample)
    assert phases == sorted(phases, reverse=True) and set(phases) == {"rollout", "reward"}


def test_a_rank_that_must_stop_is_not_kept_by_rewards():
    buffer = buffer_of(Engine())
    graders_of(buffer).is_slow = lambda: True
    with pytest.raises(StopAskedError):
        buffer.take(1, timer, lambda: not any(held.missing for held in buffer._groups))
    assert len(buffer.state_dict()["in_hand"]) == 4


@pytest.mark.parametrize("what", ["redone", "given up"])
def test_the_grade_of_a_response_that_is_no_longer_needed_is_ignored(what, without_background):
    buffer = buffer_of(Engine(), max_staleness=1)
    buffer.take(1, timer)
    graders_of(buffer).is_slow = lambda: True
    while any(held.missing for held in buffer._groups):
        buffer._go_on(0.01)
    first = buffer._groups[0]
    first.redo_older_than(1) if what == "redone" else buffer._give_up(first, "it is bad")
    graders_of(buffer).is_slow = lambda: False
    buffer._accept_grades(0.0)
    assert [held.is_rewarded for held in buffer._groups] == [False] * (what == "redone") + [True] * 3
    assert len(buffer._grades) == 6 and not buffer._grading.is_pending


def test_a_complete_group_that_would_be_too_old_for_the_next_step_is_graded_first():
    buffer, was_old = buffer_of(Engine(), prompts=1, max_staleness=2), []
    buffer._engine.weight_version = 5
    for version in (3, 4):
        ready, graded = (PendingGroup.new(buffer._cursor.next(1)[0], step=1, samples=1, weight_version=5) for _ in range(2))
        for held in (ready, graded):
            held.group.samples[0].finish_reason = "stop"
        ready.group.samples[0].reward, graded.group.samples[0].weight_version = 1.0, version
        buffer._groups = [ready, graded]
        was_old.append(not buffer._is_enough())
    assert was_old == [True, False]


def no_module(_requests):
    raise UserError("no module")


FAILURES = {
    "no function": (no_module, "no module"),
    "outside": (lambda requests: [Grade(2.0, "out_of_range", "it gave 2.0")] * len(requests), "outside the configured range"),
    "all fail": (lambda requests: [Grade(0.0, "error", "KeyError")] * len(requests), "8 of 8 answers could not be graded"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_what_goes_wrong_in_grading_while_the_ranks_train_ends_the_next_step_and_is_in_no_checkpoint(how):
    function, message = FAILURES[how]
    buffer = buffer_of(Engine(), max_staleness=1)
    graders = graders_of(buffer)
    grade, graders.is_slow = graders.grade, lambda: len(buffer._grading._pending) < 8
    graders.grade = lambda requests: (grade if int(requests[0].answer) < 4 else function)(requests)
    buffer.take(1, timer)
    until(lambda: buffer._background._error is not None or all_rewarded(buffer))
    state = through_disk(buffer.state_dict())
    assert all(sample["reward"] is None for held in state["in_hand"] for sample in held["group"]["samples"])
    with pytest.raises(UngradedError, match=message):
        buffer.take(2, timer)
    graders.grade = grade
    assert names(buffer.take(2, timer)) == ["p4", "p5", "p6", "p7"]
    buffer.close()


def test_a_single_grade_that_fails_stops_no_run_but_counts_at_the_next_step(caplog):
    buffer = buffer_of(Engine())
    buffer._grades = [(Grade(0.0, "error", "KeyError"), "p9")]
    buffer._groups = [PendingGroup.new(problem, step=1, samples=2, weight_version=0) for problem in buffer._cursor.next(4)]
    for held in buffer._groups:
        for sample in held.group.samples:
            sample.finish_reason, sample.reward = "stop", 1.0
    state = through_disk(buffer.state_dict())
    assert all(sample["reward"] == 1.0 for held in state["in_hand"] for sample in held["group"]["samples"])
    buffer.take(1, timer)
    assert not caplog.messages and buffer._late_grades._last == 1
    buffer.take(2, timer)
    assert "1 of 9 answers could not be graded" in caplog.text


def test_grades_that_arrive_with_a_failure_of_the_engine_are_kept(caplog):
    """A group without a learning signal is left out when the step goes on, and no response is graded twice."""
    engine = Engine(lambda problem, index: 4 + 4 * index)
    buffer = buffer_of(engine, flat=("p0",), dynamic_sampling=True, max_oversample=2)
    grade, graded = graders_of(buffer).grade, []

    def grader(requests):
        graded.extend(one.answer for one in requests)
        engine.is_gone = len(graded) == 4
        return grade(requests)

    graders_of(buffer).grade = grader
    with pytest.raises(EngineGoneError):
        buffer.take(1, timer)
    engine.is_gone = False
    with caplog.at_level(logging.WARNING):
        assert names(buffer.take(1, timer)) == ["p1", "p2", "p3", "p4"]
    assert len(graded) == 10 and len(set(graded)) == 5
