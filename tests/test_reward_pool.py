"""Graders in processes: limits, crashes, replacement, lifetime."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from etr_megatron.config import RewardConfig
from etr_megatron.errors import UserError
from etr_megatron.platform.worker_process import Job, WorkerProcess
from etr_megatron.platform.workers import WorkerPool
from etr_megatron.reward import Grade, GradeRequest, GraderPool
from tests.graders import request
from tests.runs import REPO, gone, wait_for

pytestmark = pytest.mark.usefixtures("deadline")


def test_timeout_kills_the_grader_and_the_rest_is_graded(user_rewards, only_what_hangs_is_late):
    config = RewardConfig(function=user_rewards, workers=2, timeout_s=1.0, range_min=-1.0)
    with GraderPool(config) as pool:
        before = pool.worker_pids
        # Each grader is given one that hangs before anything is graded.
        grades = pool.grade([request(r) for r in ["0.5", "hang", *["0.25"] * 5, "hang", *["0.25"] * 15, "1"]])
        assert [grade.status for grade in grades] == ["ok", "timeout", *["ok"] * 5, "timeout", *["ok"] * 16]
        assert [grade.reward for grade in grades] == [0.5, -1.0, *[0.25] * 5, -1.0, *[0.25] * 15, 1.0]
        assert "reward.timeout_s = 1.0" in grades[1].detail
        assert set(before).isdisjoint(pool.worker_pids)
        assert all(gone(pid) for pid in before)
        assert pool.grade([request("0.75")]) == [Grade(0.75, "ok", "")]
        replacements = pool.worker_pids
    assert all(gone(pid) for pid in replacements)


SLOW_REWARD = """
import os, sys, time
try:
    os.close(os.open(__file__ + ".first", os.O_CREAT | os.O_EXCL))
except FileExistsError:
    time.sleep(1)
    WHAT_THE_OTHERS_DO
def f(prompt, response, answer):
    return 1.0
"""


@pytest.fixture
def slow_reward(tmp_path, monkeypatch):
    """A module on PYTHONPATH that one process imports at once; all others run `what_the_others_do` after a second."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(what_the_others_do: str, is_first_too: bool = False) -> str:
        (tmp_path / "slow_rewards.py").write_text(SLOW_REWARD.replace("WHAT_THE_OTHERS_DO", what_the_others_do))
        if is_first_too:
            (tmp_path / "slow_rewards.py.first").write_text("")
        return "slow_rewards:f"

    return write


def test_slow_start_of_a_grader_costs_no_answer_its_time(user_rewards, monkeypatch):
    """Each start takes half an hour, as far as the pool knows, and an answer has ten minutes."""
    receive, monotonic, late_s = WorkerProcess.receive, time.monotonic, []

    def get_ready_late(self):
        messages, ended = receive(self)
        late_s.extend([1800.0] * any("ready" in message for message in messages))
        return messages, ended

    monkeypatch.setattr(WorkerProcess, "receive", get_ready_late)
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(late_s))
    with GraderPool(RewardConfig(function=user_rewards, workers=1, timeout_s=600.0)) as pool:
        grades = pool.grade([request("0.5"), request("die once"), request("0.25")])
    assert [grade.status for grade in grades] == ["ok"] * 3 and len(late_s) == 2


def test_a_pool_is_there_when_its_last_grader_is(slow_reward):
    with pytest.raises(UserError, match=r"ended while starting \(exit code 3\)"):
        GraderPool(RewardConfig(function=slow_reward("os._exit(3)"), workers=2))


def test_a_grader_that_never_gets_ready_stops_the_job(slow_reward, monkeypatch):
    monkeypatch.setattr("etr_megatron.platform.workers.STARTUP_TIMEOUT_S", 0.5)
    with pytest.raises(UserError, match=r"a grader process was not ready after 0 s"):
        GraderPool(RewardConfig(function=slow_reward("time.sleep(600)", True), workers=1))


def test_answers_are_spread_over_the_graders(user_rewards):
    with GraderPool(RewardConfig(function=user_rewards, workers=2, range_max=1e9)) as pool:
        assert {grade.reward for grade in pool.grade([request("os.getpid()")] * 2)} == set(pool.worker_pids)


