"""Answers graded as mathematics, in processes: what is equal, what is never executed, and a grader's memory limit."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from etr_megatron.config import RewardConfig
from etr_megatron.platform.workers import WorkerPool
from etr_megatron.reward import GraderPool, worker
from tests.graders import request

REPO = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("deadline")


@pytest.fixture(scope="module")
def math_pool():
    with GraderPool(RewardConfig(timeout_s=60.0)) as pool:
        yield pool


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


def cpu_s(pool: GraderPool) -> float:
    """Seconds of CPU time that the graders have taken, which are the same on a busy machine."""
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pool.worker_pids)


def test_gsm8k_reference_is_graded_and_order_is_kept(math_pool):
    requests = [request(f"It is {n}.", f"work {n}+1\n#### {n + n % 2}") for n in range(512)]
    before = cpu_s(math_pool)
    grades = math_pool.grade(requests)
    assert cpu_s(math_pool) - before < 5  # 0.15 s
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
def test_computations_without_end_do_not_hang_and_are_never_right(monkeypatch):
    towers = {
        "9^{9^{9^{9}}}": {"timeout"},
        "10^{10^{10}}": {"timeout", "ok"},  # or the grader runs out of memory, which counts as wrong
        r"\sum_{k=1}^{10^{12}} \frac{1}{k^{k}}": {"timeout", "ok"},
    }
    deadline = WorkerPool._deadline

    def of_towers(self, worker):
        """The last answer may take as long as a busy machine needs for it."""
        return None if list(worker.inflight) == [len(towers)] else deadline(self, worker)

    monkeypatch.setattr(WorkerPool, "_deadline", of_towers)
    with GraderPool(RewardConfig(workers=1, timeout_s=1.0)) as pool:
        start = time.monotonic()
        *grades, after = pool.grade([*(request(rf"\boxed{{{tower}}}") for tower in towers), request("5")])
        assert time.monotonic() - start < 300
    for grade, (tower, statuses) in zip(grades, towers.items(), strict=True):
        assert grade.reward == 0.0 and grade.status in statuses, tower
    assert after.reward == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are set on Linux only")
def test_a_math_graders_memory_is_limited_and_not_beyond_what_it_may_have(math_pool, monkeypatch):
    (pid, *_) = math_pool.worker_pids
    assert psutil.Process(pid).rlimit(psutil.RLIMIT_AS)[0] == 2 * 2**30
    with GraderPool(RewardConfig(function="tests.rewards:always_fails", workers=1)) as pool:
        assert psutil.Process(pool.worker_pids[0]).rlimit(psutil.RLIMIT_AS) == psutil.Process().rlimit(psutil.RLIMIT_AS)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**40, 2**29))
    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, both: limits.append((what, both)))
    worker._limit_memory()
    assert limits == [(resource.RLIMIT_AS, (2**29, 2**29))]
