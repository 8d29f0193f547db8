"""Context parallelism: which tokens of a packed sequence each rank has.

A sequence is padded to a multiple of 2 CP and cut into 2 CP chunks; rank r has chunks r and 2 CP - 1 - r. Under a causal mask a
chunk's work grows with its index, so this balances the ranks. Transformer Engine uses the same split.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def padded_length(tokens: int, cp: int) -> int:
    """Length of a sequence with its padding."""
    unit = 2 * cp if cp > 1 else 1
    return -(-tokens // unit) * unit


def own_ranges(length: int, cp: int, rank: int) -> tuple[range, ...]:
    """A rank's positions, ascending, in a sequence of `length` tokens including padding."""
    if cp == 1:
        return (range(length),)
    chunk = length // (2 * cp)
    return tuple(range(number * chunk, (number + 1) * chunk) for number in (rank, 2 * cp - 1 - rank))


def own_positions(lengths: Sequence[int], cp: int, rank: int) -> Tensor:
    """int64 [T / CP]: the position within its sequence of each of a rank's tokens. lengths: padded sequence lengths."""
    ranges = [part for length in lengths for part in own_ranges(length, cp, rank)]
    return torch.cat([torch.arange(part.start, part.stop) for part in ranges])


def gathered_order(lengths: Sequence[int], cp: int) -> Tensor:
    """int64 [T]: the index of each token of the packed sequences in the concatenation of the ranks' tokens."""
    starts = torch.tensor([0, *itertools.accumulate(lengths)][:-1])
    own_starts = starts.repeat_interleave(torch.tensor(lengths) // cp)
    return torch.cat([own_starts + own_positions(lengths, cp, rank) for rank in range(cp)]).argsort()


def summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-reduced sum over the group, as a new tensor.

    A collective, with another in the backward pass: the gradient is summed over ranks, since each uses the sum.
    """
    return _Summed.apply(values, group)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduced(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grad, ctx.group), None


def _all_reduced(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