def test_requests_are_sent_ahead_up_to_a_limit_and_one_by_one_at_the_end(user_rewards, monkeypatch):
    send, ahead = WorkerProcess.send, []
    monkeypatch.setattr(WorkerProcess, "send", lambda self, job: send(self, job) or ahead.append(len(self.inflight)))
    with GraderPool(RewardConfig(function=user_rewards, workers=2, range_max=1e9)) as pool:
        grades = pool.grade([request(f"{number}") for number in range(400)])
    assert [grade.reward for grade in grades] == list(range(400))
    assert max(ahead) == 32 and ahead[-6:] == [1] * 6  # so that no grader is left with many while the other idles


def test_a_reward_gets_prompt_and_answer_and_one_thread_and_is_in_time_however_late_it_is_read(user_rewards, monkeypatch):
    wait, monotonic, late_s = WorkerPool._wait, time.monotonic, []

    def read_late(self, now, end):
        found = wait(self, now, end)
        late_s.extend([1000.0] * len(found))
        return found

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code = "float(prompt == 'prompt' and answer == '5' and os.environ['OMP_NUM_THREADS'] == '1')"
    with GraderPool(RewardConfig(function=user_rewards, workers=1)) as pool:
        monkeypatch.setattr(WorkerPool, "_wait", read_late)
        monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(late_s))
        assert pool.grade([request(code)]) == [Grade(1.0, "ok", "")] and late_s


def test_a_reply_that_comes_while_the_job_is_suspended_is_in_time(user_rewards, monkeypatch):
    wait, monotonic, late_s = WorkerPool._wait, time.monotonic, []

    def suspended_at_first(self, now, end):
        if late_s:
            return wait(self, now, end)
        assert select.select([self.workers[0].read_fd], [], [], 300)[0]  # the grader answers
        late_s.append(1000.0)
        return []

    with GraderPool(RewardConfig(function=user_rewards, workers=1)) as pool:
        monkeypatch.setattr(WorkerPool, "_wait", suspended_at_first)
        monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(late_s))
        assert pool.grade([request("0.5")]) == [Grade(0.5, "ok", "")]


def test_an_answers_clock_begins_when_the_answer_before_it_is_graded():
    worker = object.__new__(WorkerProcess)
    worker.inflight, worker.head_since = {index: Job(index, b"") for index in range(2)}, 0.0
    begin = time.monotonic()
    worker.finish(0)
    assert list(worker.inflight) == [1] and worker.head_since >= begin
    worker.finish(1)
    assert not worker.inflight and worker.head_since is None


def test_requests_sent_ahead_leave_the_clock_of_the_first_one_as_it_is():
    reading, writing = os.pipe()
    worker = object.__new__(WorkerProcess)
    worker.inflight, worker.head_since, worker._outgoing = {}, None, bytearray()
    with os.fdopen(reading, "rb", 0) as received, os.fdopen(writing, "wb", 0) as worker._stdin:
        worker.send(Job(0, b"first\n"))
        begun = worker.head_since
        time.sleep(0.01)
        worker.send(Job(1, b"second\n"))
        assert received.read(100) == b"first\nsecond\n" and worker.head_since == begun


def test_graders_that_died_between_two_rounds_are_replaced(user_rewards):
    with GraderPool(RewardConfig(function=user_rewards, workers=2)) as pool:
        for pid in pool.worker_pids:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: all(gone(pid) for pid in pool.worker_pids))
        assert pool.grade([request("0.5")]) == [Grade(0.5, "ok", "")]


@pytest.mark.parametrize(("response", "how"), [("die", "exit code 7"), ("segfault", "signal SIGSEGV")])
def test_an_answer_that_crashes_two_graders_is_an_error(user_rewards, response, how):
    with GraderPool(RewardConfig(function=user_rewards, workers=1, range_min=-1.0)) as pool:
        # Some are sent ahead; losing their grader to another one does not count against them.
        grades = pool.grade([request(one) for one in ("0.5", response, "die once", *["0.25"] * 20)])
    wanted = [(0.5, "ok"), (-1.0, "error"), (1.0, "ok"), *[(0.25, "ok")] * 20]
    assert [(grade.reward, grade.status) for grade in grades] == wanted
    assert f"({how}) on this answer, 2 times" in grades[1].detail


