"""Where the head's weight gradient goes: straight into Megatron's fp32 buffer where there is one.

Megatron's DDP gives a parameter `main_grad`, a view of its gradient buffer, and a hook on gradient accumulation that adds
`param.grad` to it unless `grad_added_to_main_grad` says that this was done. DDP owns the buffer; the head adds to it between
`zero_grad_buffer` and the hook of the last microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightGrad:
    """The fp32 sum [Vp/TP, H] of a parameter's gradient, and what autograd is handed in the end."""

    weight: Tensor
    total: Tensor
    is_main_grad: bool

    def handed_to_autograd(self) -> Tensor:
        """The gradient in the weight's dtype; zero where it is in `main_grad` already.

        That zero is a sparse tensor without entries: dense ones would take as much memory as the weight. It cannot be None:
        autograd runs the hook of an undefined gradient on another thread than those of other CUDA parameters, so that ranks
        might start their overlapped reductions in different orders (see Megatron's own dummy in tensor_parallel/layers.py).
        With tied embeddings on one stage autograd adds the embedding's gradient, and the hook adds that (`zero_out_wgrad`).
        """
        if not self.is_main_grad:
            return self.total.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's mark
        return torch.zeros_like(self.weight, layout=torch.sparse_coo)


def main_grad(weight: Tensor) -> Tensor | None:
    """The parameter's fp32 gradient buffer of Megatron's, if it has one."""
    buffer = getattr(weight, "main_grad", None)
    return buffer if isinstance(buffer, Tensor) and buffer.dtype == torch.float32 else None


def weight_grad(weight: Tensor) -> WeightGrad:
    """`main_grad` if there is one in fp32, else a fresh fp32 sum."""
    if (buffer := main_grad(weight)) is not None:
        return WeightGrad(weight, buffer, True)
    return WeightGrad(weight, torch.zeros(weight.shape, dtype=torch.float32, device=weight.device), False)
