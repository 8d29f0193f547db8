"""Groups pending: what is requested for them, how they are judged, chosen and counted, where a mistake would go unnoticed."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest

from etr_megatron.errors import UserError
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.reward import Grade
from etr_megatron.rollout import RefusedError
from etr_megatron.rollout.pending_group import PendingGroup
from etr_megatron.types import Group, Problem, Sample
from tests.rollout_buffers import (
    Engine,
    assert_whole,
    buffer_of,
    graders_of,
    names,
    sync,
    through_disk,
    timer,
    without_background,
)

__all__ = ["without_background"]  # a fixture
pytestmark = pytest.mark.usefixtures("without_background")


def complete(name: str, *versions: int, step: int = 1, **options) -> PendingGroup:
    """A rewarded group, with one response that has these versions and one that has the last of them."""
    last, each = versions[-1], list(versions) if len(set(versions)) > 1 else []
    first = Sample(0, [7] * len(versions), [-0.5] * len(versions), "stop", last, "x", 0.0, "ok", each)
    second = Sample(1, [8], [-0.5], "stop", last, "y", 1.0, "ok")
    return PendingGroup(Group(f"{name}@{step}", Problem(name, "", ""), [first, second]), step, **options)


def begun(name: str, **options) -> PendingGroup:
    samples = [Sample(i, [7], [-0.5], "abort", 3) for i in range(2)]
    return PendingGroup(Group(f"{name}@1", Problem(name, "", ""), samples), 1, **options)


@pytest.mark.parametrize("length", range(5, 16))
def test_whenever_a_long_response_ends_none_of_its_tokens_is_too_old(length):
    def lengths(problem: Problem, index: int) -> int:
        return length if problem.id == "p1" and index else 4

    engine = Engine(lengths, beside=1)
    buffer = buffer_of(engine, partial=True, max_oversample=1.5, max_staleness=1)
    found = set()
    for step in range(1, 9):
        taken = buffer.take(step, timer)
        assert_whole(taken, lengths)
        versions = [version for group in taken.groups for one in group.samples for version in one.token_versions()]
        assert taken.counts["staleness_max"] == engine.weight_version - min(versions) <= 1
        mixed = sum(len(set(one.weight_versions)) > 1 for group in taken.groups for one in group.samples)
        assert taken.counts["samples_continued"] == mixed
        found |= set(names(taken))
        sync(buffer, engine)
    assert "p1" in found


def test_what_colocated_servers_have_in_flight_is_cut_off_before_training_and_continued_after_it():
    def lengths(problem: Problem, index: int) -> int:
        return 11 if problem.id == "p1" and index else 4

    engine = Engine(lengths)
    buffer = buffer_of(engine, partial=True, max_oversample=1.5, max_staleness=2, placement="colocated")
    taken = []
    for step in range(1, 5):
        taken.append(buffer.take(step, timer))
        assert_whole(taken[-1], lengths)
        assert engine.asked == 2 * (6 + 4 * (step - 1))  # nothing for the next step
        buffer.cut_off()
        assert not engine._under_way
        buffer.put_back(step)  # as when training is interrupted
        assert names(again := buffer.take(step, timer)) == names(taken[-1]) and again.groups == taken[-1].groups
        buffer.cut_off()
        sync(buffer, engine)
    ages = [rollouts.counts["staleness_max"] for rollouts in taken]
    assert ages[0] == 0 and max(ages) == 2 and sum(rollouts.counts["samples_continued"] for rollouts in taken) == 1


def test_a_step_takes_the_groups_with_the_oldest_tokens_in_the_order_they_were_asked_in():
    engine = Engine()
    engine.weight_version = 6
    buffer = buffer_of(engine, max_staleness=3, partial=True)
    buffer._groups = [complete("a", 6), complete("b", 3, 6), complete("c", 5), complete("d", 4), complete("e", 4, 6)]
    taken = buffer._choose(1)
    assert names(taken) == ["b", "c", "d", "e"]
    assert taken.counts["staleness_max"] == 3 and taken.counts["samples_continued"] == 2
    assert taken.counts["staleness_mean"] == pytest.approx((3 + 1 + 1 + 2 + 2 + 2) / 10)
    assert taken.counts["groups_pending"] == 1


def test_a_token_that_is_too_old_is_never_trained_on():
    engine = Engine()
    engine.weight_version = 6
    buffer = buffer_of(engine, max_staleness=2, partial=True)
    buffer._groups = [complete("a", 6), complete("b", 3, 6), complete("c", 5), complete("d", 4)]
    with pytest.raises(RuntimeError, match=r"a token is 3 weight syncs old, more than rollout\.max_staleness=2"):
        buffer._choose(1)


@pytest.mark.parametrize(("other", "enough"), [(begun("e"), True), (begun("e", is_redone=True), False)])
def test_only_what_is_drawn_anew_and_not_complete_is_waited_for_when_there_are_enough(other, enough):
    buffer = buffer_of(Engine(), max_staleness=3)
    buffer._groups = [complete("a", 3), complete("b", 3, is_redone=True), complete("c", 3), complete("d", 3), other]
    assert buffer._is_enough() is enough


def test_a_group_that_is_given_up_leaves_the_same_problems_group_of_another_step():
    buffer = buffer_of(Engine())
    first, second = complete("p", 3), complete("p", 3, step=2)
    buffer._groups = [first, second]
    buffer._give_up(first, "no server answers")
    assert buffer._groups == [second] and buffer._groups[0] is second


@pytest.mark.parametrize("options", [{}, {"partial": True, "max_oversample": 1.5, "max_staleness": 1}], ids=["all", "first"])
def test_flat_groups_are_trained_on_where_sampling_is_not_dynamic(options):
    taken = buffer_of(Engine(), flat=("p1", "p2"), **options).take(1, timer)
    assert names(taken) == ["p0", "p1", "p2", "p3"]


def test_a_response_that_is_cut_at_its_length_is_graded_by_its_text():
    taken = buffer_of(Engine(finish="length")).take(1, timer)
    assert [sample.text for group in taken.groups for sample in group.samples] == ["0 1 2 3"] * 8


def test_no_response_is_graded_twice():
    engine = Engine(lambda problem, index: 4 + 3 * index + int(problem.id[1:]) % 3, beside=2)
    buffer = buffer_of(engine, partial=True, max_oversample=2, max_staleness=3)
    graded: Counter[str] = Counter()

    def grade(requests):
        graded.update(one.prompt for one in requests)
        return [Grade(float(place % 2), "ok", "") for place, _ in enumerate(requests)]

    graders_of(buffer).grade = grade
    for step in range(1, 6):
        buffer.take(step, timer)
        sync(buffer, engine)
    assert len(graded) > 20 and max(graded.values()) == 2


@pytest.mark.parametrize("options", [{}, {"partial": True, "max_staleness": 2}], ids=["synchronous", "partial"])
def test_no_step_asks_for_a_problem_twice_and_a_response_is_drawn_on_with_its_own_steps_seed(options):
    engine = Engine(lambda problem, index: 4 + 5 * index, beside=1)
    flat = ("p0", "p2", "p3")
    options |= dict(dynamic_sampling=True, max_oversample=3)
    buffer = buffer_of(engine, flat=flat, count=7, steps=30, prompts=2, shuffle=True, **options)
    for step in range(1, 31):
        buffer.take(step, timer)
        sync(buffer, engine)
    new = Counter((draw.problem.id, draw.index, draw.sampling.step) for draw, drawn in engine.submitted if not drawn)
    assert max(new.values()) == 1 and len(new) > 60
    for draw, drawn in engine.submitted:
        assert list(draw.generated_ids) == drawn  # as it was when submitted
        assert (draw.problem.id, draw.index, draw.sampling.step) in new


def test_fewer_problems_than_a_step_needs_are_refused_not_trained_on():
    with pytest.raises(UserError, match="asks for 4 prompts, but there are only 3 problems"):
        buffer_of(Engine(), count=3).take(1, timer)


def test_what_a_step_has_asked_for_and_lost_is_known_after_a_resume():
    """Of five problems, the second step asks for four; one is given up before the step is stopped and saved, and the fifth
    after that."""
    engine = Engine()
    buffer = buffer_of(engine, count=5)
    buffer.take(1, timer)
    engine._lengths, engine.bad = lambda problem, index: 10**6, ("p0",)
    looks = iter([False, False, True])
    with pytest.raises(StopAskedError):
        buffer.take(2, timer, lambda: next(looks))
    state = through_disk({"cursor": buffer._cursor.state_dict(), **buffer.state_dict()})
    again = buffer_of(Engine(bad=("p3",)), count=5)
    again._cursor.load_state_dict(state["cursor"])
    again.load_state_dict(state)
    again.resume()
    with pytest.raises(RefusedError, match="a step of 4 groups had to give up 2; the reason for the last: p3 is bad"):
        again.take(2, timer)


def test_what_the_next_step_has_asked_for_is_known_after_a_step_that_is_taken_again():
    """Of five problems, the next step has asked for four. When it has lost two, it does not get one of them again."""
    engine = Engine()
    buffer = buffer_of(engine, count=5, max_staleness=1)
    buffer.take(1, timer)
    buffer.put_back(1)
    buffer.take(1, timer)
    engine.bad = ("p0", "p3")
    sync(buffer, engine)
    with pytest.raises(RefusedError, match="a step of 4 groups had to give up 2; the reason for the last: p3 is bad"):
        buffer.take(2, timer)


def test_the_groups_of_a_step_are_let_go_when_it_is_trained():
    """With routing replay they take gigabytes."""
    engine = Engine()
    buffer = buffer_of(engine)
    taken = buffer.take(1, timer)
    tokens = [weakref.ref(one.response_ids) for group in taken.groups for one in group.samples]
    buffer.put_back(1)
    assert names(buffer.take(1, timer)) == names(taken)  # until then they may be taken again
    del taken
    assert all(one() is not None for one in tokens)
    sync(buffer, engine)
    assert all(one() is None for one in tokens)
