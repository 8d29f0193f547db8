"""The implementations that the log-prob benchmark compares: from hidden states and a vocabulary shard to a policy loss and its
gradients.

A contestant takes a `Problem`, runs forward and backward, leaves the gradient of `hidden` (summed over shards) in `hidden.grad`
and adds the weight's to `weight.main_grad`; it returns the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.logprob_problem import Problem
from etr_megatron.vocab_parallel import VocabShard, gemm, vocab_parallel_logprob, vocab_parallel_loss

ALL_ROWS = slice(None)


def _add_weight_grad(weight: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """Add the weight gradient as Megatron does, by one product into the fp32 buffer. On CPU, torch has no product of bf16
    operands with an fp32 result."""
    if grad.dtype == torch.float32:
        weight.main_grad.addmm_(grad.t(), hidden)
    else:
        weight.main_grad.add_(grad.t() @ hidden)
    weight.grad_added_to_main_grad = True


class _HeadLinear(torch.autograd.Function):
    """Shard logits [T, V/TP]; like Megatron's column-parallel linear, overlaps its all-reduce with the weight gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.hidden, ctx.weight, ctx.group = hidden, weight, group
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden = grad @ ctx.weight
        work = None if ctx.group is None else dist.all_reduce(grad_hidden, group=ctx.group, async_op=True)
        _add_weight_grad(ctx.weight, grad, ctx.hidden)
        if work is not None:
            work.wait()
        return grad_hidden, None, None


def _logits(problem: Problem) -> Tensor:
    return _HeadLinear.apply(problem.hidden, problem.weight, problem.shard.group)


class _Gather(torch.autograd.Function):
    """[T, V/TP] -> [T, V]; every rank computes the same loss, so it needs only its own part of the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(shard.group))]
        dist.all_gather(parts, logits, group=shard.group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[:, ctx.shard.start : ctx.shard.start + ctx.shard.size].contiguous(), None


def gathered(problem: Problem) -> Tensor:
    """(a) The whole vocabulary on every rank, log_softmax and entropy by autograd: the reference for all others."""
    logits = _logits(problem)
    if problem.shard.group is not None:
        logits = _Gather.apply(logits, problem.shard)
    log_p = torch.log_softmax(logits.float(), dim=-1)
    del logits
    logp = log_p.gather(1, problem.targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = problem.token_loss(ALL_ROWS, logp, entropy)
    loss.backward()
    return loss.detach()


def megatron_core(problem: Problem) -> Tensor:
    """(b) megatron-core's vocab_parallel_cross_entropy. It has no entropy, so the loss has no bonus."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logp = -vocab_parallel_cross_entropy(_logits(problem), problem.targets)
    loss = problem.token_loss(ALL_ROWS, logp, None)
    loss.backward()
    return loss.detach()


