"""One rank of the log-prob benchmark: `python -m benchmarks.logprob_rank JOB`, started by `benchmarks.logprob`; JOB is JSON.

A job has world, rank, store (rendezvous file), result (file to write), rows, hidden, vocab, dtype, and either
{"kind": "time", "rounds": N, "contestants": [...]} or {"kind": "memory", "contestants": [one]}.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etr_megatron.platform.lifetime import die_with_parent

die_with_parent()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.logprob_contestants import CONTESTANTS, REFERENCE, Contestant  # noqa: E402
from benchmarks.logprob_problem import Problem, make_problem  # noqa: E402
from benchmarks.resident import peak_beyond  # noqa: E402
from etr_megatron.status import run_and_exit  # noqa: E402
from etr_megatron.vocab_parallel import single_pass_bytes  # noqa: E402

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-2}
"""Largest allowed difference to the reference: relative to max(|loss|, 1) for the loss, relative 2-norm for a gradient."""

_CHECK_ENTROPY_BONUS = 10.0
"""For the check only: with a usual bonus, the entropy's gradient over a large vocabulary is too small for bf16 to resolve."""

Results = dict[str, Tensor]


class WrongResultError(RuntimeError):
    """A contestant's results differ from the reference's, so its time would mean nothing."""


def results(contestant: Contestant, problem: Problem) -> Results:
    """Loss, gradient of hidden and what one pass added to the weight's fp32 gradient."""
    problem.forget_gradients()
    problem.weight.main_grad.zero_()
    loss = contestant.run(problem)
    problem.collect_weight_gradient()
    return {"loss": loss.clone(), "d_hidden": problem.hidden.grad.float(), "d_weight": problem.weight.main_grad.clone()}


def check(name: str, found: Results, expected: Results, tolerance: float) -> dict[str, float]:
    """Differences by quantity, as in `TOLERANCE`; raises `WrongResultError` if one is too large or NaN."""
    errors = {"loss": ((found["loss"] - expected["loss"]).abs() / expected["loss"].abs().clamp(min=1)).item()}
    for key in ("d_hidden", "d_weight"):
        errors[key] = ((found[key] - expected[key]).norm() / expected[key].norm()).item()
    for key, error in errors.items():
        if not error <= tolerance:
            raise WrongResultError(f"{name}: {key} differs from {REFERENCE} by {error:.2e}, more than {tolerance:.0e}")
    return errors


def check_all(problem: Problem, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """`check` every contestant that has a loss, which also warms it up. Those without entropy are checked without its bonus."""
    tolerance = TOLERANCE[problem.weight.dtype]
    errors = {}
    for has_entropy in (True, False):
        variant = dataclasses.replace(problem, entropy_bonus=_CHECK_ENTROPY_BONUS if has_entropy else 0.0)
        chosen = [name for name in names if CONTESTANTS[name].has_loss and CONTESTANTS[name].has_entropy == has_entropy]
        expected = results(CONTESTANTS[REFERENCE], variant)
        errors |= {name: check(name, results(CONTESTANTS[name], variant), expected, tolerance) for name in chosen}
    return errors


def time_all(problem: Problem, names: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each pass on the slowest rank. Round robin, so that other load on the machine affects all alike; each round
    starts with another contestant, so that none always follows the same one."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        CONTESTANTS[name].run(problem)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            problem.forget_gradients()
            dist.barrier()
            start = time.perf_counter()
            CONTESTANTS[name].run(problem)
            problem.collect_weight_gradient()
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            seconds[name].append(took.item())
    return seconds


def measure_peak(contestant: Contestant, problem: Problem) -> int:
    """Bytes of peak resident memory of one pass beyond what was resident before."""
    problem.forget_gradients()

    def one_pass() -> None:
        contestant.run(problem)
        problem.collect_weight_gradient()

    return peak_beyond(one_pass)


def _join(job: dict[str, Any]) -> dist.ProcessGroup | None:
    torch.set_num_threads(1)
    store, world, rank = job["store"], job["world"], job["rank"]
    timeout = datetime.timedelta(minutes=30)
    dist.init_process_group("gloo", init_method=f"file://{store}", world_size=world, rank=rank, timeout=timeout)
    if "megatron_core" in job["contestants"]:
        from etr_megatron.policy import init_layout

        init_layout(tp=world, pp=1, seed=1)
    return None if world == 1 else dist.group.WORLD


def run_job(job: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Run the job; returns the content of the result file."""
    dtype, names = getattr(torch, job["dtype"]), job["contestants"]
    if job["kind"] == "time":
        problem = make_problem(job["rows"], job["hidden"], job["vocab"], dtype, group)
        errors = check_all(problem, names)
        return {"errors": errors, "seconds": time_all(problem, names, job["rounds"])}
    contestant = CONTESTANTS[names[0]]
    # Buffers that libraries allocate once per process do not count for the contestant.
    contestant.run(make_problem(8, 16, 64 * job["world"], dtype, group))
    problem = make_problem(job["rows"], job["hidden"], job["vocab"], dtype, group)
    formula = single_pass_bytes(job["rows"], job["hidden"], problem.shard, dtype=dtype, device=problem.weight.device)
    return {"peak_bytes": measure_peak(contestant, problem), "single_pass_formula_bytes": formula}


def main() -> int:
    """Run the job of the command line and write its result."""
    job = json.loads(sys.argv[1])
    group = _join(job)
    Path(job["result"]).write_text(json.dumps(run_job(job, group)))
    dist.barrier()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
