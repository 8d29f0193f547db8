"""Pending groups whose responses have several turns: whatever the order of events, every token is what and whose it says."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from etr_megatron.errors import UserError
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.rollout.pending_group import PendingGroup
from etr_megatron.rollout.rollout_buffer import RolloutBuffer
from tests.rollout_buffers import (
    Environment,
    Talker,
    assert_dialogue,
    buffer_of,
    names,
    reply_of,
    sync,
    through_disk,
    timer,
    without_background,
)

__all__ = ["without_background"]  # a fixture

AHEAD = dict(partial=True, max_staleness=1)


def resumed(
    buffer: RolloutBuffer, engine: Talker, environment: Environment | None, state: dict | None = None, **options
) -> RolloutBuffer:
    """A new process with what the buffer, or `state`, has; its first step syncs the weights."""
    state = state or saved(buffer)
    again = buffer_of(engine, environment=environment, **options)
    again._cursor.load_state_dict(state["cursor"])
    again.load_state_dict(state)
    again.pause()
    again.resume()
    return again


def saved(buffer: RolloutBuffer) -> dict:
    return through_disk({"cursor": buffer._cursor.state_dict(), **buffer.state_dict()})


def assert_dialogues(taken, **limits) -> None:
    for group in taken.groups:
        assert [sample.index for sample in group.samples] == [0, 1]
        for sample in group.samples:
            assert_dialogue(group.problem, sample, **limits)


@pytest.fixture
def redone(monkeypatch):
    """How often each problem's responses were drawn anew."""
    found, before = Counter(), PendingGroup.redo_older_than

    def redo(held, version):
        was = before(held, version)
        found[held.group.problem.answer] += was
        return was

    monkeypatch.setattr(PendingGroup, "redo_older_than", redo)
    return found


def test_a_turn_names_the_place_where_the_one_before_was_drawn_and_after_a_weight_sync_none(without_background):
    engine, environment = Talker(), Environment()
    buffer = buffer_of(engine, environment=environment, prompts=3, max_response_tokens=256, **AHEAD)
    buffer.take(1, timer)
    last, further = {}, 0
    for draw, drawn in engine.submitted:
        name = draw.problem.id, draw.index
        assert draw.cached_at == (last[name] if drawn else None)
        last[name] = f"s{draw.key % 3}", draw.key % 2
        further += bool(drawn)
    assert further > 4
    held = len(engine.submitted)
    sync(buffer, engine)
    again = engine.submitted[held:]
    assert any(drawn for _, drawn in again) and not any(draw.cached_at for draw, _ in again)


@pytest.mark.parametrize("seed", range(60))
def test_in_every_order_of_events_responses_are_whole_and_nothing_is_asked_twice(seed, redone):
    rng = random.Random(seed)
    staleness = rng.randrange(3)
    options = dict(max_staleness=staleness, partial=bool(staleness and rng.random() < 0.6), max_oversample=rng.choice([1.5, 2]))
    options |= dict(dynamic_sampling=rng.random() < 0.5, max_response_tokens=rng.choice([6, 9, 256]))
    environment = Environment(delay=lambda: rng.choice([0, 0, 1, 3, 8]))
    engine = Talker(beside=rng.randrange(6), bad={f"p{rng.randrange(30)}" for _ in range(rng.randrange(3))})
    flat = {f"p{rng.randrange(30)}" for _ in range(rng.randrange(8))}
    turns = rng.choice([2, 8])
    buffer = buffer_of(engine, environment=environment, flat=flat, count=200, max_turns=turns, **options)
    for step in range(1, 8):
        taken = buffer.take(step, timer)
        assert len(taken.groups) == 4
        assert_dialogues(taken, limit=options["max_response_tokens"], max_turns=turns)
        samples = [sample for group in taken.groups for sample in group.samples]
        ages = [[engine.weight_version - one for one in sample.select_generated(sample.token_versions())] for sample in samples]
        if staleness:
            assert taken.counts["staleness_max"] == max(map(max, ages)) <= staleness
            assert taken.counts["staleness_mean"] == pytest.approx(sum(map(sum, ages)) / sum(map(len, ages)))
        else:
            assert max(map(max, ages)) == 0
        sync(buffer, engine)
    buffer.close()
    asked = Counter(environment.asked)
    assert len(asked) > 60 and all(count <= 1 + redone[answer] for (answer, _), count in asked.items())


