"""A token-local loss and its gradients in one pass over the vocabulary shard.

If a row's loss depends only on that row's log-prob and entropy, its derivative is known as soon as they are: everything else
(bounds, advantages, old log-probs, the global denominator) is known before the forward pass. So the gradient overwrites a
chunk's logits and is consumed at once: 3 GEMMs, nothing of size R x V ever exists, and nothing is computed twice.

Bytes of memory beyond hidden, weight and the weight's fp32 gradient, with c rows per chunk and v real columns in the shard:

    4 R H + 16 R           gradient of the hidden rows; log-probs, entropies and their derivatives
    + 4 c v                logits, overwritten by their gradient (twice that with TP > 1 on CUDA, see `HeadConfig.overlap`)
    + the largest of
        4 b v              a temporary of b rows for the statistics: on CPU up to 2^18 elements, at least one row
        4 t + 2 c g        a temporary tile of t elements for the gradient and, in bf16, a GEMM operand with the gradient of g
                           columns: at most 8192 on CPU, else all
        4 (u d + m H)      on CPU in fp32: a copy of the gradient of u columns and a product of m = max(d, u) rows, where
                           u = 2^18 / H, at most 1024 and v, and d is c, rounded up to a multiple of 32 with oneDNN; if d is
                           not c, + 4 d H for a copy of the hidden rows
        6 m H + 2 c g      on CPU in bf16 instead, with u = 2^19 / H: the product in bf16, then in fp32

with no temporaries (b = t = 0) if Triton runs the row passes. `single_pass_bytes` is that sum or, in bf16, 6 R H if that is
more: the hidden gradient is cast after the chunks are freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from etr_megatron.vocab_parallel import gemm, torch_rows
from etr_megatron.vocab_parallel.head_chunks import Backend, HeadConfig, add_gradients, columns_at_a_time, iterate_chunks
from etr_megatron.vocab_parallel.logprob import check_shapes, head_logprob
from etr_megatron.vocab_parallel.shard import VocabShard
from etr_megatron.vocab_parallel.weight_grad import WeightGrad, main_grad, mark_grad_added, weight_grad

TokenLoss = Callable[[slice, Tensor, Tensor], Tensor]
"""(rows, logp fp32 [rows], entropy fp32 [rows]) -> scalar: the summed loss of those rows, divided by the denominator."""


def _derivatives(token_loss: TokenLoss, rows: slice, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of the rows and its derivatives with respect to log-prob and entropy (None if unused), [rows] each."""
    with torch.enable_grad():
        logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
        loss = token_loss(rows, logp, entropy)
        if not loss.requires_grad:
            return loss, torch.zeros_like(logp), None
        g_logp, g_entropy = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    return loss.detach(), torch.zeros_like(logp) if g_logp is None else g_logp, g_entropy


