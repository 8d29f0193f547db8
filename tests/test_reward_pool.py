"""Graders in processes: limits, crashes, replacement, lifetime."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from etr_megatron.config import RewardConfig
from etr_megatron.errors import UserError
from etr_megatron.reward import Grade, GradeRequest, GraderPool

REPO = Path(__file__).parents[1]
USER_REWARDS = """
import os, sys, time

def by_command(prompt, response, answer):
    if response == "hang":
        while True:
            pass
    if response == "die":
        os._exit(7)
    if response == "segfault":
        os.kill(os.getpid(), 11)
    if response == "die once":
        flag = os.path.join(os.path.dirname(__file__), "died")
        if not os.path.exists(flag):
            open(flag, "w").close()
            os._exit(7)
        return 1.0
    if response == "sys.exit":
        raise SystemExit(3)
    if response == "raise":
        raise ValueError("no such thing")
    if response == "print":
        print("noise" * 1000)
        os.write(1, b"raw noise")
        return 0.25 if sys.stdin.read() == "" else 0.0
    if response == "pid":
        return os.getpid()
    if response == "torch":
        return "torch" in sys.modules
    return eval(response)

not_callable = 3
"""


@pytest.fixture
def user_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(USER_REWARDS)
    monkeypatch.chdir(tmp_path)
    return "my_rewards:by_command"


@pytest.fixture(scope="module")
def math_pool():
    with GraderPool(RewardConfig(timeout_s=60.0)) as pool:
        yield pool


def request(response: str, answer: str = "5") -> GradeRequest:
    return GradeRequest("prompt", response, answer)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


EQUIVALENT = [
    ("x+1", "1+x"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"\{1,2,3\}", r"\{3,2,1\}"),
    ("[0,1)", r"\left[0, 1\right)"),
    (r"(-\infty,2]\cup[3,\infty)", r"(-\infty, 2] \cup [3, \infty)"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("0.5", r"\frac{\sqrt{1}}{2}"),
    ("(1,2)", "(1, 2)"),
    ("5", "x=5"),
    ("90", r"90^\circ"),
    ("12", r"12\text{ cm}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("1.5", r"1\frac{1}{2}"),
]
DIFFERENT = [
    ("x+1", "x+2"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("[0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"),
    (r"\sqrt{8}", r"3\sqrt{2}"),
    ("Friday", "Monday"),
    ("5", r"\pi"),
    ("5", r"\frac{"),
    ("5", r"}{\right)^_"),
    ("5", "seventy"),
]


def test_symbolic_answers(math_pool):
    requests = [request(rf"\boxed{{{candidate}}}", reference) for reference, candidate in EQUIVALENT + DIFFERENT]
    grades = math_pool.grade(requests)
    assert all(grade.status == "ok" for grade in grades)
    wrong = [pair for pair, grade in zip(EQUIVALENT, grades, strict=False) if grade.reward != 1.0]
    right = [pair for pair, grade in zip(DIFFERENT, grades[len(EQUIVALENT) :], strict=True) if grade.reward != 0.0]
    assert (wrong, right) == ([], [])


def test_gsm8k_reference_is_graded_and_order_is_kept(math_pool):
    requests = [request(f"It is {n}.", f"work {n}+1\n#### {n + n % 2}") for n in range(512)]
    start = time.monotonic()
    grades = math_pool.grade(requests)
    assert time.monotonic() - start < 5  # 0.15 s on an idle machine
    assert [grade.reward for grade in grades] == [1.0 - n % 2 for n in range(512)]
    assert math_pool.grade([]) == []


def test_long_responses_pass_through_the_pipes(math_pool):
    responses = ["filler " * 100_000 + f"é✓\ud800 \\boxed{{{n}}}" for n in range(12)]
    grades = math_pool.grade([request(response, "3") for response in responses])
    assert [grade.reward for grade in grades] == [float(n == 3) for n in range(12)]


def test_answers_never_become_code(math_pool, tmp_path):
    target = tmp_path / "touched"
    payloads = [
        f"__import__('os').system('touch {target}')",
        f"\\operatorname{{__import__('os').system('touch {target}')}}(1)",
        f"eval(compile(\"open('{target}', 'w')\", '', 'exec'))",
        f"\\text{{__import__('os').system('touch {target}')}}",
        f"\\mathrm{{open('{target}', 'w')}}^{{2}}",
        f"1+__import__('os').system('touch {target}')+1",
        f"\\sum_{{__import__('os').system('touch {target}')}}^{{3}} x",
    ]
    grades = math_pool.grade([request(f"\\boxed{{{payload}}}", "x+y") for payload in payloads])
    assert [grade.reward for grade in grades] == [0.0] * len(payloads)
    grades = math_pool.grade([request("\\boxed{x+y}", payload) for payload in payloads])
    assert 1.0 not in [grade.reward for grade in grades]
    assert not target.exists()


def test_symbolic_refuses_code_in_every_way_it_could_run():
    code = """
