"""The head's three GEMMs, all with fp32 results.

On CUDA each is one library call with an output argument; cuBLAS writes fp32 from bf16 operands. On CPU the weight is processed
in blocks, which stay in the cache between the products that need them. For bf16 on CPU, torch has no GEMM of bf16 operands with
an fp32 result, so each product is rounded to bf16 once before it is added in fp32.

With fp32 on CPU the products use oneDNN: `torch.mm` uses MKL, which took 2.2 times as long on an AMD EPYC
(benchmarks/README.md). Without oneDNN in torch they fall back to torch.mm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK_BYTES, _BLOCK_ROWS = 1 << 20, 1024
"""Maximum size and rows of a weight block on CPU."""

ROWS = 32
"""oneDNN compiles and caches a kernel for each shape, at half a millisecond and half a megabyte. Row counts vary with a
microbatch's tokens, so they are padded to multiples of this."""


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _has_onednn()


def round_up_rows(rows: int) -> int:
    """The next multiple of `ROWS`."""
    return -(-rows // ROWS) * ROWS


def padded_rows(rows: int, dtype: torch.dtype) -> int:
    """The number of rows to which a CPU product pads its `rows` rows with zeros."""
    return round_up_rows(rows) if _ONEDNN and dtype == torch.float32 else rows


def _zero_padded(matrix: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
    """Append `rows` rows and `columns` columns of zeros; returns `matrix` itself if both are 0."""
    return pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] @ right [N, K]^T on CPU, as a new tensor of their dtype."""
    if _ONEDNN and left.dtype == torch.float32:
        if not (right.is_contiguous() or right.t().is_contiguous()):
            right = right.contiguous()  # otherwise it would be multiplied element by element, hundreds of times slower
        # The op that torch.compile uses for a linear layer. It would copy a non-contiguous `left` anyway.
        return torch.ops.mkldnn._linear_pointwise(left.contiguous(), right, None, "none", [], "")
    return left @ right.t()


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Row slices of the weight's blocks."""
    step = block_rows(weight.shape[1], weight.element_size())
    for begin in range(0, len(weight), step):
        yield slice(begin, begin + step)


def block_rows(hidden_size: int, element_size: int) -> int:
    """Rows of a weight block on CPU."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (element_size * hidden_size)))


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    """out [rows, real] fp32 = scale * hidden [rows, H] @ weight [real, H]^T; returns `out`, owned by the caller."""
    if hidden.is_cpu:
        more = padded_rows(len(hidden), hidden.dtype) - len(hidden)
        states = _zero_padded(hidden, rows=more)
        for block in _blocks(weight):
            columns = out[:, block].copy_(_product(states, weight[block])[: len(hidden)])
            if scale != 1:
                columns.mul_(scale)
        return out
    if hidden.dtype == torch.float32:
        return torch.addmm(out, hidden, weight.t(), beta=0, alpha=scale, out=out)
    torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    return out if scale == 1 else out.mul_(scale)


def add_gradients(grad_hidden: Tensor, total: Tensor | None, grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """grad_hidden [rows, H] += grad [rows, n] @ weight [n, H] and, with a `total`, [n, H] += grad^T @ hidden [rows, H].

    grad, hidden and weight share one dtype. Both sums are fp32, owned by the caller and updated in place.
    """
    if grad.is_cpu:
        _add_gradients_on_cpu(grad_hidden, total, grad, hidden, weight)
        return
    into: dict[str, Any] = {} if grad.dtype == torch.float32 else {"out_dtype": torch.float32}
    torch.addmm(grad_hidden, grad, weight, out=grad_hidden, **into)
    if total is not None:
        torch.addmm(total, grad.t(), hidden, out=total, **into)


def _add_gradients_on_cpu(grad_hidden: Tensor, total: Tensor | None, grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
    by_block, rows = grad.dtype == torch.float32, len(grad)
    if not by_block:  # by block, every partial sum would be rounded to bf16
        grad_hidden += (grad @ weight).float()
    more = padded_rows(rows, grad.dtype) - rows
    states = _zero_padded(hidden, rows=more)
    for block in _blocks(weight):
        part = grad[:, block]
        if by_block:
            grad_hidden += _product(_zero_padded(part, rows=more), weight[block].t())[:rows]
        if total is not None:
            total[block] += _product(_zero_padded(part.t(), columns=more), states.t()).float()
