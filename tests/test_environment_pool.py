"""Environments in processes: order, limits, crashes, replacement, lifetime."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from etr_megatron.errors import UserError
from etr_megatron.platform.worker_process import WorkerProcess
from etr_megatron.platform.workers import WorkerPool
from tests.environments import all_replies, answers, ask, pool_of, said
from tests.runs import REPO, gone, wait_for

pytestmark = pytest.mark.usefixtures("deadline")

LONG = 5_000_000
"""Characters of a text longer than any pipe holds."""


@pytest.fixture
def later(monkeypatch):
    """Lets so many seconds pass, as far as pools know."""
    monotonic, late_s = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(late_s))
    return late_s.append


def test_many_requests_get_their_own_replies_from_few_workers(user_environment):
    with pool_of(user_environment, workers=3) as pool:
        for number in range(300):
            pool.submit(1000 - number, ask(f"'{number} ' + answer", str(number)))
        assert pool.under_way == 300
        assert all_replies(pool) == {1000 - number: said(f"{number} {number}") for number in range(300)}
        assert pool.under_way == 0


def test_nothing_is_under_way_at_first_and_a_poll_then_returns_at_once(user_environment):
    with pool_of(user_environment, workers=2) as pool:
        assert pool.under_way == 0 and pool.poll(1e6) == []
        assert answers(pool, "'hi'") == [said("hi")]
        assert pool.under_way == 0 and pool.poll(1e6) == []


def test_a_slow_call_delays_nobody_and_keeps_its_worker(user_environment, tmp_path):
    with pool_of(user_environment, workers=2) as pool:
        pool.submit(0, ask("wait_for('go')"))
        for key in range(1, 41):
            pool.submit(key, ask("'quick'"))
        found: dict = {}
        while len(found) < 40:
            found |= pool.poll(600.0)
        assert found == {key: said("quick") for key in range(1, 41)} and pool.under_way == 1
        assert pool.poll(0.0) == [] and pool.poll(0.05) == []
        (tmp_path / "go").touch()
        assert pool.poll(600.0) == [(0, said("go"))]


def test_replies_come_in_the_order_in_which_calls_end(user_environment, tmp_path):
    with pool_of(user_environment, workers=3) as pool:
        for key, name in enumerate("abc"):
            pool.submit(key, ask(f"wait_for('{name}')"))
        for key in (2, 0, 1):
            (tmp_path / "abc"[key]).touch()
            assert [found for found, _ in pool.poll(600.0)] == [key]


def test_a_worker_begins_when_asked_and_goes_on_when_its_reply_is_taken(user_environment, tmp_path):
    with pool_of(user_environment) as pool:
        pool.submit(0, ask("open('first', 'w').close() or 'first'"))
        pool.submit(1, ask("open('second', 'w').close() or 'second'"))
        wait_for((tmp_path / "first").exists)  # without a poll
        assert pool.poll(600.0) == [(0, said("first"))]
        wait_for((tmp_path / "second").exists)
        assert pool.poll(600.0) == [(1, said("second"))]


def test_a_worker_has_one_request_at_a_time(user_environment, monkeypatch):
    send, ahead = WorkerProcess.send, []
    monkeypatch.setattr(WorkerProcess, "send", lambda self, job: send(self, job) or ahead.append(len(self.inflight)))
    with pool_of(user_environment, workers=2) as pool:
        assert len(answers(pool, *["'x'"] * 200)) == 200
    assert set(ahead) == {1}


def test_a_stuck_call_has_its_process_replaced_and_others_go_on(user_environment, only_what_hangs_is_late):
    with pool_of(user_environment, workers=2, timeout_s=1.0) as pool:
        before = pool.worker_pids
        replies = answers(pool, "'a'", "hang()", "'b'", "'c'", "hang()", "'d'", "hang()")
        assert [reply.status for reply in replies] == ["ok", "timeout", "ok", "ok", "timeout", "ok", "timeout"]
        assert all(reply.messages is None for reply in replies if reply.status == "timeout")
        assert replies[1].detail == "no reply within environment.timeout_s = 1.0 s; the process was killed"
        assert len(pool.worker_pids) == 2 and any(gone(pid) for pid in before)
        assert answers(pool, "'on'") == [said("on")]


@pytest.mark.parametrize(("code", "how"), [("os._exit(7)", "exit code 7"), ("os.kill(os.getpid(), 11)", "signal SIGSEGV")])
def test_a_call_that_crashes_two_processes_is_an_error(user_environment, code, how):
    with pool_of(user_environment) as pool:
        before, failed, once, after = answers(pool, "'before'", code, "die_once('died')", "'after'")
    assert (before, once, after) == (said("before"), said("alive"), said("after"))
    assert (failed.messages, failed.status) == (None, "error")
    assert failed.detail == f"the environment's process ended ({how}) in this call, 2 times"


def test_workers_that_died_while_idle_are_replaced(user_environment):
    with pool_of(user_environment, workers=2) as pool:
        for pid in pool.worker_pids:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: all(gone(pid) for pid in pool.worker_pids))
        assert answers(pool, "'a'", "'b'", "'c'") == [said("a"), said("b"), said("c")]


def test_a_reply_that_came_in_time_is_in_time_however_late_it_is_read(user_environment, later):
    with pool_of(user_environment, workers=2) as pool:
        pool.submit(0, ask("'short'"))
        pool.submit(1, ask(f"'x' * {LONG}"))  # longer than the pipe holds
        for worker in pool._pool.workers:
            assert select.select([worker.read_fd], [], [], 300)[0]
        later(1000.0)
        assert all_replies(pool) == {0: said("short"), 1: said("x" * LONG)}


def test_a_call_s_time_begins_when_its_worker_has_the_request(user_environment, later, only_what_hangs_is_late, tmp_path):
    with pool_of(user_environment) as pool:
        (worker,) = pool._pool.workers
        pool.submit(0, ask("wait_for('go') # hang"))
        later(599.0)
        pool.submit(1, ask("wait_for('gone on') # hang"))  # waits for the worker without being late for it
        assert pool.poll(0.0) == []
        (tmp_path / "go").touch()
        assert pool.poll(600.0) == [(0, said("go"))]
        later(599.0)
        (tmp_path / "gone on").touch()
        assert pool.poll(600.0) == [(1, said("gone on"))] and pool._pool.workers == [worker]
        later(599.0)  # with nothing to do, and then within the limit again
        assert answers(pool, "'x' # hang") == [said("x")]


def test_a_request_longer_than_a_pipe_holds_blocks_nobody_and_its_time_begins_when_it_is_written(user_environment, later):
    with pool_of(user_environment) as pool:
        (worker,) = pool._pool.workers
        os.kill(worker.pid, signal.SIGSTOP)  # reads nothing
        for key in range(3):
            pool.submit(key, ask("str(len(answer))", "y" * (LONG + key)))
        assert worker.wants_to_write and pool.poll(0.0) == []
        later(599.0)
        os.kill(worker.pid, signal.SIGCONT)
        assert select.select([], [worker.write_fd], [], 300)[1]
        later(599.0)
        assert all_replies(pool) == {key: said(str(LONG + key)) for key in range(3)} and pool._pool.workers == [worker]


def test_a_worker_that_does_not_read_its_request_is_late(user_environment, later):
    with pool_of(user_environment) as pool:
        (worker,) = pool._pool.workers
        os.kill(worker.pid, signal.SIGSTOP)
        pool.submit(0, ask("'never'", "y" * LONG))
        later(601.0)
        ((key, reply),) = pool.poll(0.0)
        assert (key, reply.status) == (0, "timeout") and gone(worker.pid)


def in_thread(act):
    results: list = []
    thread = threading.Thread(target=lambda: results.append(act()), daemon=True)
    thread.start()
    thread.join()
    return results[0]


def test_threads_may_use_a_pool_one_after_the_other(user_environment, only_what_hangs_is_late):
    pool = in_thread(lambda: pool_of(user_environment, timeout_s=1.0))
    with pool:
        in_thread(lambda: pool.submit(0, ask("hang()")))
        assert [reply.status for _, reply in in_thread(lambda: pool.poll(600.0))] == ["timeout"]
        in_thread(lambda: pool.submit(1, ask("'a'")))
        assert pool.poll(600.0) == [(1, said("a"))]
        pids = pool.worker_pids  # of the replacement, started in a thread that has ended
        assert answers(pool, "'b'") == [said("b")] and pool.worker_pids == pids


def test_a_pool_sleeps_while_calls_run(user_environment, monkeypatch):
    wait, waits = WorkerPool._wait, []
    monkeypatch.setattr(WorkerPool, "_wait", lambda self, *times: waits.append(self) or wait(self, *times))
    with pool_of(user_environment, workers=2) as pool:
        waits.clear()
        assert answers(pool, *["time.sleep(0.5) or 'a'"] * 2) == [said("a")] * 2
    assert len(waits) <= 4


def test_close_ends_idle_and_busy_workers_and_further_use_is_refused(user_environment):
    pool = pool_of(user_environment, workers=2)
    pids = pool.worker_pids
    for pid in pids:
        os.kill(pid, signal.SIGINT)  # Ctrl-C goes to all processes of a terminal
    assert answers(pool, "'a'", "'b'") == [said("a"), said("b")] and pool.worker_pids == pids
    pool.submit(0, ask("hang()"))
    pool.close()
    pool.close()
    assert len(pids) == 2 and all(map(gone, pids)) and pool.worker_pids == []
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(1, ask("'x'"))


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found in Linux's /proc")
@pytest.mark.parametrize("how", ["timeout", "close"])
def test_what_a_killed_call_has_started_is_killed_with_it(user_environment, tmp_path, later, how):
    with pool_of(user_environment) as pool:
        pool.submit(0, ask("with_a_child(hang)"))
        wait_for((tmp_path / "child").exists)
        child = int((tmp_path / "child").read_text())
        assert not gone(child)
        if how == "timeout":
            later(601.0)
            assert pool.poll(0.0)[0][1].status == "timeout"
        else:
            pool.close()
        wait_for(lambda: gone(child))


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found in Linux's /proc")
@pytest.mark.parametrize("function", ["by_command", "later"])
def test_what_a_call_has_left_running_is_killed_when_its_process_ends(user_environment, tmp_path, function):
    with pool_of(user_environment.replace("by_command", function)) as pool:
        assert answers(pool, "with_a_child(lambda: 'on')") == [said("on")]
        child = int((tmp_path / "child").read_text())
        assert not gone(child)
    wait_for(lambda: gone(child))


def test_idle_and_stuck_workers_end_when_their_parent_is_killed(user_environment, tmp_path):
    code = f"""
import time
from tests.environments import ask, pool_of
pool = pool_of({user_environment!r}, workers=2)
pool.submit(0, ask("open('busy', 'w').close() or hang()"))
print(*pool.worker_pids, flush=True)
time.sleep(600)
"""
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        wait_for((tmp_path / "busy").exists)
        assert len(pids) == 2 and not any(gone(pid) for pid in pids)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    wait_for(lambda: all(gone(pid) for pid in pids))


def test_open_files_are_allowed_for_many_workers_and_what_the_system_does_not_allow_is_said(user_environment, monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 2**19))
    monkeypatch.setattr(resource, "setrlimit", lambda what, both: limits.append((what, both)))

    def no_more_files(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("etr_megatron.platform.worker_process.popen_from_lasting_thread", lambda *_, **__: no_more_files())
    with pytest.raises(UserError, match=r"^environment\.workers=900: so many processes need more open files than the system"):
        pool_of(user_environment, workers=900)
    assert limits == [(resource.RLIMIT_NOFILE, (2824, 2**19))]
