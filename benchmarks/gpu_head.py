"""Part `head` of the GPU benchmark: the single-pass head with row passes in torch and in Triton, against bare matrix products.

Contestants:

- `torch` and `triton`: forward and backward of the whole head.
- `products`: only the head's three matrix products, chunk by chunk as in the head, with fp32 results.
- `products_at_once`: the same products over all rows at once, with results in the operands' dtype.

Before anything is timed, `torch` and `triton` are compared with autograd through log_softmax, on the same operands in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_device import peak_bytes, time_round_robin
from benchmarks.logprob_contestants import gathered
from benchmarks.logprob_problem import Problem
from benchmarks.targets import Target, as_json, summary
from etr_megatron.vocab_parallel import (
    VocabShard,
    gemm,
    single_pass_bytes,
    triton_rows,
    vocab_parallel_logprob,
    vocab_parallel_loss,
)
from etr_megatron.vocab_parallel.head_chunks import HeadConfig

SIZES = [(4096, 4096, 151_936), (8192, 4096, 151_936), (4096, 5120, 151_936), (8192, 5120, 151_936)]
"""(T, H, V): hidden sizes of Qwen3-8B and Qwen3-32B."""

QUICK_SIZES = [(300, 64, 1507)]

PRODUCTS_RATIO = 1.3
"""Upper bound on the time of the head in bf16 relative to its own products."""

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-2}
"""Largest allowed difference to autograd: relative to max(|loss|, 1) for the loss, relative 2-norm for a gradient."""

_CHECK_ENTROPY_BONUS = 10.0
"""For the check only: with a usual bonus, the entropy's gradient over a large vocabulary is too small for bf16 to resolve."""


class WrongResultError(RuntimeError):
    """A head's results differ from autograd's, so its time would mean nothing."""


def make_problem(rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random inputs on the device: logits of standard deviation 2, ratios inside and outside the bounds."""
    generator = torch.Generator(device).manual_seed(1)
    on_device = {"device": device, "generator": generator}
    weight = torch.randn(vocab, hidden, dtype=dtype, **on_device).mul_(2 / hidden**0.5)
    states = torch.randn(rows, hidden, dtype=dtype, **on_device)
    targets = torch.randint(0, vocab, (rows,), **on_device)
    shard = VocabShard(vocab, vocab)
    with torch.no_grad():
        logp, _ = vocab_parallel_logprob(states, weight, targets, shard=shard, backend="torch")
    # Far beyond a bound or well within, so that rounding never decides on which side of a bound a token lies.
    ratios = torch.tensor([-0.4, -0.1, 0.1, 0.4], device=device)[torch.randint(0, 4, (rows,), **on_device)]
    advantages = torch.randn(rows, **on_device)
    weight.requires_grad_()
    weight.main_grad = torch.zeros(vocab, hidden, device=device)
    return Problem(states.requires_grad_(), weight, targets, logp - ratios, advantages, shard)


def head(problem: Problem, backend: str) -> Tensor:
    """Loss, forward and backward of the single-pass head."""
    problem.forget_gradients()
    loss, _, _ = vocab_parallel_loss(
        problem.hidden, problem.weight, problem.targets, problem.token_loss, shard=problem.shard, backend=backend
    )
    loss.backward()
    return loss.detach()


def products(problem: Problem) -> None:
    """The head's products, into reused buffers; noise replaces the logits' gradient, as zeros would draw less power."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    step = HeadConfig(problem.shard).rows_of_chunk(len(hidden), hidden.device)
    if "products" not in problem.scratch:
        buffer = torch.empty(step, len(weight), dtype=torch.float32, device=hidden.device)
        problem.scratch["products"] = buffer, torch.randn(step, len(weight), dtype=hidden.dtype, device=hidden.device)
        problem.scratch["hidden"] = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device), buffer
    (buffer, grad), (grad_hidden, _) = problem.scratch["products"], problem.scratch["hidden"]
    for begin in range(0, len(hidden), step):
        rows = slice(begin, begin + step)
        count = len(hidden[rows])
        gemm.logits_into(buffer[:count], hidden[rows], weight, 1.0)
        gemm.add_gradients(grad_hidden[rows], problem.weight.main_grad, grad[:count], hidden[rows], weight)


