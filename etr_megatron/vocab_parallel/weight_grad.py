"""Accumulation of the head's weight gradient in Megatron's gradient buffer, if there is one.

Megatron's DDP gives a parameter `main_grad`, a view of its gradient buffer, and a hook on gradient accumulation that adds
`param.grad` to it unless `grad_added_to_main_grad` is set. DDP owns the buffer; the head adds to it between
`zero_grad_buffer` and the hook of the last microbatch: directly if it is fp32, else once per microbatch, from an fp32 sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightGrad:
    """The fp32 sum [Vp/TP, H] of a parameter's gradient, which may be `main_grad` itself."""

    weight: Tensor
    total: Tensor

    def add_to_main_grad(self) -> None:
        """Add the finished sum to `main_grad`, unless there is none or it is that already."""
        buffer = main_grad(self.weight)
        if buffer is not None and buffer is not self.total:
            buffer.add_(self.total)

    def autograd_grad(self) -> Tensor:
        """The gradient to return to autograd, in the weight's dtype; zero if there is a `main_grad`, which then has it."""
        if main_grad(self.weight) is None:
            return self.total.to(self.weight.dtype)
        self.add_to_main_grad()
        return mark_grad_added(self.weight)


def mark_grad_added(weight: Tensor) -> Tensor:
    """Tell Megatron that `main_grad` has the gradient; returns the zero that autograd gets instead.

    The zero is a sparse tensor without entries, since a dense one would take as much memory as the weight. It cannot be
    None: for an undefined gradient, autograd runs the hook on another thread than the hooks of other CUDA parameters, so
    ranks might start their overlapped reductions in different orders (see Megatron's own dummy in tensor_parallel/layers.py).
    With tied embeddings on one stage, autograd adds the embedding's gradient to it, and DDP's hook adds the sum to
    `main_grad` (`zero_out_wgrad`).
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's mark
    return torch.zeros_like(weight, layout=torch.sparse_coo)


def main_grad(weight: Tensor) -> Tensor | None:
    """The parameter's gradient buffer from Megatron, [Vp/TP, H] in any dtype, or None."""
    buffer = getattr(weight, "main_grad", None)
    return buffer if isinstance(buffer, Tensor) else None


def weight_grad(weight: Tensor) -> WeightGrad:
    """`main_grad` if it exists in fp32, else a new fp32 sum."""
    buffer = main_grad(weight)
    if buffer is not None and buffer.dtype == torch.float32:
        return WeightGrad(weight, buffer)
    return WeightGrad(weight, torch.zeros(weight.shape, dtype=torch.float32, device=weight.device))
