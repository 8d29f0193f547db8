"""The head's three matrix products, all with an fp32 result.

fp32 operands: one library call each, into place. bf16 on CUDA: the same, cuBLAS writes fp32. bf16 on CPU: torch has no product
of bf16 operands with an fp32 result, so each product is rounded to bf16 once before it is added in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_BYTES = 2 << 20
"""Of the weight, or its bf16 gradient, that a product on CPU takes at a time."""

_FEW_ROWS = 256
"""Up to so many rows, products on CPU wait for the weight and its gradient more than they compute; both then go together over a
block that stays in the cache, in a tenth less time. With more rows the calls cost more than that saves."""


def _writes_fp32(operand: Tensor) -> bool:
    return operand.is_cuda and operand.dtype != torch.float32


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    """out [rows, real] fp32 = scale * hidden [rows, H] @ weight [real, H]^T; returns `out`, owned by the caller."""
    if hidden.is_cpu:
        # A few rows of the weight at a time: with few rows of `hidden` MKL takes 1.2 times as long for all columns in one call.
        step = max(256, _weight_rows(weight))
        for begin in range(0, len(weight), step):
            columns = slice(begin, begin + step)
            _logits_at_once(out[:, columns], hidden, weight[columns], scale)
        return out
    return _logits_at_once(out, hidden, weight, scale)


def _logits_at_once(out: Tensor, hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    if hidden.dtype == torch.float32:
        return torch.addmm(out, hidden, weight.t(), beta=0, alpha=scale, out=out)
    if _writes_fp32(hidden):
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    else:
        out.copy_(hidden @ weight.t())
    return out if scale == 1 else out.mul_(scale)


def gradients_into(grad_hidden: Tensor, total: Tensor | None, grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """`hidden_grad_into` (`grad_hidden`) and, with a `total`, `add_weight_grad`, from the same gradient of the logits."""
    if total is None or not grad.is_cpu or grad.dtype != torch.float32 or len(grad) > _FEW_ROWS:
        hidden_grad_into(grad_hidden, grad, weight)
        if total is not None:
            add_weight_grad(total, grad, hidden)
        return
    grad_hidden.zero_()
    step = _weight_rows(weight)
    for begin in range(0, len(weight), step):
        block = slice(begin, begin + step)
        grad_hidden.addmm_(grad[:, block], weight[block])
        add_weight_grad(total[block], grad[:, block], hidden)


def _weight_rows(weight: Tensor) -> int:
    return max(1, _BLOCK_BYTES // (weight.element_size() * weight.shape[1]))


def hidden_grad_into(out: Tensor, grad: Tensor, weight: Tensor) -> None:
    """out [rows, H] fp32 = grad [rows, real] @ weight [real, H]."""
    if grad.dtype == torch.float32:
        torch.mm(grad, weight, out=out)
    elif _writes_fp32(grad):
        torch.mm(grad, weight, out_dtype=torch.float32, out=out)
    else:
        out.copy_(grad @ weight)


def weight_grad_block(hidden_size: int) -> int:
    """Rows of the weight whose bf16 gradient `add_weight_grad` makes at a time on CPU."""
    return max(1, _BLOCK_BYTES // (2 * hidden_size))


def add_weight_grad(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total [real, H] fp32 += grad [rows, real]^T @ hidden [rows, H], in place; `total` is the caller's."""
    if grad.dtype == torch.float32:
        total.addmm_(grad.t(), hidden)
    elif _writes_fp32(grad):
        torch.addmm(total, grad.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        step = weight_grad_block(hidden.shape[1])
        for begin in range(0, grad.shape[1], step):
            block = slice(begin, begin + step)
            total[block] += (grad[:, block].t() @ hidden).float()  # adding bf16 makes the same copy where nobody sees it
