"""Responses between turns: what a reply makes of them, who gets which back, and what is said about failed calls."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest

from etr_megatron.environment import EnvironmentReply
from etr_megatron.errors import UserError
from etr_megatron.rollout.collect import UngradedError
from etr_megatron.rollout.dialogues import Dialogues
from etr_megatron.types import Group, Problem, Sample
from tests.rollout_buffers import ids_of, words

PROBLEM = Problem("p", "2 + 2?", "4", [1, 2], {"level": 3}, [{"role": "user", "content": "2 + 2?"}])
GROUP = Group("p@5", PROBLEM, [])


class Environment:
    """Replies that a test gives; every request is kept."""

    def __init__(self) -> None:
        self.requests, self.replies, self.error = {}, [], None

    def submit(self, key, request):
        if self.error:
            raise self.error
        self.requests[key] = request

    def poll(self, timeout_s):
        if self.error:
            raise self.error
        replies, self.replies = self.replies, []
        return replies

    def reply(self, key, *texts: str, status="ok", detail=""):
        messages = [{"role": "user", "content": text} for text in texts]
        self.replies.append((key, EnvironmentReply(messages or None, status, detail)))


@pytest.fixture
def environment():
    return Environment()


def dialogues_of(environment, **options) -> Dialogues:
    return Dialogues(environment, lambda reply, last: ids_of(reply[0]), words, **{"max_turns": 8, **options})


def turn(*ids: int, index: int = 0) -> Sample:
    """A sample whose first turn has ended."""
    return Sample(
        index, list(ids), [-float(one) for one in ids], "turn", 3, messages=[{"role": "assistant", "content": words(ids)}]
    )


def outcome(environment, *texts, sample=None, limit=20, **options) -> Sample:
    dialogues, sample = dialogues_of(environment, **options), sample or turn(5, 6)
    dialogues.submit("me", GROUP, sample, limit)
    environment.reply(0, *texts)
    (found,) = dialogues.ended("me", 0.0)
    assert found is sample
    return found


def test_the_environment_gets_all_messages_the_answer_and_the_columns(environment):
    sample = turn(5, 6)
    sample.messages += [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "8"}]
    outcome(environment, sample=sample)
    request = environment.requests[0]
    assert [one["role"] for one in request.messages] == ["user", "assistant", "tool", "assistant"]
    assert (request.answer, request.extra, request.response_id) == ("4", {"level": 3}, "p@5/0")
    assert len(PROBLEM.messages) == 1


def test_the_turn_that_is_noted_is_what_the_model_drew_after_the_last_reply(environment):
    sample = Sample(0, [5, 6, 1001, 7, 8], [0.0] * 5, "stop", 3, loss_mask=[1, 1, 0, 1, 1])
    dialogues_of(environment).end_turn(sample)
    assert sample.messages == [{"role": "assistant", "content": "7 8"}]


def test_a_reply_is_inserted_with_its_messages_and_without_log_probs(environment):
    sample = outcome(environment, "1001 1002")
    assert sample.response_ids.tolist() == [5, 6, 1001, 1002] and sample.loss_mask.tolist() == [1, 1, 0, 0]
    assert sample.rollout_logprobs.tolist() == [-5.0, -6.0, 0.0, 0.0] and sample.token_versions().tolist() == [3] * 4
    assert sample.messages[1:] == [{"role": "user", "content": "1001 1002"}]
    assert (sample.finish_reason, sample.environment_status) == ("abort", "ok")


def test_a_response_ends_where_the_environment_has_nothing_to_say(environment):
    sample = outcome(environment)
    assert (sample.finish_reason, sample.environment_status) == ("stop", "ok")
    assert sample.response_ids.tolist() == [5, 6] and not sample.loss_mask and len(sample.messages) == 1


@pytest.mark.parametrize(("limit", "finish"), [(5, "abort"), (4, "length"), (3, "length")])
def test_a_reply_must_leave_room_for_a_token_of_the_next_turn(environment, limit, finish):
    sample = outcome(environment, "1001 1002", limit=limit)
    assert sample.finish_reason == finish and sample.environment_status == "ok"
    if finish == "length":
        assert sample.response_ids.tolist() == [5, 6] and not sample.loss_mask and len(sample.messages) == 1


@pytest.mark.parametrize(("turns", "finish"), [(1, "length"), (2, "abort")])
def test_a_reply_after_the_last_turn_ends_the_response_as_truncated(environment, turns, finish):
    assert outcome(environment, "1001", max_turns=turns).finish_reason == finish


def test_the_last_turn_may_end_a_response_without_a_reply(environment):
    assert outcome(environment, max_turns=1).finish_reason == "stop"


def test_the_tokens_of_a_reply_depend_on_the_turns_last_token(environment):
    seen = []
    dialogues = Dialogues(environment, lambda reply, last: seen.append((reply, last)) or [9], words, max_turns=8)
    dialogues.submit("me", GROUP, turn(5, 6), 20)
    environment.reply(0, "a", "b")
    dialogues.ended("me", 0.0)
    assert seen == [([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], 6)]


def test_everyone_gets_only_their_own_samples_whoever_looks_first(environment):
    dialogues, mine, yours = dialogues_of(environment), [turn(5), turn(6)], [turn(7)]
    for owner, sample in (("me", mine[0]), ("you", yours[0]), ("me", mine[1])):
        dialogues.submit(owner, GROUP, sample, 20)
    for key in (1, 2, 0):
        environment.reply(key, "1001")
    assert [id(one) for one in dialogues.ended("me", 0.0)] == [id(mine[1]), id(mine[0])]
    assert dialogues.ended("me", 60.0) == []  # nothing of mine is under way: no wait
    assert yours[0].finish_reason == "turn"  # it is changed only in its owner's thread
    assert dialogues.ended("you", 0.0)[0] is yours[0] and yours[0].finish_reason == "abort"


def test_a_wait_ends_with_the_first_reply_or_at_its_time(environment):
    dialogues = dialogues_of(environment)
    dialogues.submit("me", GROUP, turn(5), 20)
    assert dialogues.ended("me", 0.03) == []
    threading.Timer(0.05, environment.reply, (0, "1001")).start()
    begin = time.monotonic()
    assert len(dialogues.ended("me", 60.0)) == 1 and time.monotonic() - begin < 30


def test_replies_to_what_is_forgotten_are_ignored_whenever_they_come(environment):
    dialogues, mine = dialogues_of(environment), [turn(5), turn(6)]
    for sample in mine:
        dialogues.submit("me", GROUP, sample, 20)
    dialogues.submit("you", GROUP, turn(7), 20)
    environment.reply(0, "1001")
    assert dialogues.ended("you", 0.0) == []  # which brings the first reply in
    dialogues.forget("me")
    environment.reply(1, "1002", status="error")
    environment.reply(2, "1003")
    assert dialogues.ended("me", 60.0) == [] and len(dialogues.ended("you", 60.0)) == 1
    assert all(sample.finish_reason == "turn" and len(sample.response_ids) == 1 for sample in mine)
    assert not dialogues._replies and not dialogues._calls
    dialogues.report("me")


def failing(environment, *statuses: str, owner: str = "me", dialogues: Dialogues | None = None) -> Dialogues:
    dialogues = dialogues or dialogues_of(environment)
    for status in statuses:
        dialogues.submit(owner, GROUP, turn(5), 20)
        texts = () if status != "ok" else ("1001",)
        environment.reply(dialogues._next - 1, *texts, status=status, detail=f"it went {status}")
        (sample,) = dialogues.ended(owner, 0.0)
        assert sample.environment_status == status
        assert sample.finish_reason == ("abort" if status == "ok" else "stop")
    return dialogues


@pytest.mark.parametrize(
    ("statuses", "said"), [(("ok", "ok"), ""), (("ok", "timeout", "error"), "2 of 3"), (("timeout", "timeout"), "2 of 2")]
)
def test_a_few_failed_calls_and_late_ones_are_only_warned_about_once(environment, statuses, said, caplog):
    dialogues = failing(environment, *statuses)
    assert not dialogues.is_broken("me")
    with caplog.at_level(logging.WARNING):
        dialogues.report("me")
        dialogues.report("me")
    what = f"{said} calls of environment.function failed, which ended their responses; the first: it went timeout (problem p)"
    assert [record.message for record in caplog.records] == ([what] if said else [])


def test_a_long_reason_is_told_on_one_line_without_its_middle(environment):
    dialogues = dialogues_of(environment)
    dialogues.submit("me", GROUP, turn(5), 20)
    environment.reply(0, status="error", detail="it raised Odd: <html>\n" + "x" * 100_000 + "\n(tools.py:7)")
    dialogues.ended("me", 0.0)
    with pytest.raises(UngradedError, match=r"Odd: <html> x+ \.\.\. x+ \(tools\.py:7\) \(problem p\); fix env") as raised:
        dialogues.report("me")
    assert len(str(raised.value)) < 1200


@pytest.mark.parametrize("statuses", [("error",), ("error", "error"), ("timeout", "error")])
def test_an_environment_none_of_whose_calls_succeeds_is_an_error(environment, statuses):
    dialogues = failing(environment, *statuses)
    assert dialogues.is_broken("me") and not dialogues.is_broken("you")
    with pytest.raises(UngradedError, match=f"{len(statuses)} of {len(statuses)} calls .* the first: it went {statuses[0]}"):
        dialogues.report("me")
    assert not dialogues.is_broken("me")
    dialogues.report("me")


def test_a_few_calls_that_all_fail_right_after_others_that_did_not_are_only_warned_about_once(environment, caplog):
    """With groups ready ahead, a step may need a single call."""
    dialogues = failing(environment, "ok")
    dialogues.report("me")
    dialogues.report("me")  # of a step without a call
    failing(environment, "error", dialogues=dialogues)
    assert not dialogues.is_broken("me")
    dialogues.report("me")
    assert "1 of 1 calls of environment.function failed" in caplog.text
    failing(environment, "error", dialogues=dialogues)
    with pytest.raises(UngradedError, match="1 of 1 calls"):
        dialogues.report("me")


def test_many_calls_that_all_fail_are_an_error_whatever_was_before(environment):
    dialogues = failing(environment, "ok")
    dialogues.report("me")
    failing(environment, *["error"] * 8, dialogues=dialogues)
    with pytest.raises(UngradedError, match="8 of 8 calls"):
        dialogues.report("me")


def ended_by(*statuses: str | None) -> list[Sample]:
    return [replace(turn(5, index=index), environment_status=status) for index, status in enumerate(statuses)]


def test_responses_that_all_end_by_failed_calls_are_an_error_although_other_calls_succeeded(environment):
    dialogues, responses = failing(environment, "ok", "error", "timeout"), ended_by("error", "timeout")
    assert dialogues.is_broken("me", responses) and not dialogues.is_broken("me")
    for _ in range(2):  # also without a call since the last report
        with pytest.raises(UngradedError, match=r"^failed calls .* all 2 responses; the last: it went timeout \(problem p\)"):
            dialogues.report("me", responses)
    with pytest.raises(UngradedError, match="the last: before the run was started again"):
        dialogues_of(environment).report("me", responses)


@pytest.mark.parametrize("statuses", [("error", "ok"), ("error", None), ("timeout", "timeout"), ()])
def test_responses_that_end_otherwise_or_all_by_late_calls_are_no_error(environment, statuses, caplog):
    dialogues, responses = failing(environment, "ok", "error", "timeout"), ended_by(*statuses)
    assert not dialogues.is_broken("me", responses)
    dialogues.report("me", responses)
    assert "2 of 3 calls of environment.function failed" in caplog.text


def test_another_owners_calls_neither_hide_failures_nor_are_blamed_for_them(environment):
    dialogues = failing(environment, "error")
    failing(environment, "ok", owner="you", dialogues=dialogues)
    dialogues.report("you")
    with pytest.raises(UngradedError, match="1 of 1 calls"):
        dialogues.report("me")


def test_a_reply_without_a_token_is_a_failed_call(environment):
    dialogues = dialogues_of(environment)
    dialogues.submit("me", GROUP, turn(5), 20)
    environment.reply(0, "")
    (sample,) = dialogues.ended("me", 0.0)
    assert (sample.finish_reason, sample.environment_status) == ("stop", "error") and len(sample.messages) == 1
    with pytest.raises(UngradedError, match=r"it returned a reply without a token \(problem p\)"):
        dialogues.report("me")


@pytest.mark.parametrize("where", ["submit", "poll"])
def test_what_the_user_must_fix_lets_the_run_save_what_it_has_trained(environment, where):
    """The trainer saves at an UngradedError, not at every UserError."""
    dialogues = dialogues_of(environment)
    if where == "submit":
        environment.error = UserError("fix it")
        with pytest.raises(UngradedError, match="fix it"):
            dialogues.submit("me", GROUP, turn(5), 20)
        return
    dialogues.submit("me", GROUP, turn(5), 20)
    environment.error = UserError("fix it")
    with pytest.raises(UngradedError, match="fix it"):
        dialogues.ended("me", 60.0)
    environment.error = None
    dialogues.submit("you", GROUP, turn(5), 20)  # the lock is free


def test_a_reply_that_the_template_refuses_is_a_failed_call(environment, caplog):
    """Such as two messages in a row of a role, after the first turn with two calls: it must not end a run of days."""

    def ids(reply, last):
        if reply[0]["content"] == "bad":
            raise UserError("the template refuses it")
        return ids_of(reply[0])

    dialogues, samples = Dialogues(environment, ids, words, max_turns=8), [turn(5), turn(6), turn(7)]
    for sample in samples:
        dialogues.submit("me", GROUP, sample, 20)
    for key, text in enumerate(("1001", "bad", "1002")):
        environment.reply(key, text)
    assert dialogues.ended("me", 0.0) == samples
    assert [(one.finish_reason, one.environment_status) for one in samples] == [
        ("abort", "ok"),
        ("stop", "error"),
        ("abort", "ok"),
    ]
    assert len(samples[1].messages) == 1 and not samples[1].loss_mask
    dialogues.report("me")
    assert "1 of 3 calls" in caplog.text and "the template refuses it" in caplog.text


def test_a_request_that_could_not_be_made_does_not_share_its_key_with_the_next_one(environment):
    dialogues, sample = dialogues_of(environment), turn(6)
    environment.error = UserError("no open files are left")
    with pytest.raises(UngradedError, match="no open files"):
        dialogues.submit("me", GROUP, turn(5), 20)
    environment.error = None
    dialogues.submit("me", GROUP, sample, 20)
    environment.reply(0)
    (key,) = environment.requests
    environment.reply(key)
    assert len(dialogues.ended("me", 0.0)) == 2


class Echo:
    """Replies to a request in the second `poll` after it."""

    def __init__(self) -> None:
        self._young, self._old, self.inside = [], [], 0

    def submit(self, key, request):
        self._enter()
        self._young.append((key, EnvironmentReply([{"role": "user", "content": "1001"}], "ok", "")))
        time.sleep(0)
        self.inside -= 1

    def poll(self, timeout_s):
        self._enter()
        found, self._old, self._young = self._old, self._young, []
        time.sleep(0)
        self.inside -= 1
        return found

    def _enter(self):
        self.inside += 1
        assert self.inside == 1  # a pool must be used by one thread at a time


def test_owners_in_threads_of_their_own_each_get_every_sample_back_once():
    dialogues, found, errors = dialogues_of(Echo()), {"me": Counter(), "you": Counter()}, []

    def talk(owner):
        try:
            samples = [turn(5, index=index) for index in range(300)]
            for begin in range(0, 300, 10):
                for sample in samples[begin : begin + 10]:
                    dialogues.submit(owner, GROUP, sample, 20)
                found[owner].update(id(one) for one in dialogues.ended(owner, 5.0))
            while sum(found[owner].values()) < 300:
                found[owner].update(id(one) for one in dialogues.ended(owner, 5.0))
            assert set(found[owner]) == {id(sample) for sample in samples}
            assert all(sample.finish_reason == "abort" for sample in samples)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=talk, args=(owner,), daemon=True) for owner in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert all(set(each.values()) == {1} and len(each) == 300 for each in found.values())


def test_an_owner_that_waits_for_a_slow_reply_does_not_keep_others_from_asking(environment):
    """Python's locks are not fair: with the lock held while it waits, each of these calls took about 0.1 s."""
    dialogues, done = dialogues_of(environment), threading.Event()
    dialogues.submit("slow", GROUP, turn(5), 20)

    def wait():
        while not done.is_set():
            dialogues.ended("slow", 1.0)

    held = []

    def poll(timeout_s):
        held.append(timeout_s)
        time.sleep(timeout_s)
        return []

    environment.poll = poll
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        for _ in range(200):
            dialogues.submit("quick", GROUP, turn(5), 20)
    finally:
        done.set()
        thread.join()
    assert held and not any(held)