import collections, os, subprocess
import sympy
from etr_megatron.reward import symbolic
symbolic.warm_up()
def refused(act):
    try:
        act()
    except symbolic.RefusedError:
        return True
    return False
evil = "__import__('os').getpid()"
assert refused(lambda: sympy.sympify(evil)) and refused(lambda: sympy.S("(1).__class__"))
assert sympy.sympify("12") == 12 and sympy.sympify("1.5") == 1.5
attempts = [lambda: eval("1+1"), lambda: exec("a = 1"), lambda: compile("1", "<string>", "eval"), lambda: os.system("true"),
            lambda: subprocess.Popen(["true"]), os.fork, lambda: os.execv("/bin/true", ["true"])]
for attempt in attempts:
    with symbolic.comparing():
        assert refused(attempt), attempt
with symbolic.comparing():
    collections.namedtuple("Lazy", "import_ of_a_library")
assert eval("1+1") == 2
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tower", "statuses"),
    [
        ("9^{9^{9^{9}}}", {"timeout"}),
        ("10^{10^{10}}", {"timeout", "ok"}),  # or out of the grader's memory, which is wrong
        (r"\sum_{k=1}^{10^{12}} \frac{1}{k^{k}}", {"timeout", "ok"}),
    ],
)
def test_a_computation_without_end_does_not_hang_and_is_never_right(tower, statuses):
    with GraderPool(RewardConfig(workers=1, timeout_s=3.0)) as pool:
        start = time.monotonic()
        grade, after = pool.grade([request(rf"\boxed{{{tower}}}"), request("5")])
        assert time.monotonic() - start < 30
    assert grade.reward == 0.0
    assert grade.status in statuses
    assert after.reward == 1.0


def test_timeout_kills_the_grader_and_the_rest_is_graded(user_rewards):
    config = RewardConfig(function=user_rewards, workers=2, timeout_s=1.0, range_min=-1.0)
    with GraderPool(config) as pool:
        before = pool.worker_pids
        grades = pool.grade([request(r) for r in ["0.5", "hang", *["0.25"] * 20, "hang", "1"]])
        assert [grade.status for grade in grades] == ["ok", "timeout", *["ok"] * 20, "timeout", "ok"]
        assert [grade.reward for grade in grades] == [0.5, -1.0, *[0.25] * 20, -1.0, 1.0]
        assert "reward.timeout_s = 1.0" in grades[1].detail
        assert set(before).isdisjoint(pool.worker_pids)
        assert all(gone(pid) for pid in before)
        assert pool.grade([request("0.75")]) == [Grade(0.75, "ok", "")]