class _ShardSoftmax(torch.autograd.Function):
    """Log-prob and entropy from fp32 [T, V/TP] logits, which it overwrites: saves the softmax, turns it into the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
        top = logits.amax(dim=1)
        if shard.group is not None:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
        logits.sub_(top[:, None])
        column = targets - shard.start
        here = (column >= 0) & (column < shard.size)
        column = torch.where(here, column, 0)[:, None]
        softmax = logits.exp()
        target = logits.gather(1, column)[:, 0] * here
        sums = torch.stack([softmax.sum(1), target, logits.mul_(softmax).sum(1)])
        if shard.group is not None:
            dist.all_reduce(sums, group=shard.group)
        total, target, weighted = sums
        entropy = total.log() - weighted / total
        ctx.save_for_backward(softmax.div_(total[:, None]), column, here, entropy)
        return target - total.log(), entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        softmax, column, here, entropy = ctx.saved_tensors
        slope = softmax.clamp(min=torch.finfo(torch.float32).tiny).log_()  # p log p is 0 where p underflows
        slope.add_(entropy[:, None]).mul_(-grad_entropy[:, None]).sub_(grad_logp[:, None])
        grad = softmax.mul_(slope)
        grad.scatter_add_(1, column, (grad_logp * here)[:, None])
        return grad, None, None


def shard_softmax(problem: Problem) -> Tensor:
    """(c) Full-size fp32 logits of the shard and an autograd node that saves their softmax, as in verl, AReaL and slime."""
    logp, entropy = _ShardSoftmax.apply(_logits(problem).float(), problem.targets, problem.shard)
    loss = problem.token_loss(ALL_ROWS, logp, entropy)
    loss.backward()
    return loss.detach()


def single_pass(problem: Problem) -> Tensor:
    """Ours, variant 1: gradients formed in forward, 3 products."""
    loss, _, _ = vocab_parallel_loss(
        problem.hidden, problem.weight, problem.targets, problem.token_loss, shard=problem.shard, temperature=1.0
    )
    loss.backward()
    return loss.detach()


def recompute(problem: Problem) -> Tensor:
    """Ours, variant 2: a chunk's logits are recomputed in backward, 4 products."""
    logp, entropy = vocab_parallel_logprob(
        problem.hidden, problem.weight, problem.targets, shard=problem.shard, temperature=1.0
    )
    loss = problem.token_loss(ALL_ROWS, logp, entropy)
    loss.backward()
    return loss.detach()


def _scratch(problem: Problem, name: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if name not in problem.scratch:
        hidden, columns = problem.hidden, len(problem.weight)
        problem.scratch[name] = torch.empty(rows, columns, dtype=dtype), torch.zeros(hidden.shape, dtype=dtype)
    return problem.scratch[name]


def _bare_products(problem: Problem, name: str, chunk_rows: int) -> Tensor:
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    buffer, grad_hidden = _scratch(problem, name, chunk_rows, weight.dtype)
    for begin in range(0, len(hidden), chunk_rows):
        rows = slice(begin, begin + chunk_rows)
        logits = torch.mm(hidden[rows], weight.t(), out=buffer[: len(hidden[rows])])
        torch.mm(logits, weight, out=grad_hidden[rows])
        _add_weight_grad(problem.weight, logits, hidden[rows])
    return torch.zeros(())


def gemms(problem: Problem) -> Tensor:
    """(d) Only the three products, by torch.mm over all rows at once, into reused buffers. No loss, no collective."""
    return _bare_products(problem, "gemms", len(problem.hidden))


def gemms_chunked(problem: Problem) -> Tensor:
    """(d) As `gemms`, a quarter of the rows at a time."""
    return _bare_products(problem, "gemms_chunked", -(-len(problem.hidden) // 4))


def gemms_ours(problem: Problem) -> Tensor:
    """(d) Over all rows at once, by the functions that `single_pass` uses for its products: oneDNN's in fp32."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits, grad_hidden = _scratch(problem, "gemms_ours", len(hidden), torch.float32)
    gemm.logits_into(logits, hidden, weight, 1.0)
    gemm.add_gradients(grad_hidden, problem.weight.main_grad, logits.to(weight.dtype), hidden, weight)
    return torch.zeros(())


@dataclass(frozen=True)
class Contestant:
    """An implementation of the head. has_entropy: its loss has the entropy bonus. has_loss: it computes results to check."""

    run: Callable[[Problem], Tensor]
    has_entropy: bool = True
    has_loss: bool = True


REFERENCE = "gathered"

CONTESTANTS: dict[str, Contestant] = {
    "single_pass": Contestant(single_pass),
    "recompute": Contestant(recompute),
    "gathered": Contestant(gathered),
    "megatron_core": Contestant(megatron_core, has_entropy=False),
    "shard_softmax": Contestant(shard_softmax),
    "gemms": Contestant(gemms, has_entropy=False, has_loss=False),
    "gemms_chunked": Contestant(gemms_chunked, has_entropy=False, has_loss=False),
    "gemms_ours": Contestant(gemms_ours, has_entropy=False, has_loss=False),
}