def test_a_crash_that_does_not_come_again_costs_nothing(user_rewards):
    with GraderPool(RewardConfig(function=user_rewards, workers=1)) as pool:
        assert pool.grade([request("die once"), request("0.5")]) == [Grade(1.0, "ok", ""), Grade(0.5, "ok", "")]


def test_an_interrupted_round_leaves_no_reply_for_the_next(user_rewards, monkeypatch):
    with GraderPool(RewardConfig(function=user_rewards, workers=2)) as pool:
        with monkeypatch.context() as patch:
            patch.setattr("etr_megatron.platform.workers.WorkerPool._wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pool.grade([request("0.5")] * 10)
        assert [grade.reward for grade in pool.grade([request("1")] * 4)] == [1.0] * 4


def in_thread(act):
    results: list = []
    thread = threading.Thread(target=lambda: results.append(act()), daemon=True)
    thread.start()
    thread.join()
    return results[0]


def test_graders_outlive_the_thread_that_started_them(user_rewards, only_what_hangs_is_late):
    pool = in_thread(lambda: GraderPool(RewardConfig(function=user_rewards, workers=1, timeout_s=1.0)))
    with pool:
        (grade,) = in_thread(lambda: pool.grade([request("hang")]))
        assert grade.status == "timeout"
        assert in_thread(lambda: pool.grade([request("0.5")])) == [Grade(0.5, "ok", "")]
        pids = pool.worker_pids  # of the replacement, started in a thread that has ended
        time.sleep(0.3)
        assert not any(gone(pid) for pid in pids)
        assert pool.grade([request("0.25")]) == [Grade(0.25, "ok", "")]
        assert pool.worker_pids == pids


def test_concurrent_rounds_do_not_mix(user_rewards):
    with GraderPool(RewardConfig(function=user_rewards, workers=2)) as pool:
        results: dict[int, list[float]] = {}

        def act(n: int) -> None:
            results[n] = [grade.reward for grade in pool.grade([request(f"{n}/8")] * 50)]

        threads = [threading.Thread(target=act, args=(n,), daemon=True) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {n: [n / 8] * 50 for n in range(4)}


def test_what_another_thread_submits_during_a_round_is_graded_meanwhile(user_rewards, tmp_path):
    when_told = "list(iter(lambda: os.path.exists('go') or time.sleep(0.05), True)) and 0.5 or 0.5"
    with GraderPool(RewardConfig(function=user_rewards, workers=2)) as pool:
        found: list[Grade] = []
        grading = threading.Thread(target=lambda: found.extend(pool.grade([request(when_told)])), daemon=True)
        grading.start()
        wait_for(lambda: pool._pool.under_way)
        keys = pool.submit([request(one) for one in ("0.25", "1")])
        grades: dict[int, Grade] = {}
        wait_for(lambda: grades.update(pool.poll(set(keys), 0.0)) or len(grades) == 2)
        assert [grades[key].reward for key in keys] == [0.25, 1.0] and not found
        (tmp_path / "go").touch()
        grading.join(300)
    assert found == [Grade(0.5, "ok", "")]


def test_close_ends_the_graders_and_further_use_is_refused(user_rewards):
    pool = GraderPool(RewardConfig(function=user_rewards, workers=2))
    pids = pool.worker_pids
    for pid in pids:
        os.kill(pid, signal.SIGINT)  # Ctrl-C goes to all processes of a terminal
    assert len(pids) == 2 and pool.grade([request("1")] * 2) == [Grade(1.0, "ok", "")] * 2 and pool.worker_pids == pids
    pool.close()
    pool.close()
    assert all(gone(pid) for pid in pids) and pool.worker_pids == []
    with pytest.raises(RuntimeError, match="closed"):
        pool.grade([request("1")])


def test_a_round_of_another_thread_is_finished_before_the_pool_closes(user_rewards, tmp_path):
    pool = GraderPool(RewardConfig(function=user_rewards, workers=1))
    found: list[Grade] = []
    when_told = "list(iter(lambda: os.path.exists('go') or time.sleep(0.05), True)) and 0.5 or 0.5"
    grading = threading.Thread(target=lambda: found.extend(pool.grade([request(when_told)] * 2)), daemon=True)
    grading.start()
    wait_for(pool._lock.locked)
    threading.Timer(0.3, (tmp_path / "go").touch).start()
    pool.close()
    grading.join(300)
    assert found == [Grade(0.5, "ok", "")] * 2


def test_one_grader_that_does_not_end_takes_no_other_ones_time_to_end_by_itself(user_rewards, tmp_path, monkeypatch):
    pool = GraderPool(RewardConfig(function=user_rewards, workers=3))
    stuck, *others = pool.worker_pids
    assert pool.grade([request(f"hold({stuck})")] * 3) == [Grade(1.0, "ok", "")] * 3
    close = WorkerProcess.close

    def close_when_the_others_have_ended(process, deadline):
        if process.pid == stuck:
            wait_for(lambda: all((tmp_path / f"ended {pid}").exists() for pid in others))
        return close(process, deadline)

    monkeypatch.setattr(WorkerProcess, "close", close_when_the_others_have_ended)
    pool.close()
    assert gone(stuck)
    assert {path.name for path in tmp_path.glob("ended *")} == {f"ended {pid}" for pid in others}


def test_answers_and_details_longer_than_a_pipe_holds_arrive_whole_and_so_does_half_a_character(user_rewards):
    sizes = (200_000, 3, 300_000, 150_000)
    asked = [GradeRequest("p", f"len(answer) + {number}", "5" * size) for number, size in enumerate(sizes)]
    asked.insert(2, request("exec('raise ValueError(str(7) * 250_000)')"))
    asked.insert(3, request("float(answer == chr(0xD800))", "\ud800"))  # as JSON in a data file may have it
    with GraderPool(RewardConfig(function=user_rewards, workers=1, range_max=1e9)) as pool:
        grades = pool.grade(asked)
    assert [grade.reward for grade in grades] == [200_000.0, 4.0, 0.0, 1.0, 300_002.0, 150_003.0]
    detail, _, line = grades[2].detail.rpartition(" (")
    assert detail == f"{user_rewards} raised ValueError: {'7' * 250_000}" and ".py:" in line
    assert (grades[2].reward, grades[2].status) == (0.0, "error")


def test_the_pool_sleeps_while_graders_think(user_rewards, monkeypatch):
    wait, waits = WorkerPool._wait, []
    monkeypatch.setattr(WorkerPool, "_wait", lambda self, *times: waits.append(self) or wait(self, *times))
    with GraderPool(RewardConfig(function=user_rewards, workers=2)) as pool:
        waits.clear()
        assert pool.grade([request("time.sleep(0.5) or 0.5")] * 2) == [Grade(0.5, "ok", "")] * 2
    assert len(waits) <= 10  # it looks for other threads' requests now and then


def test_the_pool_wakes_at_the_first_deadline_also_while_another_grader_starts(user_rewards):
    with GraderPool(RewardConfig(function=user_rewards, workers=2, timeout_s=0.3)) as pool:
        busy, starting = pool._pool.workers
        busy.head_since, starting.ready, starting.started = time.monotonic(), False, time.monotonic()
        assert pool._pool._wait(busy.head_since, busy.head_since + 600) == [] and 0.2 < time.monotonic() - busy.head_since < 20


def test_a_grader_with_a_thread_of_the_users_that_does_not_end_is_killed(tmp_path, monkeypatch):
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\ndef f(p, r, a): ...\n"
    (tmp_path / "threaded_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with GraderPool(RewardConfig(function="threaded_rewards:f", workers=1)) as pool:
        pids = pool.worker_pids
    assert all(map(gone, pids))


def test_idle_and_stuck_graders_end_when_their_parent_is_killed(user_rewards, tmp_path):
    code = f"""
import sys, threading, time
from etr_megatron.config import RewardConfig
from etr_megatron.reward import GradeRequest, GraderPool
pool = GraderPool(RewardConfig(function={user_rewards!r}, workers=2, timeout_s=600.0))
threading.Thread(target=lambda: pool.grade([GradeRequest("", "hang", "")]), daemon=True).start()
while not any(worker.inflight for worker in pool._pool.workers):
    time.sleep(0.05)
print(*pool.worker_pids, flush=True)
time.sleep(600)
"""
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(gone(pid) for pid in pids)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    wait_for(lambda: all(gone(pid) for pid in pids))