def test_slow_start_of_a_grader_costs_no_answer_its_time(tmp_path, monkeypatch):
    (tmp_path / "slow_rewards.py").write_text("import time\ntime.sleep(2)\ndef f(p, r, a):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    with GraderPool(RewardConfig(function="slow_rewards:f", workers=1, timeout_s=1.0)) as pool:
        assert pool.grade([request("")])[0].status == "ok"


@pytest.mark.parametrize(("response", "how"), [("die", "exit code 7"), ("segfault", "SIGSEGV")])
def test_an_answer_that_crashes_two_graders_is_an_error(user_rewards, response, how):
    with GraderPool(RewardConfig(function=user_rewards, workers=1)) as pool:
        grades = pool.grade([request(one) for one in ("0.5", response, "1", *["0.25"] * 20)])  # of which some are sent ahead
    wanted = [(0.5, "ok"), (0.0, "error"), (1.0, "ok"), *[(0.25, "ok")] * 20]
    assert [(grade.reward, grade.status) for grade in grades] == wanted
    assert how in grades[1].detail


def test_a_crash_that_does_not_come_again_costs_nothing(user_rewards):
    with GraderPool(RewardConfig(function=user_rewards, workers=1)) as pool:
        assert pool.grade([request("die once"), request("0.5")]) == [Grade(1.0, "ok", ""), Grade(0.5, "ok", "")]


def test_a_users_mistakes_are_errors_of_their_answers(user_rewards):
    config = RewardConfig(function=user_rewards, workers=1)
    values = ("float('inf')", "-float('inf')", "float('nan')", "'1'", "b'1'", "None")
    responses = ["raise", *values, "sys.exit", "True", "print", "torch"]
    with GraderPool(config) as pool:
        grades = pool.grade([request(response) for response in responses])
    assert [grade.status for grade in grades] == ["error"] * 8 + ["ok"] * 3
    assert grades[7].detail.endswith("raised SystemExit: 3")
    assert [grade.reward for grade in grades] == [0.0] * 8 + [1.0, 0.25, 0.0]
    assert "ValueError: no such thing" in grades[0].detail
    assert "returned inf, which is no finite number" in grades[1].detail
    assert "returned None, which is no finite number" in grades[6].detail


def test_a_reward_outside_its_range_is_told_from_a_failure_and_rounding_from_both(user_rewards):
    with GraderPool(RewardConfig(function=user_rewards, workers=1, range_max=3.0)) as pool:
        grades = pool.grade([request(one) for one in ["4", "3.1", "-0.1", "3.000001", "-1e-7", "2.9999999"]])
    assert [grade.status for grade in grades] == ["out_of_range"] * 3 + ["ok"] * 3
    assert [grade.reward for grade in grades] == [0.0, 0.0, 0.0, 3.0, 0.0, 2.9999999]
    assert grades[0].detail.endswith("returned 4.0, outside of reward.range_min = 0.0 to reward.range_max = 3.0")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("my_rewards:absent", "has no absent"),
        ("my_rewards:not_callable", "not callable"),
        ("exits:f", "ended while starting (exit code 3)"),
    ],
)
def test_a_reward_that_cannot_be_loaded_stops_the_job_and_leaves_nothing(user_rewards, tmp_path, function, why):
    (tmp_path / "exits.py").write_text("import os\nos._exit(3)\n")
    children = set(psutil.Process().children())
    with pytest.raises(UserError) as caught:
        GraderPool(RewardConfig(function=function))
    assert f'reward.function = "{function}"' in str(caught.value)
    assert why in str(caught.value)
    assert set(psutil.Process().children()) <= children


def test_an_interrupted_round_leaves_no_reply_for_the_next(user_rewards, monkeypatch):
    with GraderPool(RewardConfig(function=user_rewards, workers=2)) as pool:
        with monkeypatch.context() as patch:
            patch.setattr("etr_megatron.reward.pool._Round._wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pool.grade([request("0.5")] * 10)
        assert [grade.reward for grade in pool.grade([request("1")] * 4)] == [1.0] * 4


def in_thread(act):
    results: list = []
    thread = threading.Thread(target=lambda: results.append(act()))
    thread.start()
    thread.join()
    return results[0]


def test_graders_outlive_the_thread_that_started_them(user_rewards):
    pool = in_thread(lambda: GraderPool(RewardConfig(function=user_rewards, workers=1, timeout_s=1.0)))
    with pool:
        (grade,) = in_thread(lambda: pool.grade([request("hang")]))
        assert grade.status == "timeout"
        assert in_thread(lambda: pool.grade([request("0.5")])) == [Grade(0.5, "ok", "")]
        pids = pool.worker_pids  # of the replacement, made in a thread that is gone
        time.sleep(0.3)
        assert not any(gone(pid) for pid in pids)
        assert pool.grade([request("0.25")]) == [Grade(0.25, "ok", "")]
        assert pool.worker_pids == pids


def test_concurrent_rounds_do_not_mix(user_rewards):
    with GraderPool(RewardConfig(function=user_rewards, workers=2)) as pool:
        results: dict[int, list[float]] = {}

        def act(n: int) -> None:
            results[n] = [grade.reward for grade in pool.grade([request(f"{n}/8")] * 50)]

        threads = [threading.Thread(target=act, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {n: [n / 8] * 50 for n in range(4)}


def test_close_ends_the_graders_and_further_use_is_refused(user_rewards):
    pool = GraderPool(RewardConfig(function=user_rewards, workers=2))
    pids = pool.worker_pids
    assert len(pids) == 2
    pool.close()
    pool.close()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        pool.grade([request("1")])


def test_idle_and_stuck_graders_end_when_their_parent_is_killed(user_rewards, tmp_path):
    code = f"""
import sys, threading, time
from etr_megatron.config import RewardConfig
from etr_megatron.reward import GradeRequest, GraderPool
pool = GraderPool(RewardConfig(function={user_rewards!r}, workers=2, timeout_s=600.0))
threading.Thread(target=lambda: pool.grade([GradeRequest("", "hang", "")]), daemon=True).start()
time.sleep(1)
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
    assert wait_until(lambda: all(gone(pid) for pid in pids))
