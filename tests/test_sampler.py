"""A sampler on an engine that generates concurrently: which groups a step gets, and how old their tokens are."""

from __future__ import annotations

import pytest

from etr_megatron.config import Config
from etr_megatron.config.schema import EnvironmentConfig
from etr_megatron.data import PromptCursor
from etr_megatron.errors import UserError
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.reward import Grade
from etr_megatron.rollout import EngineGoneError, NeedsSyncError, RefusedError
from etr_megatron.rollout.sampler import RoundSampler, chosen
from etr_megatron.types import Group, Problem, Sample
from tests.rollout_buffers import (
    Engine,
    assert_whole,
    buffer_of,
    graders_of,
    names,
    problems,
    sync,
    through_disk,
    timer,
    without_background,
)

__all__ = ["without_background"]  # a fixture
pytestmark = pytest.mark.usefixtures("without_background")


def test_a_rank_that_must_stop_is_not_kept_by_responses_and_all_is_still_pending():
    engine = Engine(lambda problem, index: 2 if problem.id == "p0" else 10**6)
    buffer, looks = buffer_of(engine), iter([False, False, True])
    with pytest.raises(StopAskedError, match=r"told to stop \(SIGTERM\) during the rollout of step 1"):
        buffer.take(1, timer, lambda: next(looks))
    state = through_disk(buffer.state_dict())
    resumed_engine = Engine()
    resumed = buffer_of(resumed_engine)
    resumed.load_state_dict(state)
    resumed._cursor.load_state_dict(buffer._cursor.state_dict())
    resumed.resume()  # after a sync of the same weights
    taken = resumed.take(1, timer)
    assert names(taken) == ["p0", "p1", "p2", "p3"] and resumed_engine.asked == 6  # p0's two are not drawn again


def test_without_staleness_a_step_takes_the_next_prompts_and_nothing_is_left_pending():
    engine = Engine()
    buffer = buffer_of(engine)
    for step, first in ((1, 0), (2, 4)):
        taken = buffer.take(step, timer)
        assert names(taken) == [f"p{number}" for number in range(first, first + 4)] and taken.counts == {}
        assert taken.groups[0].id == f"p{first}@{step}"
        assert_whole(taken)
        assert buffer.state_dict()["in_hand"] == []
        sync(buffer, engine)
    assert engine.asked == 16


def test_flat_groups_are_replaced_by_the_next_prompts_until_enough_are_not():
    taken = buffer_of(Engine(), flat=("p1", "p2", "p4"), dynamic_sampling=True, max_oversample=2).take(1, timer)
    assert names(taken) == ["p0", "p3", "p5", "p6"]
    assert taken.counts == {"groups_asked": 7, "groups_dropped": 3, "groups_filled": 0}


def test_at_the_limit_a_step_is_filled_with_flat_groups():
    flat = [f"p{number}" for number in range(40) if number != 3]
    buffer = buffer_of(Engine(), flat=flat, dynamic_sampling=True, max_oversample=1.5)
    taken = buffer.take(1, timer)
    assert names(taken) == ["p0", "p1", "p2", "p3"]
    assert taken.counts == {"groups_asked": 6, "groups_dropped": 5, "groups_filled": 3}
    assert names(buffer.take(2, timer)) == ["p6", "p7", "p8", "p9"]


def test_rounds_choose_what_a_stream_chooses():
    def group(number: int, flat: bool) -> Group:
        samples = [Sample(i, [1], [0.0], "stop", 0, reward=0.0 if flat else float(i)) for i in range(2)]
        return Group(str(number), Problem(str(number), "", ""), samples)

    asked = [group(number, number in (1, 2, 4)) for number in range(7)]
    assert [one.id for one in chosen(asked, 4, dynamic=True).groups] == ["0", "3", "5", "6"]
    filled = chosen(asked[:5], 4, dynamic=True)
    assert [one.id for one in filled.groups] == ["0", "1", "2", "3"]
    assert filled.counts == {"groups_asked": 5, "groups_dropped": 3, "groups_filled": 2}


def test_prompts_asked_for_again_within_a_step_are_others_even_at_the_end_of_an_epoch():
    cursor = PromptCursor(problems(10), seed=3, shuffle=True)
    cursor.next(7)
    had: list[str] = []
    for count in (2, 3, 4):
        had += [problem.id for problem in cursor.next(count, after=had)]
    assert len(set(had)) == 9
    with pytest.raises(UserError, match="asks for 11 prompts"):
        cursor.next(2, after=had)


def test_with_staleness_1_a_step_is_generated_while_the_one_before_trains_and_no_token_is_older():
    engine = Engine()
    buffer = buffer_of(engine, steps=4, max_staleness=1)
    ages = []
    for step in range(1, 5):
        taken = buffer.take(step, timer)
        assert_whole(taken)
        assert names(taken) == [f"p{number}" for number in range(4 * step - 4, 4 * step)]
        assert {group.id for group in taken.groups} == {f"{name}@{step}" for name in names(taken)}
        assert engine.asked == 8 * min(step + 1, 4)  # the next step's are under way, but none past the last step
        ages.append((taken.counts["staleness_mean"], taken.counts["staleness_max"]))
        sync(buffer, engine)
    assert ages == [(0, 0), (1, 1), (1, 1), (1, 1)]