def products_at_once(problem: Problem) -> None:
    """The three products over all rows; only the weight gradient is fp32."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits, total = hidden @ weight.t(), problem.weight.main_grad
    torch.mm(logits, weight)
    into = {} if logits.dtype == torch.float32 else {"out_dtype": torch.float32}
    torch.addmm(total, logits.t(), hidden, out=total, **into)


def results(run: Callable[[Problem], Tensor], problem: Problem) -> dict[str, Tensor]:
    """Loss, gradient of hidden and what one pass added to the weight's fp32 gradient."""
    problem.forget_gradients()
    problem.weight.main_grad.zero_()
    loss = run(problem)
    return {"loss": loss.clone(), "d_hidden": problem.hidden.grad.float(), "d_weight": problem.weight.main_grad.clone()}


def in_float32(problem: Problem) -> Problem:
    """The same values in fp32, as separate leaves; autograd in bf16 rounds logits of 8 by 0.03."""
    hidden = problem.hidden.detach().float().requires_grad_()
    weight = problem.weight.detach().float().requires_grad_()
    weight.main_grad = torch.zeros_like(weight, requires_grad=False)
    return replace(problem, hidden=hidden, weight=weight, scratch={})


def check(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> dict[str, float]:
    """Differences by quantity, as in `TOLERANCE`; raises `WrongResultError` if one is too large or NaN."""
    errors = {"loss": ((found["loss"] - expected["loss"]).abs() / expected["loss"].abs().clamp(min=1)).item()}
    for key in ("d_hidden", "d_weight"):
        errors[key] = ((found[key] - expected[key]).norm() / expected[key].norm()).item()
    for key, error in errors.items():
        if not error <= tolerance:
            raise WrongResultError(f"{name}: {key} differs from autograd by {error:.2e}, more than {tolerance:.0e}")
    return errors


def measure(size: tuple[int, int, int], rounds: int, device: torch.device) -> dict[str, Any]:
    """All measurements of one size (T, H, V)."""
    rows, hidden, vocab = size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    problem = make_problem(rows, hidden, vocab, dtype, device)
    backends = ["torch", *(["triton"] if triton_rows.is_available(device) else [])]
    variant = replace(problem, entropy_bonus=_CHECK_ENTROPY_BONUS)
    expected = results(gathered, in_float32(variant))
    errors = {b: check(b, results(partial(head, backend=b), variant), expected, TOLERANCE[dtype]) for b in backends}
    del expected, variant
    runs: dict[str, Callable[[], Any]] = {b: partial(head, problem, b) for b in backends}
    runs |= {"products": partial(products, problem), "products_at_once": partial(products_at_once, problem)}
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    seconds = time_round_robin(runs, rounds, device)
    contestants = {name: {**summary(seconds[name]), "peak_bytes": peaks[name], "errors": errors.get(name, {})} for name in runs}
    found = {"rows": rows, "hidden": hidden, "vocab": vocab, "dtype": str(dtype).removeprefix("torch.")}
    formula = {b: single_pass_bytes(rows, hidden, problem.shard, dtype=dtype, device=device, backend=b) for b in backends}
    left_out = {} if "triton" in backends else {"triton": f"Triton cannot run on {device.type} here"}
    found |= {"contestants": contestants, "formula_bytes": formula, "left_out": left_out}
    return {**found, "targets": as_json(targets(found))}


def targets(case: dict[str, Any]) -> list[Target]:
    """The head as `backend: auto` runs it against its own products, in bf16 only."""
    if case["dtype"] != "bfloat16":
        return []
    one = case["contestants"]
    ours = one.get("triton", one["torch"])
    return [Target("time / products", ours["median_s"] / one["products"]["median_s"], PRODUCTS_RATIO)]


def table(case: dict[str, Any]) -> str:
    """A case as text, fastest first."""
    floor = case["contestants"]["products"]["median_s"]
    lines = [f"head {case['dtype']} T={case['rows']} H={case['hidden']} V={case['vocab']}"]
    lines.append(f"  {'':<17}{'median ms':>10}{'min ms':>10}{'x products':>12}{'peak MiB':>10}  largest error")
    for name, one in sorted(case["contestants"].items(), key=lambda item: item[1]["median_s"]):
        error = f"{max(one['errors'].values()):.1e}" if one["errors"] else "-"
        peak = "-" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**20:.0f}"
        times = f"{1e3 * one['median_s']:>10.3f}{1e3 * one['min_s']:>10.3f}{one['median_s'] / floor:>12.2f}"
        lines.append(f"  {name:<17}{times}{peak:>10}  {error}")
    lines += [f"  left out: {name}: {why}" for name, why in case["left_out"].items()]
    lines += [
        f"  {'met' if t['met'] else 'missed'}: {t['text']} = {t['value']:.2f} (target <= {t['limit']:g})"
        for t in case["targets"]
    ]
    return "\n".join(lines)
