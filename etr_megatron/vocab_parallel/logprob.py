"""Log-prob and entropy of target tokens from hidden states and a vocabulary shard, without gathering the vocabulary.

For callers that need both as differentiable tensors (sequence-level losses) or without gradients (old, reference log-probs).
Forward saves the hidden rows (the caller's) and three fp32 numbers per row; backward recomputes each chunk's logits: 4 GEMMs in
all, 1 without gradients. A token-local loss is cheaper through `vocab_parallel_loss`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from etr_megatron.vocab_parallel.head_chunks import (
    Backend,
    Chunk,
    HeadConfig,
    add_gradients,
    chunk_buffers,
    chunk_logits,
    iterate_chunks,
    row_slices,
)
from etr_megatron.vocab_parallel.shard import VocabShard
from etr_megatron.vocab_parallel.weight_grad import weight_grad


def forward_rows(head: HeadConfig, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[3, R] fp32: log-prob, entropy and log-sum-exp of every row."""
    found = torch.empty(3, len(hidden), dtype=torch.float32, device=hidden.device)
    for chunk in iterate_chunks(head, hidden, weight, targets):
        torch.stack([chunk.logp, chunk.entropy, chunk.log_sum], out=found[:, chunk.rows])
    return found


class _Recomputed(torch.autograd.Function):
    """Chunked forward; backward recomputes each chunk's logits and accumulates gradients in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: HeadConfig) -> tuple[Tensor, Tensor]:
        logp, entropy, log_sum = forward_rows(head, hidden, weight, targets)
        ctx.set_materialize_grads(False)  # keeps None, so that an unused entropy is skipped
        ctx.save_for_backward(hidden, weight, targets, logp, entropy, log_sum)
        ctx.head, ctx.weight = head, weight
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logp is None and grad_entropy is None:
            return (None,) * 4
        hidden, weight, targets, logp, entropy, log_sum = ctx.saved_tensors
        head: HeadConfig = ctx.head
        grad_logp = torch.zeros_like(logp) if grad_logp is None else grad_logp
        accumulator = weight_grad(ctx.weight) if ctx.needs_input_grad[1] else None
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        slices = row_slices(head, hidden) if head.shard.real else []
        (buffer,) = chunk_buffers(head, slices, 1, hidden.device)
        for rows in slices:
            logits = chunk_logits(head, hidden[rows], weight, buffer[: rows.stop - rows.start])
            per_row = (values[rows] for values in (logp, entropy, log_sum))
            chunk = Chunk(rows, logits, head.shard.columns(targets[rows]), *per_row)
            add_gradients(
                head,
                chunk,
                grad_logp[rows],
                None if grad_entropy is None else grad_entropy[rows],
                hidden=hidden,
                weight=weight,
                grad_hidden=grad_hidden,
                grad_weight=None if accumulator is None else accumulator.total,
            )
        if head.shard.group is not None:
            dist.all_reduce(grad_hidden, group=head.shard.group)
        return grad_hidden.to(hidden.dtype), None if accumulator is None else accumulator.autograd_grad(), None, None


DTYPES = (torch.float32, torch.bfloat16)


def check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard) -> None:
    """Raise ValueError if `hidden` [R, H], `weight` [Vp/TP, H], `targets` [R] and the shard do not fit each other.

    Also for a dtype other than fp32 and bf16.
    """
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and targets.shape == hidden.shape[:1]
    if not fits or weight.shape[0] != shard.size or hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} {hidden.dtype}, weight {tuple(weight.shape)} {weight.dtype}, targets "
            f"{tuple(targets.shape)} do not fit a shard of {shard.size} rows"
        )


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
    overlap: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of the distribution it was drawn from, both fp32 [R], differentiable in both.

    hidden: fp32 or bf16 [R, H], the loss rows only (select them before the head), identical on every tensor-parallel rank.
    weight: [Vp/TP, H] of the same dtype, this rank's shard of the LM head (or of the tied embedding); padded rows are ignored
    and get zero gradient. Its gradient is added to `weight.main_grad` if Megatron's DDP created one.
    targets: int64 [R], ids below `shard.vocab_size`. temperature: divides the logits, as in sampling.
    chunk_rows: rows whose logits exist at a time; None means 1024 on CUDA and R / 4, between 128 and 384, on CPU.
    backend, overlap: see `HeadConfig`.

    Collectives: an all-gather per chunk in forward, 16 bytes per row; one all-reduce of [R, H] fp32 in backward. Every rank of
    the group must call with the same R. Raises ValueError for shapes that do not fit.
    """
    check_shapes(hidden, weight, targets, shard)
    return head_logprob(HeadConfig(shard, temperature, chunk_rows, backend, overlap), hidden, weight, targets)


def head_logprob(head: HeadConfig, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`vocab_parallel_logprob` without the shape checks."""
    if not torch.is_grad_enabled():
        logp, entropy, *_ = forward_rows(head, hidden, weight, targets)
        return logp, entropy
    return _Recomputed.apply(hidden, weight, targets, head)
