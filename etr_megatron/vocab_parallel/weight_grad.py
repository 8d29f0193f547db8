"""Accumulation of the head's weight gradient, directly in Megatron's fp32 buffer if there is one.

Megatron's DDP gives a parameter `main_grad`, a view of its gradient buffer, and a hook on gradient accumulation that adds
`param.grad` to it unless `grad_added_to_main_grad` is set. DDP owns the buffer; the head adds to it between
`zero_grad_buffer` and the hook of the last microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightGrad:
    """The fp32 sum [Vp/TP, H] of a parameter's gradient, and the gradient to return to autograd at the end."""

    weight: Tensor
    total: Tensor
    is_main_grad: bool

    def handed_to_autograd(self) -> Tensor:
        """The gradient to return to autograd, in the weight's dtype; zero if `main_grad` already has it.

        The zero is a sparse tensor without entries, since a dense one would take as much memory as the weight. It cannot be
        None: for an undefined gradient, autograd runs the hook on another thread than the hooks of other CUDA parameters, so
        ranks might start their overlapped reductions in different orders (see Megatron's own dummy in
        tensor_parallel/layers.py). With tied embeddings on one stage, autograd adds the embedding's gradient to it, and DDP's
        hook adds the sum to `main_grad` (`zero_out_wgrad`).
        """
        if not self.is_main_grad:
            return self.total.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's mark
        return torch.zeros_like(self.weight, layout=torch.sparse_coo)


def main_grad(weight: Tensor) -> Tensor | None:
    """The parameter's gradient buffer from Megatron, [Vp/TP, H], if it has one in fp32, else None."""
    buffer = getattr(weight, "main_grad", None)
    return buffer if isinstance(buffer, Tensor) and buffer.dtype == torch.float32 else None


def weight_grad(weight: Tensor) -> WeightGrad:
    """`main_grad` if it exists in fp32, else a new fp32 sum."""
    if (buffer := main_grad(weight)) is not None:
        return WeightGrad(weight, buffer, True)
    return WeightGrad(weight, torch.zeros(weight.shape, dtype=torch.float32, device=weight.device), False)
