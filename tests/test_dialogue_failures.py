"""Pending groups whose responses have several turns, with an environment whose calls fail or time out."""

from __future__ import annotations

import logging

import pytest

from etr_megatron.environment import EnvironmentReply
from etr_megatron.rollout.collect import UngradedError
from tests.rollout_buffers import Environment, Talker, buffer_of, sync, timer, without_background
from tests.test_rollout_buffer_dialogues import AHEAD, assert_dialogues, resumed, saved

__all__ = ["without_background"]  # a fixture


@pytest.mark.parametrize("step", [1, 2])
def test_when_all_calls_fail_the_run_ends_and_a_restart_asks_again(step, without_background):
    environment, engine = Environment(), Talker(beside=50)
    buffer = buffer_of(engine, environment=environment, **AHEAD)
    if step == 2:
        buffer.take(1, timer)
    environment.broken = lambda number: "error"
    if step == 2:
        sync(buffer, engine)
    with pytest.raises(UngradedError, match=r"(\d+) of \1 calls of environment.function failed, .* first: error of p"):
        buffer.take(step, timer)
    buffer.put_back(step)
    engine = Talker()
    engine.weight_version = step - 1
    taken = resumed(buffer, engine, Environment(), **AHEAD).take(step, timer)
    assert_dialogues(taken)


def test_a_checkpoint_that_is_saved_before_the_failures_are_noticed_asks_again_too(without_background):
    """If the step before it was saved, a run that ends saves no other checkpoint."""
    environment, engine = Environment(), Talker(beside=50)
    buffer = buffer_of(engine, environment=environment, **AHEAD)
    buffer.take(1, timer)
    environment.broken = lambda number: "timeout" if number == 4 else "error"
    sync(buffer, engine)
    buffer._go_on(0.01)
    assert any(one.environment_status == "error" for held in buffer._groups for one in held.group.samples)
    state = saved(buffer)
    assert any(one.environment_status == "error" for held in buffer._groups for one in held.group.samples)  # as before
    with pytest.raises(UngradedError):
        buffer.take(2, timer)
    again = Talker()
    again.weight_version = 1
    assert_dialogues(resumed(buffer, again, Environment(), state, **AHEAD).take(2, timer))


class Endless(Environment):
    """Once `is_broken`, calls get replies, except that those which would end a response fail."""

    is_broken = True

    def _reply(self, request):
        reply = super()._reply(request)
        return EnvironmentReply(None, "error", "no end") if self.is_broken and reply.messages is None else reply


@pytest.mark.parametrize(("options", "count"), [({}, 8), (dict(dynamic_sampling=True, max_oversample=1.5), 12)])
def test_when_failed_calls_end_all_responses_of_a_step_the_run_ends_though_others_succeed(options, count, without_background):
    buffer = buffer_of(Talker(), environment=(environment := Endless()), **options)
    said = rf"^failed calls of environment.function ended all {count} responses; the last: no end \(problem p\d\); fix env"
    with pytest.raises(UngradedError, match=said):
        buffer.take(1, timer)
    assert len(environment.asked) > count  # more than one call for some
    buffer.put_back(1)
    assert_dialogues(resumed(buffer, Talker(), Environment(), **options).take(1, timer))


def test_a_checkpoint_that_is_saved_before_that_is_noticed_asks_again_too(without_background):
    environment, engine = Endless(), Talker(beside=50)
    environment.is_broken = False
    buffer = buffer_of(engine, environment=environment, **AHEAD)
    buffer.take(1, timer)
    environment.is_broken = True
    sync(buffer, engine)
    while any(held.missing for held in buffer._groups):
        buffer._go_on(0.01)
    assert all(one.call_failed for held in buffer._groups for one in held.group.samples)
    state = saved(buffer)
    with pytest.raises(UngradedError, match="ended all 8 responses"):
        buffer.take(2, timer)
    again = Talker()
    again.weight_version = 1
    assert_dialogues(resumed(buffer, again, Environment(), state, **AHEAD).take(2, timer))


def test_when_all_calls_time_out_for_three_steps_in_a_row_the_run_ends_and_a_restart_asks_again(without_background):
    environment, engine = Environment(broken=lambda number: "timeout"), Talker()
    buffer = buffer_of(engine, environment=environment)
    for step in (1, 2):
        buffer.take(step, timer)
        sync(buffer, engine)
    with pytest.raises(UngradedError, match=r"^environment\.function timed out for all responses of 3 steps in a row; raise"):
        buffer.take(3, timer)
    again = Talker()
    again.weight_version = 2
    assert_dialogues(resumed(buffer, again, Environment()).take(3, timer))


def test_a_few_failed_calls_end_their_responses_with_a_warning(caplog, without_background):
    environment = Environment(broken=lambda number: "error" if number == 2 else "timeout" if number == 3 else "")
    buffer = buffer_of(Talker(), environment=environment)
    with caplog.at_level(logging.WARNING):
        taken = buffer.take(1, timer)
    assert [group.samples[0].environment_status for group in taken.groups] == ["ok", "ok", "error", "timeout"]
    assert [group.samples[0].turns for group in taken.groups] == [1, 2, 1, 1]
    assert all(one.finish_reason == "stop" and one.reward is not None for group in taken.groups for one in group.samples)
    assert "calls of environment.function failed" in caplog.text
    state = saved(buffer)
    assert not any(one["finish_reason"] == "turn" for held in state["in_hand"] for one in held["group"]["samples"])