@pytest.mark.parametrize("partial", [True, False], ids=["cut off", "waited for"])
def test_a_pause_leaves_replies_under_way_and_a_resume_asks_for_nothing_again(partial, without_background):
    environment = Environment()
    engine = Talker(beside=50)
    buffer = buffer_of(engine, environment=environment, max_staleness=2, partial=partial)
    buffer.take(1, timer)
    environment.slow = lambda number: True
    buffer.pause()  # which draws the first turn of everything pending
    assert len(environment.asked) == len(set(environment.asked)) and not buffer._under_way
    assert {id(one) for held in buffer._groups for one in held.missing} == set(buffer._replying) != set()
    submitted = len(engine.submitted)
    buffer.resume()
    assert len(engine.submitted) == submitted and len(environment.asked) == len(set(environment.asked))
    environment.slow = lambda number: False
    for step in (2, 3):
        taken = buffer.take(step, timer)
        assert_dialogues(taken)
        sync(buffer, engine)
    assert len(environment.asked) == len(set(environment.asked))
    first = Counter((draw.problem.id, draw.index) for draw, drawn in engine.submitted if not drawn)
    assert set(first.values()) == {1}


def test_a_resume_submits_once_what_was_cut_off_in_a_later_turn(without_background):
    engine = Talker(beside=1)
    buffer = buffer_of(engine, environment=Environment(), max_staleness=2, partial=True)
    buffer.take(1, timer)
    for _ in range(4):
        buffer._go_on(0.01)
    buffer.pause()
    cut = [(held.group.problem.id, one) for held in buffer._groups for one in held.missing if one.finish_reason == "abort"]
    assert any(0 in sample.loss_mask for _, sample in cut)
    before = len(engine.submitted)
    buffer.resume()
    new = [(draw.problem.id, draw.index, drawn, draw.turn_begin) for draw, drawn in engine.submitted[before:]]
    assert new == [(name, one.index, one.response_ids.tolist(), one.turn_begin) for name, one in cut]


def test_what_the_engine_could_not_answer_is_drawn_after_the_sync_and_nothing_is_waited_for_in_vain(without_background):
    engine = Talker()
    buffer = buffer_of(engine, environment=Environment(), **AHEAD)
    buffer.take(1, timer)
    assert buffer._under_way
    engine._under_way.clear()  # its servers are lost
    sync(buffer, engine)
    for step in (2, 3):
        assert_dialogues(buffer.take(step, timer))
        sync(buffer, engine)
    while any(held.missing for held in buffer._groups):
        buffer._go_on(0.01)
    assert not buffer._under_way and not buffer._replying


def test_a_late_reply_to_a_response_that_is_drawn_anew_is_ignored(without_background, redone):
    """The reply may come before the response that is drawn anew asks for its own, or after."""
    environment, engine = Environment(), Talker(beside=50)
    buffer = buffer_of(engine, environment=environment, **AHEAD)
    buffer.take(1, timer)
    slow = buffer._groups[1]
    environment.slow = lambda number: number == int(slow.group.problem.answer)
    sync(buffer, engine)
    old = list(slow.group.samples)
    assert all(sample.finish_reason == "turn" and sample.response_ids for sample in old)
    with pytest.raises(StopAskedError):  # three groups are ready, and the fourth's tokens are not too old yet
        buffer.take(2, timer, lambda: True)
    sync(buffer, engine)
    assert slow.is_redone and redone[slow.group.problem.answer] == 1
    assert all(new is not one and not new.response_ids for new, one in zip(slow.group.samples, old, strict=True))
    before = [sample.response_ids.tolist() for sample in old]
    environment.slow = lambda number: False
    taken = buffer.take(2, timer)
    assert slow.group in taken.groups
    assert_dialogues(taken)
    assert [sample.response_ids.tolist() for sample in old] == before and not buffer._replying


def test_a_step_takes_what_is_ready_while_a_reply_is_late_and_no_token_gets_too_old(redone):
    environment, engine = Environment(slow=lambda number: number == 1), Talker(beside=3)
    buffer = buffer_of(engine, environment=environment, partial=True, max_staleness=2, max_oversample=2)
    for step in (1, 2):
        taken = buffer.take(step, timer)
        assert "p1" not in names(taken) and len(taken.groups) == 4
        assert_dialogues(taken)
        sync(buffer, engine)
    assert redone["1"] == 0
    assert_dialogues(buffer.take(3, timer))
    sync(buffer, engine)
    assert redone["1"] == 1
    looks = iter([False, True])
    with pytest.raises(StopAskedError):  # the step waits for what is drawn anew, as it might else be so forever
        buffer.take(4, timer, lambda: next(looks))
    environment.slow = lambda number: False
    found = []
    for step in (4, 5):
        taken = buffer.take(step, timer)
        assert taken.counts["staleness_max"] <= 2
        assert_dialogues(taken)
        found += names(taken)
        sync(buffer, engine)
    assert found.count("p1") == 1
    buffer.close()