def long_p1(problem: Problem, index: int) -> int:
    return 30 if problem.id == "p1" and index else 4


def rather_long_p1(problem: Problem, index: int) -> int:
    return 10 if problem.id == "p1" and index else 4


def test_partial_rollouts_do_not_wait_for_the_slowest_and_go_on_with_their_tokens():
    engine = Engine(rather_long_p1, beside=2)
    buffer = buffer_of(engine, partial=True, max_oversample=1.5, max_staleness=3)
    found = {}
    for step in range(1, 9):
        taken = buffer.take(step, timer)
        assert len(taken.groups) == 4
        assert_whole(taken, rather_long_p1)
        for group in taken.groups:
            assert group.id not in found
            found[group.id] = group
        if step == 1:
            assert "p1" not in names(taken)
        sync(buffer, engine)
    late = next(group for group in found.values() if group.problem.id == "p1").samples[1]
    assert len(set(late.weight_versions)) > 2 and late.weight_versions.tolist() == sorted(late.weight_versions)
    assert late.weight_version == late.weight_versions[-1]


def test_tokens_that_would_be_too_old_are_drawn_anew_and_then_waited_for():
    engine = Engine(long_p1)
    buffer = buffer_of(engine, partial=True, max_oversample=1.5, max_staleness=1)
    redone = []
    for step in range(1, 9):
        taken = buffer.take(step, timer)
        assert_whole(taken, long_p1)
        ages = [
            buffer._engine.weight_version - v for group in taken.groups for one in group.samples for v in one.token_versions()
        ]
        assert taken.counts["staleness_max"] == max(ages) <= 1 and taken.counts["staleness_mean"] == sum(ages) / len(ages)
        redone.append(taken.counts["groups_redone"])
        if "p1" in names(taken):
            assert sum(redone) >= 1
            return
        sync(buffer, engine)
    raise AssertionError("the long response was never trained on")


@pytest.mark.parametrize("options", [{"max_staleness": 1}, {"max_staleness": 3, "partial": True}], ids=["ahead", "partial"])
def test_a_hand_that_was_saved_goes_on_as_if_it_had_not_been(options):
    def run(cut: int | None) -> list:
        engine = Engine(long_p1)
        buffer, found = buffer_of(engine, flat=("p2", "p9"), dynamic_sampling=True, **options), []
        for step in range(1, 7):
            taken = buffer.take(step, timer)
            found.append([(group.id, [sample.token_versions() for sample in group.samples]) for group in taken.groups])
            buffer.pause()
            engine.weight_version += 1
            if step == cut:
                saved = through_disk({"cursor": buffer._cursor.state_dict(), **buffer.state_dict()})
                version = engine.weight_version
                engine = Engine(long_p1)
                engine.weight_version = version
                buffer = buffer_of(engine, flat=("p2", "p9"), dynamic_sampling=True, **options)
                buffer._cursor.load_state_dict(saved["cursor"])
                buffer.load_state_dict(saved)
            buffer.resume()
        return found

    assert run(3) == run(None)


@pytest.mark.parametrize("options", [{}, {"max_staleness": 1}], ids=["synchronous", "ahead"])
def test_a_step_that_was_taken_and_not_trained_on_is_taken_again(options):
    buffer = buffer_of(Engine(), **options)
    first = buffer.take(1, timer)
    buffer.put_back(2)
    buffer.put_back(1)
    saved = through_disk({"cursor": buffer._cursor.state_dict(), **buffer.state_dict()})
    again = buffer_of(Engine(), **options)
    again._cursor.load_state_dict(saved["cursor"])
    again.load_state_dict(saved)
    again.resume()
    assert again.take(1, timer).groups == first.groups
    assert names(again.take(2, timer)) == ["p4", "p5", "p6", "p7"]


def test_a_step_that_is_taken_again_has_its_own_groups_where_the_next_steps_are_complete_as_well():
    buffer = buffer_of(Engine(), max_staleness=1)
    first = buffer.take(1, timer)
    buffer.put_back(1)
    buffer.pause()
    assert buffer.take(1, timer).groups == first.groups


def test_a_step_of_which_no_answer_can_be_graded_stops_the_run_whatever_the_steps_before():
    buffer = buffer_of(Engine())
    buffer.take(1, timer)
    graders_of(buffer).grade = lambda requests: [Grade(0.0, "error", "it raised KeyError") for _ in requests]
    with pytest.raises(UserError, match="8 of 8 answers could not be graded; the first, to problem p4: it raised KeyError"):
        buffer.take(2, timer)


