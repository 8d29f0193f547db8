"""Whether a loss that is marked token-local is."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.objective.inputs import LossInputs
from etr_megatron.objective.registry import PolicyLoss

_TOLERANCE = 1e-3
"""Of the largest gradient: a loss that divides by its number of rows is wrong by as much as there are chunks."""


def refuse_if_rows_interact(loss: PolicyLoss, inputs: LossInputs) -> bool:
    """Compare the gradients of `loss` of R rows at once with those of two halves; False where these rows cannot tell.

    inputs: with R >= 2 rows; a copy of `logp` and `entropy` is used, and rows whose advantage is 0 get one that is drawn, since
    without any most losses have no gradient to compare. A loss that takes a mean over its rows, or looks at other rows, has
    others in halves, and would have others again with every size of the head's chunks. Raises UserError for one. Rows cannot
    tell where every gradient is 0, or one is not finite.
    """
    count = len(inputs.logp)
    inputs = replace(inputs, advantage=torch.where(inputs.advantage == 0, _drawn(inputs.advantage), inputs.advantage))
    whole = _gradients(loss, inputs, [slice(0, count)])
    halves = _gradients(loss, inputs, [slice(0, count // 2), slice(count // 2, count)])
    if not bool(torch.isfinite(whole).all()):  # whoever trains with it says where
        return False
    gap, size = (whole - halves).abs().max().item(), whole.abs().max().item()
    if gap > _TOLERANCE * size:
        raise UserError(
            f"objective.loss {loss.name} is marked token-local, but a row's gradient depends on which rows come with it (by "
            f"{gap / size:.0%} of the largest); remove the mark, or take sums with inputs.weight instead of means"
        )
    return size > 0


def _drawn(like: Tensor) -> Tensor:
    """Numbers from 0.5 to 1 and from -1 to -0.5, always the same, whose mean and deviation are not 0."""
    numbers = torch.rand(len(like), generator=torch.Generator().manual_seed(0)) - 0.5
    return (numbers + numbers.sign() / 2).to(like)


def _gradients(loss: PolicyLoss, inputs: LossInputs, parts: list[slice]) -> Tensor:
    """With respect to logp and entropy, fp32 [2, R]."""
    found = []
    with torch.enable_grad():
        for rows in parts:
            values = [one.detach()[rows].clone().requires_grad_() for one in (inputs.logp, inputs.entropy)]
            gradients = torch.autograd.grad(loss(inputs.at(rows, *values)).loss, values, allow_unused=True)
            found.append(torch.stack([torch.zeros_like(v) if g is None else g for v, g in zip(values, gradients, strict=True)]))
    return torch.cat(found, dim=1)
