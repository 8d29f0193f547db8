"""Coroutine functions of users, as environments and as rewards: calls at once, limits, crashes, blocked event loops."""

from __future__ import annotations

import select
import time

import pytest

from etr_megatron.config import RewardConfig
from etr_megatron.platform import workers
from etr_megatron.platform.worker_process import WorkerProcess
from etr_megatron.reward import Grade, GradeRequest, GraderPool
from tests.environments import OK, all_replies, answers, ask, pool_of, said
from tests.runs import wait_for
from tests.test_environment_pool import LONG

pytestmark = pytest.mark.usefixtures("deadline")

REWARDS = """
import asyncio, os

began = 0

async def judge(prompt, response, answer, messages):
    global began
    began += 1
    while began % 5:
        await asyncio.sleep(0.01)
    if response == "die":
        os._exit(7)
    return {"score": float(response), "turns": len(messages)}

class Judge:
    async def __call__(self, prompt, response, answer):
        return await asyncio.sleep(0, 0.5)

judging = Judge()
decorated = lambda *args: judging(*args)
"""


@pytest.fixture
def environment(user_environment):
    return user_environment.replace("by_command", "later")


def test_calls_of_one_process_are_made_at_once(environment):
    with pool_of(environment) as pool:
        assert answers(pool, *["all_of(50)"] * 50) == [said("together")] * 50


def test_a_process_has_as_many_calls_as_it_may_and_all_processes_about_as_many(environment, monkeypatch, tmp_path):
    send, had = WorkerProcess.send, []
    monkeypatch.setattr(WorkerProcess, "send", lambda self, job: send(self, job) or had.append(len(self.inflight)))
    with pool_of(environment, workers=3, concurrency=4) as pool:
        for key in range(13):
            pool.submit(key, ask("appears('go')"))
        assert had == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]  # the last one waits
        (tmp_path / "go").touch()
        assert all_replies(pool) == dict.fromkeys(range(13), said("go")) and len(had) == 13


@pytest.mark.slow
def test_a_late_call_is_cancelled_also_if_it_ignores_that_and_the_process_goes_on(environment, tmp_path):
    with pool_of(environment, timeout_s=5.0) as pool:
        pids = pool.worker_pids
        late, quick, stubborn, none = answers(pool, "appears('never')", "'quick'", "ignore_cancellation()", "None")
        assert (quick, none, answers(pool, "'on'")) == (said("quick"), OK, [said("on")])
        assert pool.worker_pids == pids and (tmp_path / "cancelled").exists()
    assert {(reply.messages, reply.status) for reply in (late, stubborn)} == {(None, "timeout")}
    assert late.detail == "no reply within environment.timeout_s = 5.0 s; the call was cancelled"


@pytest.mark.slow
def test_a_call_that_blocks_the_event_loop_is_found_among_those_beside_it(environment, monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "_GRACE_S", 0.5)
    (tmp_path / "go").touch()
    with pool_of(environment, timeout_s=3.0) as pool:
        before = pool.worker_pids
        replies = answers(pool, *["appears('go')"] * 3, "hang()", *["appears('go')"] * 3)
        assert pool.worker_pids != before
    blocked = replies.pop(3)
    assert replies == [said("go")] * 6
    assert blocked.status == "timeout"
    assert blocked.detail.endswith(" s; the call blocked its event loop, so the process was killed")


def test_a_call_that_crashes_its_process_is_found_among_those_beside_it(environment, tmp_path):
    (tmp_path / "go").touch()
    with pool_of(environment, workers=2) as pool:
        replies = answers(pool, *["appears('go')"] * 5, "os._exit(7)", "die_once('died')", *["appears('go')"] * 5)
    failed, once = replies[5:7]
    assert replies[:5] + replies[7:] == [said("go")] * 10 and once == said("alive")
    assert failed.detail == "the environment's process ended (exit code 7) in this call, 2 times"


def test_calls_after_a_crash_do_not_wait_for_those_that_are_made_again(environment, tmp_path, caplog):
    with pool_of(environment, workers=2) as pool:
        for key in range(6):  # three for each process, one of them with the crash
            pool.submit(key, ask("die_once('died')" if key == 4 else "appears('go')"))
        wait_for((tmp_path / "died").exists)
        while not caplog.messages:
            assert pool.poll(0.01) == []
        for key in range(6, 20):
            pool.submit(key, ask("'quick'"))
        found: dict = {}
        while len(found) < 14:
            found |= pool.poll(600.0)
        assert {key: reply for key, reply in found.items() if key > 5} == dict.fromkeys(range(6, 20), said("quick"))
        (tmp_path / "go").touch()
        found |= all_replies(pool)
    assert [found[key] for key in range(6)] == [said("go")] * 4 + [said("alive"), said("go")]
    what = "an environment process ended (exit code 7) with 3 calls, which are made again, one at a time"
    assert caplog.messages == [f"environment.function: {what}"]


def test_replies_that_came_in_time_are_in_time_however_late_they_are_read(environment, monkeypatch):
    monotonic, late_s = time.monotonic, [0.0]
    with pool_of(environment) as pool:
        for key in range(3):
            pool.submit(key, ask(f"'{key}' * {LONG}"))  # longer than the pipe holds
        assert select.select([pool._pool.workers[0].read_fd], [], [], 300)[0]
        monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(late_s))
        late_s.append(1e5)
        assert all_replies(pool) == {key: said(str(key) * LONG) for key in range(3)}


def test_the_time_of_long_requests_begins_when_they_are_written(environment, monkeypatch):
    monotonic, late_s = time.monotonic, [0.0]
    with pool_of(environment) as pool:
        (worker,) = pool._pool.workers
        for key in range(3):
            pool.submit(key, ask("str(len(answer))", "y" * (LONG + key)))
        assert worker.wants_to_write
        monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(late_s))
        late_s.append(1e5)  # in which the pool was not looked at
        assert select.select([], [worker.write_fd], [], 300)[1]
        assert all_replies(pool) == {key: said(str(LONG + key)) for key in range(3)} and pool._pool.workers == [worker]


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)


def test_a_reward_may_be_a_coroutine_function(rewards):
    requests = [GradeRequest("p", response, "a") for response in ("0.5", "1", "7", "x", "0.25")]
    with GraderPool(RewardConfig(function="my_judges:judge", workers=1)) as pool:
        half, one, seven, wrong, quarter = pool.grade(requests)
        assert pool.grade(requests)[0] == half == Grade(0.5, "ok", "", {"turns": 2.0})
    assert (one.reward, quarter.reward) == (1.0, 0.25)
    assert seven.status == "out_of_range" and wrong.detail.startswith("my_judges:judge raised ValueError: could not convert")


def test_a_reward_may_be_an_object_with_a_coroutine_to_call(rewards):
    with GraderPool(RewardConfig(function="my_judges:judging", workers=1)) as pool:
        assert pool.grade([GradeRequest("p", "r", "a")] * 3) == [Grade(0.5, "ok", "")] * 3
    with GraderPool(RewardConfig(function="my_judges:decorated", workers=1)) as pool:
        assert pool.grade([GradeRequest("p", "r", "a")] * 3) == [Grade(0.5, "ok", "")] * 3
