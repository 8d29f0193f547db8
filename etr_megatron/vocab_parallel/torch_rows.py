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

_CACHED_ELEMENTS = 1 << 17
"""fp32 elements of the temporary on CPU: 512 KiB, which fits a second-level cache beside the logits it is made from."""


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


def _softmax(block: Tensor, out: Tensor) -> Tensor:
    """Softmax of `block` [rows, real] over its own columns, into `out`; returns the log-sum-exp of each row.

    The library's softmax is one pass that stays in the cache, three times as fast on CPU as subtracting, exp() and summing. Its
    largest value is at least 1 / real, so that the log is accurate.
    """
    torch.softmax(block, 1, dtype=torch.float32, out=out)
    return block.amax(1).float() - out.amax(1).log()


def row_statistics(logits: Tensor, columns: Tensor) -> Tensor:
    """A shard's part of each row's softmax: fp32 [4, rows] of m, sum of exp(l - m), target logit, sum of exp(l - m) l.

    m is the shard's log-sum-exp here (the sum is then 1); any m that keeps exp() in range does. logits: fp32 or bf16 [rows,
    real]. columns: int64 [rows], the target's column, -1 where another shard has it (its target logit is 0).
    """
    found = torch.empty(4, len(logits), dtype=torch.float32, device=logits.device)
    found[1] = 1.0
    for rows, (p, weighted) in _blocks(logits):
        found[0, rows] = _softmax(logits[rows], p)
        found[3, rows] = torch.mul(p, logits[rows], out=weighted).sum(1)
    picked = logits.gather(1, columns.clamp(min=0)[:, None])[:, 0].float()
    found[2] = torch.where(columns >= 0, picked, 0.0)
    return found


def row_gradient(
    logits: Tensor, columns: Tensor, log_sum: Tensor, entropy: Tensor, g_logp: Tensor, g_entropy: Tensor | None, out: Tensor
) -> Tensor:
    """d loss / d logits = g_logp (1[target] - p) - g_entropy p (log p + H), into `out`, which is returned.

    logits, columns: as in `row_statistics`. log_sum, entropy (H), g_logp, g_entropy: fp32 [rows]; log p = logits - log_sum.
    g_entropy: None where the loss has no entropy term. out: fp32 or bf16 [rows, real]; may be `logits` itself.
    """
    for rows, (p, factor) in _blocks(logits):
        # p sums to 1 over this shard alone; `share` is the shard's part of the whole.
        share = (_softmax(logits[rows], p) - log_sum[rows]).exp_()
        if g_entropy is None:
            torch.mul(p, -(g_logp[rows] * share)[:, None], out=out[rows])
        else:
            slope = -g_entropy[rows] * share
            offset = (g_entropy[rows] * (log_sum[rows] - entropy[rows]) - g_logp[rows]) * share
            torch.mul(logits[rows], slope[:, None], out=factor).add_(offset[:, None])
            torch.mul(factor, p, out=out[rows])
    here = torch.where(columns >= 0, g_logp, 0.0).to(out.dtype)
    return out.scatter_add_(1, columns.clamp(min=0)[:, None], here[:, None])