class _SinglePass(torch.autograd.Function):
    """Forward computes all gradients; backward only returns them, after checking the scale they were computed with."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_loss: TokenLoss,
        head: HeadConfig,
        backward_scale: float,
        accumulator: WeightGrad | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        group = head.shard.group
        rows_out = torch.empty(2, len(hidden), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        reductions = []
        for chunk in iterate_chunks(head, hidden, weight, targets):
            rows = chunk.rows
            rows_out[0, rows], rows_out[1, rows] = chunk.logp, chunk.entropy
            loss, g_logp, g_entropy = _derivatives(token_loss, rows, chunk.logp, chunk.entropy)
            total += loss
            add_gradients(
                head,
                chunk,
                g_logp * backward_scale,
                None if g_entropy is None else g_entropy * backward_scale,
                hidden=hidden,
                weight=weight,
                grad_hidden=grad_hidden,
                grad_weight=None if accumulator is None else accumulator.total,
            )
            if group is not None:
                # Detached: gloo's thread may hold its tensor a little longer, and autograd copies a gradient with other owners.
                reductions.append(dist.all_reduce(grad_hidden.detach()[rows], group=group, async_op=True))
        if accumulator is not None:
            accumulator.add_to_main_grad()
        for reduction in reductions:
            reduction.wait()
        ctx.grad_hidden, ctx.dtype, ctx.scale = grad_hidden, hidden.dtype, backward_scale
        ctx.weight = None if accumulator is None else weight  # not the sum, which is no longer needed
        logp, entropy = rows_out
        ctx.mark_non_differentiable(logp, entropy)
        return total, logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_hidden is None:
            raise RuntimeError("the single-pass loss went backward twice; its gradients were formed once, in forward")
        _check_scale(grad_loss, ctx.scale)
        grad_hidden, ctx.grad_hidden = ctx.grad_hidden.to(ctx.dtype), None
        return grad_hidden, None if ctx.weight is None else mark_grad_added(ctx.weight), *[None] * 5


def _check_scale(found: Tensor, expected: float) -> None:
    message = "the single-pass loss received another gradient than the backward_scale its gradients were formed with"
    expected = torch.tensor(expected, dtype=found.dtype).item()  # rounded as in the gradient
    if found.is_cuda:  # without synchronizing with the device
        torch._assert_async(found == expected, message)
    elif found.item() != expected:
        raise RuntimeError(f"{message}: {found.item()} instead of {expected}")


def vocab_parallel_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    backward_scale: float = 1.0,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
    overlap: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A token-local loss of log-probs and entropies: (loss scalar, log-prob [R], entropy [R]), fp32, the loss differentiable.

    hidden, weight, targets, shard, temperature, chunk_rows, backend, overlap: as in `vocab_parallel_logprob`.
    token_loss: called once per chunk, in order, with the chunk's rows; must be the same function of its rows on every rank.
    backward_scale: the gradient that backward will receive (Megatron's loss scale); any other raises RuntimeError there, on
    CUDA as an asynchronous device-side assertion.

    The weight's gradient is added to `weight.main_grad` DURING FORWARD (DDP owns it), so a call with gradients enabled must be
    followed by exactly one backward; a frozen weight has no gradient. If `main_grad` is not fp32, an fp32 sum over the rows is
    added to it at the end of forward. Without a `main_grad` of a weight that is trained, log-probs go through
    `vocab_parallel_logprob` (4 GEMMs), and `token_loss` is called once, with all rows. Without gradients only the values are
    computed.

    Collectives of the single pass, all in forward: an all-gather per chunk, 16 bytes per row, and an all-reduce of its fp32
    [rows, H]. Every rank of the group must call with the same R. Raises ValueError for shapes that do not fit.
    """
    check_shapes(hidden, weight, targets, shard)
    head = HeadConfig(shard, temperature, chunk_rows, backend, overlap)
    trained = weight.requires_grad
    if not (torch.is_grad_enabled() and (main_grad(weight) is not None if trained else hidden.requires_grad)):
        logp, entropy = head_logprob(head, hidden, weight, targets)
        return token_loss(slice(0, len(hidden)), logp, entropy), logp.detach(), entropy.detach()
    accumulator = weight_grad(weight) if trained else None
    return _SinglePass.apply(hidden, weight, targets, token_loss, head, backward_scale, accumulator)


def single_pass_bytes(
    rows: int,
    hidden_size: int,
    shard: VocabShard,
    *,
    dtype: torch.dtype,
    device: torch.device,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
    overlap: bool | None = None,
) -> int:
    """Peak bytes of `vocab_parallel_loss` on a rank, beyond its inputs and the weight's fp32 gradient, by the formula above.

    rows: R. hidden_size: H. dtype: of hidden and weight. shard, chunk_rows, backend, overlap: as passed to the loss.
    Excludes the buffers of the all-gather, 16 (TP + 1) bytes per row of a chunk.
    """
    head, real = HeadConfig(shard, chunk_rows=chunk_rows, backend=backend, overlap=overlap), shard.real
    chunk = head.rows_of_chunk(rows, device)
    needed = 4 * rows * hidden_size + 16 * rows + 4 * head.buffers_on(device) * chunk * real
    statistics = tile = operand = product = 0
    columns = columns_at_a_time(real, device)
    if head.kernels_on(device) is torch_rows:
        statistics = 4 * torch_rows.block_rows(chunk, real, device) * real
        tile = 4 * math.prod(torch_rows.tile_shape(chunk, columns, device))
    if dtype != torch.float32:
        operand = 2 * chunk * columns
    if device.type == "cpu":
        block = min(real, gemm.block_rows(hidden_size, dtype.itemsize))
        padded = gemm.padded_rows(chunk, dtype)
        product = max(padded, block) * hidden_size
        copies = block * padded + (padded * hidden_size if padded != chunk else 0)
        product = 4 * (copies + product) if dtype == torch.float32 else 6 * product
    needed += max(statistics, operand + max(tile, product))
    return needed if dtype == torch.float32 else max(needed, 6 * rows * hidden_size)
