"""The head's three matrix products, all with an fp32 result.

On CUDA one library call each, into place; cuBLAS writes fp32 from bf16 operands. On CPU a block of the weight at a time, which
stays in the cache between the products that need it. bf16 on CPU: torch has no product of bf16 operands with an fp32 result, so
each product is rounded to bf16 once before it is added in fp32.

In fp32 on CPU the products are oneDNN's: `torch.mm` has them from MKL, which took 2.2 times as long on an AMD EPYC
(benchmarks/README.md). Where torch was built without oneDNN they are torch.mm's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK_BYTES, _BLOCK_ROWS = 1 << 20, 1024
"""Of the weight, the most that a product on CPU takes at a time: so much, and so many rows."""

ROWS = 32
"""oneDNN makes a program for each shape it is given, in half a millisecond, and keeps it, in half a megabyte. So the rows, as
many as a microbatch has tokens, come in multiples of this."""


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _has_onednn()


def in_multiples(rows: int) -> int:
    """The next multiple of `ROWS`."""
    return -(-rows // ROWS) * ROWS


def padded_rows(rows: int, dtype: torch.dtype) -> int:
    """Rows that a product on CPU is computed with when it is asked for of `rows`; those beyond them are zeros."""
    return in_multiples(rows) if _ONEDNN and dtype == torch.float32 else rows


def _with_zeros(matrix: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
    """With so many rows and columns of zeros behind it; itself where there are none."""
    return pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] @ right [N, K]^T on CPU, a new tensor of their dtype."""
    if _ONEDNN and left.dtype == torch.float32:
        if not (right.is_contiguous() or right.t().is_contiguous()):
            right = right.contiguous()  # as it is, it would be multiplied element by element, hundreds of times as slowly
        # What torch.compile makes of a linear layer. It would copy a `left` that is not contiguous itself.
        return torch.ops.mkldnn._linear_pointwise(left.contiguous(), right, None, "none", [], "")
    return left @ right.t()


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of the weight, a block at a time."""
    step = block_rows(weight.shape[1], weight.element_size())
    for begin in range(0, len(weight), step):
        yield slice(begin, begin + step)


def block_rows(hidden_size: int, element_size: int) -> int:
    """Rows of the weight that a product on CPU takes at a time."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (element_size * hidden_size)))


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    """out [rows, real] fp32 = scale * hidden [rows, H] @ weight [real, H]^T; returns `out`, owned by the caller."""
    if hidden.is_cpu:
        more = padded_rows(len(hidden), hidden.dtype) - len(hidden)
        states = _with_zeros(hidden, rows=more)
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

    grad, hidden and weight have one dtype. Both sums are fp32, added to in place, and the caller's.
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
    if not by_block:  # every block would be rounded to bf16
        grad_hidden += (grad @ weight).float()
    more = padded_rows(rows, grad.dtype) - rows
    states = _with_zeros(hidden, rows=more)
    for block in _blocks(weight):
        part = grad[:, block]
        if by_block:
            grad_hidden += _product(_with_zeros(part, rows=more), weight[block].t())[:rows]
        if total is not None:
            total[block] += _product(_with_zeros(part.t(), columns=more), states.t()).float()