def test_when_the_engine_is_gone_all_is_still_pending():
    engine = Engine(lambda problem, index: 4 if problem.id == "p0" else 9)
    buffer = buffer_of(engine)
    buffer._ask(1, 4)
    buffer._accept(engine.wait(1.0))
    engine.is_gone = True
    with pytest.raises(EngineGoneError):
        buffer.take(1, timer)
    saved = through_disk({"cursor": buffer._cursor.state_dict(), **buffer.state_dict()})
    new = Engine(lambda problem, index: 4 if problem.id == "p0" else 9)
    again = buffer_of(new)
    again._cursor.load_state_dict(saved["cursor"])
    again.load_state_dict(saved)
    again.resume()
    assert names(again.take(1, timer)) == ["p0", "p1", "p2", "p3"]
    assert new.asked == 6  # p0 was complete


@pytest.mark.parametrize("options", [{}, {"max_staleness": 1, "partial": True}], ids=["synchronous", "partial"])
def test_a_group_that_the_engine_gives_up_is_replaced_and_counted(options):
    engine = Engine(bad=("p1", "p6"))
    buffer = buffer_of(engine, **options)
    found = []
    for step in (1, 2, 3):
        taken = buffer.take(step, timer)
        assert len(taken.groups) == 4
        assert_whole(taken)
        found.append((names(taken), taken.counts.get("groups_given_up", 0)))
        sync(buffer, engine)
    used = [name for step, _ in found for name in step]
    assert len(set(used)) == 12 and not {"p1", "p6"} & set(used)
    assert sum(count for _, count in found) == 2
    if not options:
        assert found[0] == (["p0", "p2", "p3", "p4"], 1) and found[2][1] == 0


def test_a_step_gives_up_no_more_groups_than_it_trains_on_and_begins_anew_after_that():
    buffer = buffer_of(Engine(bad=[f"p{number}" for number in range(5)]))
    with pytest.raises(RefusedError, match="a step of 4 groups had to give up 5; the reason for the last: p4 is bad"):
        buffer.take(1, timer)
    assert names(buffer.take(1, timer)) == ["p5", "p6", "p7", "p8"]


def test_with_no_other_problem_left_a_group_that_is_given_up_is_one_sentence():
    with pytest.raises(RefusedError, match="a step of 4 groups had to give up 1; the reason for the last: p2 is bad"):
        buffer_of(Engine(bad=["p2"]), count=4).take(1, timer)


def test_a_step_goes_on_after_the_sync_that_its_servers_needed_with_what_there_is():
    engine = Engine(lambda problem, index: 9 if problem.id == "p3" else 4)
    buffer = buffer_of(engine)
    buffer._ask(1, 4)
    buffer._accept(engine.wait(1.0))
    engine.needs_sync = True
    with pytest.raises(NeedsSyncError):
        buffer.take(1, timer)
    engine.needs_sync = False
    buffer.pause()
    buffer.resume()
    taken = buffer.take(1, timer)
    assert names(taken) == ["p0", "p1", "p2", "p3"] and engine.asked == 8
    assert_whole(taken, lambda problem, index: 9 if problem.id == "p3" else 4)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_groups_that_are_not_trained_on_are_taken_again_by_a_resumed_run(max_staleness):
    engine = Engine()
    buffer = buffer_of(engine, max_staleness=max_staleness)
    first = buffer.take(1, timer)
    sync(buffer, engine)
    second = buffer.take(2, timer)
    buffer.put_back(3)  # has not begun
    buffer.put_back(2)
    state = through_disk(buffer.state_dict())
    cursor = buffer._cursor.state_dict()

    drawn = engine.asked
    resumed = buffer_of(engine, max_staleness=max_staleness)
    resumed._cursor.load_state_dict(cursor)
    resumed.load_state_dict(state)
    resumed.resume()
    again = resumed.take(2, timer)
    assert [group.id for group in again.groups] == [group.id for group in second.groups]
    assert again.groups == second.groups and not set(names(first)) & set(names(again))
    assert engine.asked - drawn <= 8 * max_staleness  # only the next step's


def test_sigterm_while_the_environment_is_asked_stops_a_step_of_rounds_whose_prompts_are_drawn_again(monkeypatch):
    def stop_if_told(engine, groups, sampling, dialogues, must_stop, *, earlier):
        if must_stop():
            raise StopAskedError("told to stop")

    monkeypatch.setattr("etr_megatron.rollout.rounds.generate_groups", lambda engine, asked, sampling, must_stop: [])
    monkeypatch.setattr("etr_megatron.rollout.rounds.draw_further_turns", stop_if_told)
    cursor = PromptCursor(problems(), seed=1, shuffle=True)
    before = cursor.state_dict()
    sampler = RoundSampler(Config(environment=EnvironmentConfig(function="tools:reply")), None, cursor, str, None)
    with pytest.raises(StopAskedError):
        sampler.take(1, timer, lambda: True)
    assert cursor.state_dict() != before
    sampler.put_back(1)
    assert cursor.state_dict() == before
