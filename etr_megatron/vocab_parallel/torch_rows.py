"""The two row-wise passes over a chunk of logits, in torch, on any device. `triton_rows` is the same for CUDA, one kernel each.

Precondition of both passes, here and in `triton_rows`: real >= 1 and every logit is finite. A row with a NaN or +inf has NaN
among its statistics, by which a run learns of it, and disturbs no other row; what a row with -inf gives is not defined.

On CPU the passes go over a few rows at a time, so that the temporary stays in the cache and nothing of a chunk's size is
allocated beside the chunk itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CACHED_ELEMENTS = 1 << 18
"""fp32 elements of a temporary on CPU, 1 MiB: larger ones leave the second-level cache, smaller ones cost more calls."""


def block_rows(rows: int, real: int, device: torch.device) -> int:
    """Rows that one pass takes at a time; it holds two fp32 temporaries of their size."""
    return rows if device.type != "cpu" else min(rows, max(1, _CACHED_ELEMENTS // max(1, real)))


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, two fp32 scratches of their size, [2, rows, real]) over all rows; a scratch is valid until the next block."""
    count, real = logits.shape
    step = block_rows(count, real, logits.device)
    scratch = torch.empty(2, step, real, dtype=torch.float32, device=logits.device)
    for begin in range(0, count, max(1, step)):
        rows = slice(begin, min(begin + step, count))
        yield rows, scratch[:, : rows.stop - begin]


def row_statistics(logits: Tensor, columns: Tensor) -> Tensor:
    """A shard's part of each row's softmax: fp32 [4, rows] of m, sum of exp(l - m), target logit, sum of exp(l - m) l.

    m is the shard's log-sum-exp here (the sum is then 1); any m that keeps exp() in range does. logits: fp32 or bf16 [rows,
    real]. columns: int64 [rows], the target's column, -1 where another shard has it (its target logit is 0).

    The library's softmax is one pass that stays in the cache, three times as fast on CPU as subtracting, exp() and summing. Its
    largest value is at least 1 / real, so that its log is accurate and gives m.
    """
    found = torch.empty(4, len(logits), dtype=torch.float32, device=logits.device)
    top, most = found[:2]
    for rows, (p, weighted) in _blocks(logits):
        torch.softmax(logits[rows], 1, dtype=torch.float32, out=p)
        top[rows], most[rows] = logits[rows].amax(1), p.amax(1)
        torch.sum(torch.mul(p, logits[rows], out=weighted), 1, out=found[3, rows])
    top -= most.log()
    found[1] = 1.0
    picked = logits.gather(1, columns.clamp(min=0)[:, None])[:, 0].float()
    found[2] = torch.where(columns >= 0, picked, 0.0)
    return found


def row_gradient(
    logits: Tensor,
    columns: Tensor,
    share: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    out: Tensor,
) -> Tensor:
    """d loss / d logits = g_logp (1[target] - p) - g_entropy p (log p + H), into `out`, which is returned.

    logits, columns: as in `row_statistics`. share (the part of the whole softmax on this shard), log_sum, entropy (H), g_logp,
    g_entropy: fp32 [rows]; log p = logits - log_sum. g_entropy: None where the loss has no entropy term. out: fp32 or bf16
    [rows, real]; may be `logits` itself.
    """
    # A block's p sums to 1 over this shard alone. Everything by row is made once: with few rows a block it would cost as much.
    slope, offset = None, (-g_logp * share)[:, None]
    if g_entropy is not None:
        slope = (-g_entropy * share)[:, None]
        offset = offset - slope * (log_sum - entropy)[:, None]
    for rows, (p, factor) in _blocks(logits):
        torch.softmax(logits[rows], 1, dtype=torch.float32, out=p)
        if slope is None:
            torch.mul(p, offset[rows], out=out[rows])
        else:
            torch.addcmul(offset[rows], logits[rows], slope[rows], out=factor)
            torch.mul(factor, p, out=out[rows])
    here = torch.where(columns >= 0, g_logp, 0.0).to(out.dtype)
    return out.scatter_add_(1, columns.clamp(min=0)[:, None], here[:, None])
