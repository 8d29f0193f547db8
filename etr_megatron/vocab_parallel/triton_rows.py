"""The two row-wise passes of `torch_rows` as Triton kernels: logits are read once for the statistics, and read once and written
once for the gradient. GEMMs stay with the library.

Runs compiled on CUDA (sm_80 and later) or, for tests, on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 before triton
is first imported). `tests/test_triton_rows.py` runs the same cases compiled if there is a GPU. On an H100 the head with these
passes took 1.07 to 1.12 x the time of its GEMMs, with those in torch 1.59 to 1.83 x (benchmarks/results/gpu.json; measured
before the statistics' second sum was taken relative to the maximum).

Loads and stores are 16 bytes wide if `real` and the row stride are multiples of 16 (as with a vocabulary of 151,936 at TP1 to
TP8); other sizes give the same results, slower.

triton is optional: without it this module can be imported, and `is_available` returns False.

Precondition of both passes, here and in `torch_rows`: real >= 1 and every logit is finite. A row with a NaN or +inf gets NaN
statistics, which the run detects, and does not affect other rows. The result for a row with -inf is undefined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_TILE = 4096
"""Columns that a program processes at a time: 16 fp32 values for each thread of 8 warps."""

_PROGRAMS = 512
"""Programs that keep a GPU busy (a few on each of an H100's 132 multiprocessors); with fewer rows, rows are split."""


def is_available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`: CUDA with capability >= 8.0, or CPU in Triton's interpreter."""
    if triton is None:
        return False
    if device.type == "cuda":
        return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not isinstance(_statistics_kernel, triton.JITFunction)


def row_statistics(logits: Tensor, columns: Tensor) -> Tensor:
    """A shard's part of each row's softmax: fp32 [4, rows] of max m, sum of exp(l - m), target logit, sum of exp(l - m)(l - m).

    logits: fp32 or bf16 [rows, real] with column stride 1 (any row stride). columns: int64 [rows], the target's column, -1 if
    another shard has it (the target logit is then 0). Raises ValueError for another layout or dtype.
    """
    rows, real = logits.shape
    _check_layout(logits, "logits")
    tile = min(_TILE, triton.next_power_of_2(max(1, real)))
    span = tile * triton.cdiv(triton.cdiv(max(1, real), tile), max(1, _PROGRAMS // max(1, rows)))
    splits = triton.cdiv(max(1, real), span)
    partial = torch.empty(splits, 4, rows, dtype=torch.float32, device=logits.device)
    warps = _warps(tile)
    _statistics_kernel[rows, splits](logits, columns, partial, logits.stride(0), rows, real, span, TILE=tile, num_warps=warps)
    if splits == 1:
        return partial[0]
    found = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    _join_kernel[(rows,)](partial, found, rows, splits, SPLITS=triton.next_power_of_2(splits), num_warps=1)
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

    logits, columns: as in `row_statistics`. log_sum, entropy (H), g_logp, g_entropy: fp32 [rows]; log p = logits - log_sum.
    g_entropy: None if the loss has no entropy term. out: fp32 or bf16 [rows, real] with column stride 1; may be `logits`
    itself, but must not overlap it otherwise. Where p underflows to 0 the gradient is 0, plus g_logp at the target.
    """
    rows, real = logits.shape
    _check_layout(logits, "logits")
    _check_layout(out, "out")
    tile = min(_TILE, triton.next_power_of_2(max(1, real)))
    _gradient_kernel[rows, triton.cdiv(real, tile)](
        logits,
        columns,
        *(x.contiguous() for x in (log_sum, entropy, g_logp)),
        g_logp if g_entropy is None else g_entropy.contiguous(),  # a placeholder pointer that is never read
        out,
        logits.stride(0),
        out.stride(0),
        real,
        HAS_ENTROPY=g_entropy is not None,
        TILE=tile,
        num_warps=_warps(tile),
    )
    return out


def _check_layout(matrix: Tensor, name: str) -> None:
    if matrix.dtype not in (torch.float32, torch.bfloat16) or (matrix.shape[1] > 1 and matrix.stride(1) != 1):
        raise ValueError(
            f"{name} must be fp32 or bf16 with adjacent columns, not {matrix.dtype} of shape {tuple(matrix.shape)} and strides "
            f"{matrix.stride()}"
        )


def _warps(tile: int) -> int:
    return min(8, max(1, tile // 512))


def _jit(kernel: Callable[..., None]) -> Any:
    """`triton.jit` if triton is installed, else the plain function."""
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _statistics_kernel(logits, columns, partial, row_stride, rows, real, span, TILE: tl.constexpr):
    """Program (row, split): write statistics of columns [split * span, (split + 1) * span) to partial [splits, 4, rows].

    Online softmax (Milakov and Gimelshein, arXiv 1805.02867): sums are rescaled whenever the maximum grows. The maximum itself
    contributes exactly exp(0) = 1, so that a log-prob, m' - m - log(sum), cannot exceed zero.
    """
    row = tl.program_id(0).to(tl.int64)  # a chunk may hold more than 2^31 logits
    split = tl.program_id(1)
    begin = split * span
    end = tl.minimum(begin + span, real)
    line = logits + row * row_stride
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)  # one sum per lane, reduced over the program's threads once at the end
    weighted = tl.zeros((TILE,), tl.float32)
    for start in range(begin, end, TILE):
        index = start + tl.arange(0, TILE)
        x = tl.load(line + index, mask=index < end, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # only -inf so far: -inf - -inf is NaN
        shrink = tl.exp(top - base)
        e = tl.exp(x - base)
        # Also relative to the maximum: a common offset of the logits would cost precision. Both zeros avoid 0 * -inf = NaN.
        weighted += total * tl.where(top == float("-inf"), 0.0, top - base)
        weighted = weighted * shrink + e * tl.where(e == 0.0, 0.0, x - base)
        total = total * shrink + e
        top = new_top
    column = tl.load(columns + row)
    here = (column >= begin) & (column < end)
    target = tl.load(line + column, mask=here, other=0.0).to(tl.float32)
    found = partial + split * 4 * rows + row
    tl.store(found, top)
    tl.store(found + rows, tl.sum(total, 0))
    tl.store(found + 2 * rows, target)
    tl.store(found + 3 * rows, tl.sum(weighted, 0))


@_jit
def _join_kernel(partial, found, rows, splits, SPLITS: tl.constexpr):
    """Program (row): combine partial [splits, 4, rows] into found [4, rows]."""
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    here = split < splits
    source = partial + split * 4 * rows + row
    top = tl.load(source, mask=here, other=float("-inf"))
    peak = tl.max(top, 0)
    below = top - tl.where(peak == float("-inf"), 0.0, peak)
    shrink = tl.exp(below)
    total = tl.load(source + rows, mask=here, other=0.0)
    weighted = tl.load(source + 3 * rows, mask=here, other=0.0) + total * tl.where(top == float("-inf"), 0.0, below)
    tl.store(found + row, peak)
    tl.store(found + rows + row, tl.sum(total * shrink, 0))
    tl.store(found + 2 * rows + row, tl.sum(tl.load(source + 2 * rows, mask=here, other=0.0), 0))
    tl.store(found + 3 * rows + row, tl.sum(weighted * shrink, 0))


@_jit
def _gradient_kernel(
    logits,
    columns,
    log_sum,
    entropy,
    g_logp,
    g_entropy,
    out,
    logits_stride,
    out_stride,
    real,
    HAS_ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (row, tile): write the gradient of one tile. `out` may be `logits`, because a program reads its tile before it
    writes it, and no other program accesses that tile."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = index < real
    x = tl.load(logits + row * logits_stride + index, mask=inside, other=float("-inf")).to(tl.float32)
    log_p = x - tl.load(log_sum + row)
    p = tl.exp(log_p)
    upstream = tl.load(g_logp + row)
    slope = tl.zeros((TILE,), tl.float32) + upstream
    if HAS_ENTROPY:
        slope += tl.load(g_entropy + row) * (log_p + tl.load(entropy + row))
    grad = -p * tl.where(p == 0.0, 0.0, slope)  # 0 * -inf is NaN
    grad += tl.where(index == tl.load(columns + row), upstream, 0.0)
    tl.store(out + row * out_stride + index, grad.to(out.dtype.element_ty), mask=inside)