def test_a_group_that_is_given_up_is_asked_for_no_further_replies(without_background):
    environment = Environment(slow=lambda number: True)
    buffer = buffer_of(Talker(), environment=environment)
    buffer._ask(1, 4)
    while not buffer._replying:
        buffer._go_on(0.01)
    held, _ = next(iter(buffer._replying.values()))  # the group's other response is still at the engine
    assert len([one for one, _ in buffer._replying.values() if one is held]) == 1
    buffer._give_up(held, "it is bad")
    environment.slow = lambda number: False
    taken = buffer.take(1, timer)
    assert held.group not in taken.groups and taken.counts["groups_given_up"] == 1
    assert [answer for answer, _ in environment.asked].count(held.group.problem.answer) == 1
    assert_dialogues(taken)
    assert not buffer._replying and not buffer._under_way


@pytest.mark.parametrize("progress", range(12))
def test_a_run_that_is_resumed_has_the_responses_of_an_undisturbed_one(progress, without_background):
    def delay():
        return rng.randrange(4)

    rng = random.Random(progress)
    buffer = buffer_of(Talker(), environment=Environment(delay), **AHEAD)
    buffer.take(1, timer)
    for _ in range(progress):
        buffer._go_on(0.01)
    again = resumed(buffer, Talker(), Environment(delay), **AHEAD)
    expected, found = {}, {}
    for step in (2, 3, 4, 5):  # which groups a step takes depends on the order in which they are complete
        expected |= {group.id: group for group in buffer.take(step, timer).groups}
        found |= {group.id: group for group in again.take(step, timer).groups}
    both = expected.keys() & found.keys()
    assert len(both) >= 12 and all(found[name] == expected[name] for name in both)
    for group in found.values():
        for sample in group.samples:
            assert_dialogue(group.problem, sample)


def states_of(buffer: RolloutBuffer) -> set[str]:
    """Where the pending responses are."""
    drawing = {id(sample) for _, sample in buffer._under_way.values()}
    asked = {id(sample) for _, sample in buffer._replying.values()}
    found = set()
    for sample in (sample for held in buffer._groups for sample in held.missing):
        where = "drawing" if id(sample) in drawing else "replying" if id(sample) in asked else "waiting"
        found.add(f"{where} after a reply" if 0 in sample.loss_mask else where)
    return found


def test_checkpoints_are_resumed_with_responses_in_every_state(without_background):
    seen, rng = set(), random.Random(3)
    for progress in range(30):
        buffer = buffer_of(Talker(), environment=Environment(lambda: rng.randrange(4)), **AHEAD)
        buffer.take(1, timer)
        for _ in range(progress):
            buffer._go_on(0.01)
        if progress % 3 == 0:
            buffer.pause()
        seen |= states_of(buffer)
        again = resumed(buffer, Talker(), Environment(), **AHEAD)
        assert_dialogues(again.take(2, timer))
    assert seen == {one + after for one in ("drawing", "replying", "waiting") for after in ("", " after a reply")}


def test_a_checkpoint_from_before_there_were_environments_is_resumed(without_background):
    engine = Talker(beside=2)
    buffer = buffer_of(engine, **AHEAD)
    buffer.take(1, timer)
    buffer.pause()
    state = saved(buffer)
    for name in ("loss_mask", "loss_mask.lengths"):
        del state["tensors"][name]
    again = resumed(buffer, Talker(), None, state, **AHEAD)
    buffer.resume()
    assert names(again.take(2, timer)) == names(buffer.take(2, timer))


def test_a_checkpoint_with_responses_that_wait_for_a_reply_is_refused_without_an_environment(without_background):
    buffer = buffer_of(Talker(beside=50), environment=Environment(slow=lambda number: number > 3), **AHEAD)
    buffer.take(1, timer)
    buffer.pause()
    with pytest.raises(
        UserError, match=r"holds 8 responses that wait for a reply of an environment; set environment\.function"
    ):
        resumed(buffer, Talker(), None, **AHEAD)


def test_the_reply_after_the_last_step_of_a_response_is_asked_for_and_no_further_one(without_background):
    environment = Environment()
    taken = buffer_of(Talker(), environment=environment).take(1, timer)
    turns = Counter(answer for answer, _ in environment.asked)
    for group in taken.groups:
        number = int(group.problem.answer)
        assert turns[group.problem.answer] == 2 * next(turn for turn in (1, 2, 3) if reply_of(number, turn) is None)
