"""The two row-wise passes over a chunk of logits in torch, for any device. `triton_rows` has them as Triton kernels for CUDA.

Precondition of both passes, here and in `triton_rows`: real >= 1 and every logit is finite. A row with a NaN or +inf gets NaN
statistics, which the run detects, and does not affect other rows. The result for a row with -inf is undefined.

On CPU the passes process a few rows, or a tile, at a time, so that the temporary stays in the cache and nothing of a chunk's
size is allocated besides the chunk itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CACHED_ELEMENTS = 1 << 18
"""fp32 elements of a temporary on CPU, 1 MiB: larger ones exceed the L2 cache, smaller ones need more calls."""

_TILE = (16, 8192)
"""Rows and columns of a gradient tile on CPU, half of `_CACHED_ELEMENTS`."""


def block_rows(rows: int, real: int, device: torch.device) -> int:
    """Rows processed at a time for the statistics, with an fp32 temporary of that size."""
    return rows if device.type != "cpu" else min(rows, max(1, _CACHED_ELEMENTS // max(1, real)))


def tile_shape(rows: int, real: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns processed at a time for the gradient, with an fp32 temporary of that size."""
    return (rows, real) if device.type != "cpu" else (min(rows, _TILE[0]), min(real, _TILE[1]))


def row_statistics(logits: Tensor, columns: Tensor) -> Tensor:
    """A shard's part of each row's softmax: fp32 [4, rows] of max m, sum of exp(l - m), target logit, sum of exp(l - m)(l - m).

    logits: fp32 [rows, real]. columns: int64 [rows], the target's column, -1 if another shard has it (the target logit is
    then 0).
    """
    count, real = logits.shape
    found = torch.empty(4, count, dtype=torch.float32, device=logits.device)
    found[1::2] = 0
    step, half = max(1, block_rows(count, real, logits.device)), -(-real // 2)
    # Half of the columns at a time: l - m and its exp() are both needed, and the two temporaries take the space of one.
    scratch = torch.empty(2, step, half, dtype=torch.float32, device=logits.device)
    for begin in range(0, count, step):
        rows = slice(begin, min(begin + step, count))
        top = torch.amax(logits[rows], 1, out=found[0, rows])
        for left in (0, half):
            block = logits[rows, left : left + half]
            below, e = scratch[:, : block.shape[0], : block.shape[1]]
            torch.exp(torch.sub(block, top[:, None], out=below), out=e)
            found[1, rows] += e.sum(1)
            found[3, rows] += below.mul_(e).sum(1)
    picked = logits.gather(1, columns.clamp(min=0)[:, None])[:, 0]
    found[2] = torch.where(columns >= 0, picked, 0.0)
    return found


def row_gradient(
    logits: Tensor,
    columns: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Write d loss / d logits = g_logp (1[target] - p) - g_entropy p (log p + H) to `out` and return it.

    logits, columns: as in `row_statistics`; the logits are overwritten. log_sum, entropy (H), g_logp, g_entropy: fp32 [rows];
    log p = logits - log_sum. g_entropy: None if the loss has no entropy term. out: fp32 or bf16 [rows, real]; may be
    `logits` itself.
    """
    # Compute per-row terms once. The gradient is p (offset + slope log p), except at the target.
    target = _target_entry(logits, columns, log_sum, entropy, g_logp, g_entropy)
    log_sum, offset, slope = log_sum[:, None], -g_logp[:, None], None
    if g_entropy is not None:
        slope = -g_entropy[:, None]
        offset = offset + slope * entropy[:, None]
    for rows, tile, p in _tiles(logits):
        block = logits[rows, tile]
        if slope is None:
            torch.mul(torch.sub(block, log_sum[rows], out=p).exp_(), offset[rows], out=out[rows, tile])
        else:
            # In place, because the cache holds only three operands at a time.
            torch.exp(block.sub_(log_sum[rows]), out=p)
            torch.mul(block.mul_(slope[rows]).add_(offset[rows]), p, out=out[rows, tile])
    # For another shard's target, write back the existing value: selecting rows would synchronize with the GPU.
    # Not scatter_, which on CPU converts a whole bf16 matrix to fp32 and back.
    at = torch.arange(len(out), device=out.device), columns.clamp(min=0)
    return out.index_put_(at, torch.where(columns >= 0, target.to(out.dtype), out[at]))


def _target_entry(
    logits: Tensor, columns: Tensor, log_sum: Tensor, entropy: Tensor, g_logp: Tensor, g_entropy: Tensor | None
) -> Tensor:
    """fp32 [rows]: the gradient at each row's target, g_logp (1 - p) - g_entropy p (log p + H); arbitrary if it is elsewhere.

    For a confident token, 1 - p is far below the resolution of bf16 at 1: as a difference of rounded numbers it could be wrong
    by any factor, or 0 although the row's other entries are not.
    """
    log_p = logits.gather(1, columns.clamp(min=0)[:, None])[:, 0] - log_sum
    entry = -g_logp * torch.expm1(log_p)
    return entry if g_entropy is None else entry - g_entropy * log_p.exp() * (log_p + entropy)


def _tiles(logits: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, fp32 scratch of their shape) of all tiles; a scratch is valid until the next tile."""
    count, real = logits.shape
    high, wide = tile_shape(count, real, logits.device)
    scratch = torch.empty(high * wide, dtype=torch.float32, device=logits.device)
    for top in range(0, count, max(1, high)):
        rows = slice(top, min(top + high, count))
        for left in range(0, real, max(1, wide)):
            columns = slice(left, min(left + wide, real))
            shape = rows.stop - top, columns.stop - left
            yield rows, columns, scratch[: shape[0] * shape[1]].view(shape)
