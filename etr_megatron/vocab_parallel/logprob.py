"""Log-prob and entropy of chosen tokens straight from hidden states and a vocabulary shard; the vocabulary is never gathered.

Shapes: R loss rows, H hidden size, V real vocabulary, Vp its padded size, TP ranks; a shard holds Vp/TP rows of the LM head.

Memory: `chunk_rows x V/TP` logits exist at a time, in fp32, forward and backward; saved for backward are the hidden rows (the
caller's), and three fp32 numbers per row. Backward computes a chunk's logits again (4 GEMMs in all instead of 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Which part of the vocabulary a rank holds.

    size: rows of the shard, the same on every rank (Vp / TP). vocab_size: V, without padding. group: the tensor-parallel
    group, None for one rank.
    """

    size: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @property
    def start(self) -> int:
        """First vocabulary id of this rank's shard."""
        return self.size * (dist.get_rank(self.group) if self.group is not None else 0)

    @property
    def real(self) -> int:
        """Rows of the shard that are real vocabulary: a prefix of it, since padding is at the very end (possibly 0)."""
        return min(max(self.vocab_size - self.start, 0), self.size)


def _chunk_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """fp32 logits [rows, real] of the shard's real columns; padded columns are never computed, so they need no mask."""
    return (hidden @ weight.t()).float().div_(temperature)


def _local_target(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Column of each target in this shard (0 where it is elsewhere) and whether it is here; both [rows]."""
    column = targets - shard.start
    here = (column >= 0) & (column < shard.real)
    return torch.where(here, column, 0), here


def _chunk_statistics(logits: Tensor, targets: Tensor, shard: VocabShard) -> Tensor:
    """[4, rows] fp32 of this shard: max m, sum of exp(l - m), target logit (0 if elsewhere), sum of exp(l - m) l."""
    rows = logits.shape[0]
    if shard.real == 0:
        empty = logits.new_zeros(4, rows)
        empty[0] = -torch.inf
        return empty
    top = logits.max(dim=1).values
    weights = (logits - top[:, None]).exp_()
    column, here = _local_target(targets, shard)
    target = torch.where(here, logits.gather(1, column[:, None]).squeeze(1), 0.0)
    return torch.stack([top, weights.sum(1), target, torch.linalg.vecdot(weights, logits)])


def _combine(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log-prob, entropy and log-sum-exp, [rows] each, from the [TP, 4, rows] statistics of all shards."""
    top, total, target, weighted = statistics.unbind(1)
    peak = top.max(dim=0).values
    scale = (top - peak).exp()
    total = (total * scale).sum(0)
    log_sum = peak + total.log()
    return target.sum(0) - log_sum, log_sum - (weighted * scale).sum(0) / total, log_sum


class _Head(torch.autograd.Function):
    """Chunked forward, backward by recomputing each chunk's logits; gradients are accumulated in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: VocabShard,
        temperature: float,
        chunk_rows: int,
        reduce_hidden_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        real = weight[: shard.real]
        parts = [
            _chunk_statistics(_chunk_logits(rows, real, temperature), wanted, shard)
            for rows, wanted in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
        ]
        local = torch.cat(parts, dim=1) if parts else hidden.new_zeros(4, 0, dtype=torch.float32)
        if shard.group is None:
            gathered = local[None]
        else:
            shards = [torch.empty_like(local) for _ in range(dist.get_world_size(shard.group))]
            dist.all_gather(shards, local, group=shard.group)
            gathered = torch.stack(shards)
        logp, entropy, log_sum = _combine(gathered)
        ctx.save_for_backward(hidden, weight, targets, log_sum, entropy)
        ctx.options = (shard, temperature, chunk_rows, reduce_hidden_grad)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sum, entropy = ctx.saved_tensors
        shard, temperature, chunk_rows, reduce_hidden_grad = ctx.options
        real = weight[: shard.real]
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for begin in range(0, len(targets) if shard.real else 0, chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            logits = _chunk_logits(hidden[rows], real, temperature)
            grad = _logit_gradient(
                logits, targets[rows], shard, log_sum[rows], entropy[rows], grad_logp[rows], grad_entropy[rows]
            )
            grad = grad.div_(temperature).to(weight.dtype)
            grad_hidden[rows] = (grad @ real).float()
            grad_weight[: shard.real] += (grad.t() @ hidden[rows]).float()
        if reduce_hidden_grad and shard.group is not None:
            dist.all_reduce(grad_hidden, group=shard.group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None, None, None


def _logit_gradient(
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    log_sum: Tensor,
    entropy: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor,
) -> Tensor:
    """d loss / d logits [rows, real]: g_logp (1[target] - p) - g_entropy p (log p + H). Takes over the buffer `logits`."""
    log_p = logits.sub_(log_sum[:, None])
    p = log_p.exp()
    grad = log_p.add_(entropy[:, None]).mul_(-g_entropy[:, None]).sub_(g_logp[:, None]).mul_(p)
    column, here = _local_target(targets, shard)
    grad.scatter_add_(1, column[:, None], torch.where(here, g_logp, 0.0)[:, None])
    return grad


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of the distribution it was drawn from, both fp32 [R], differentiable in both.

    hidden: [R, H], the loss rows only (select them before the head), the same on every tensor-parallel rank.
    weight: [Vp/TP, H], this rank's shard of the LM head (or of the tied embedding); padded rows take no part and get zero
    gradient. targets: int64 [R], ids below `shard.vocab_size`. temperature: divides the logits, as in the sampling.
    reduce_hidden_grad: False leaves the gradient of `hidden` a partial sum over vocabulary shards, for a caller who
    reduce-scatters it (sequence parallelism).

    Collectives: one all-gather of 16 bytes per row in forward; one all-reduce of [R, H] in backward. Every rank of the group
    must call with the same R. Raises ValueError for shapes that do not fit.
    """
    if weight.shape[0] != shard.size or hidden.shape[1] != weight.shape[1] or hidden.shape[0] != targets.shape[0]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)} do not fit a shard "
            f"of {shard.size} rows"
        )
    return _Head.apply(hidden, weight, targets, shard, temperature, chunk_rows, reduce_hidden_grad)
