"""Check that a loss marked token-local is token-local."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.objective.inputs import LossInputs
from etr_megatron.objective.registry import PolicyLoss

_TOLERANCE = 1e-3
"""Relative to the largest gradient. The error to detect is much larger: a loss that divides by its number of rows has gradients
that are too large by a factor of the number of chunks."""


def check_row_independence(loss: PolicyLoss, inputs: LossInputs) -> bool:
    """Compare the gradients of `loss` over R rows at once with those over two halves; False if the comparison is inconclusive.

    inputs: R >= 2 rows. The check uses copies of `logp` and `entropy`, and a random advantage for rows where it is 0, since
    most losses have no gradient there. Raises UserError for a loss that takes a mean over its rows or looks at other rows: its
    gradients would change with the head's chunk size. The comparison is inconclusive if every gradient is 0 or one is not
    finite.
    """
    count = len(inputs.logp)
    inputs = replace(inputs, advantage=torch.where(inputs.advantage == 0, _drawn(inputs.advantage), inputs.advantage))
    whole = _gradients(loss, inputs, [slice(0, count)])
    halves = _gradients(loss, inputs, [slice(0, count // 2), slice(count // 2, count)])
    if not bool(torch.isfinite(whole).all()):  # training reports the token
        return False
    gap, size = (whole - halves).abs().max().item(), whole.abs().max().item()
    if gap > _TOLERANCE * size:
        raise UserError(
            f"objective.loss {loss.name} is marked token-local, but a row's gradient depends on the other rows (by "
            f"{gap / size:.0%} of the largest); remove the mark, or use sums with inputs.weight instead of means"
        )
    return size > 0


def _drawn(like: Tensor) -> Tensor:
    """Fixed random numbers in [0.5, 1] and [-1, -0.5], with nonzero mean and deviation."""
    numbers = torch.rand(len(like), generator=torch.Generator().manual_seed(0)) - 0.5
    return (numbers + numbers.sign() / 2).to(like)


def _gradients(loss: PolicyLoss, inputs: LossInputs, parts: list[slice]) -> Tensor:
    """Gradients with respect to logp and entropy, fp32 [2, R]."""
    found = []
    with torch.enable_grad():
        for rows in parts:
            values = [one.detach()[rows].clone().requires_grad_() for one in (inputs.logp, inputs.entropy)]
            gradients = torch.autograd.grad(loss(inputs.at(rows, *values)).loss, values, allow_unused=True)
            found.append(torch.stack([torch.zeros_like(v) if g is None else g for v, g in zip(values, gradients, strict=True)]))
    return torch.cat(found, dim=1)
