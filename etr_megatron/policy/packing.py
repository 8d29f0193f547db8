"""Which samples go together: a plan of microbatches, and a microbatch as packed tensors.

The plan is pure Python. Invariants (tested): every sample exactly once; the same number of microbatches on every data-parallel
rank; no microbatch over the token budget unless it is a single longer sample; the same plan for the same input.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def plan_microbatches(lengths: Sequence[int], *, dp: int, token_budget: int) -> list[list[list[int]]]:
    """Sample numbers by [data-parallel rank][microbatch], balanced by tokens.

    lengths: tokens (prompt and response) of each sample. A rank may get empty microbatches when there are few samples.
    Longest first into the emptiest bin, with as few microbatches as keep the budget.
    """
    count = max(1, -(-sum(lengths) // (token_budget * dp)))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        heap = [(0, bin_) for bin_ in range(dp * count)]
        bins: list[list[int]] = [[] for _ in heap]
        for sample in order:
            filled, bin_ = heapq.heappop(heap)
            bins[bin_].append(sample)
            heapq.heappush(heap, (filled + lengths[sample], bin_))
        if all(len(one) <= 1 or sum(lengths[i] for i in one) <= token_budget for one in bins):
            break
        count += 1
    return [[sorted(bins[micro * dp + rank]) for micro in range(count)] for rank in range(dp)]


@dataclass(frozen=True)
class Microbatch:
    """Packed sequences (THD) of T tokens with R loss rows.

    tokens, positions: int64 [1, T]. offsets: int32 [sequences + 1]. longest: tokens of the longest sequence.
    rows: int64 [R], flat positions whose hidden state predicts a response token. targets: int64 [R], those tokens.
    row_sample: int64 [R], number in the optimizer step of the sample that a row belongs to.
    samples: numbers of the samples, in the order of their rows.
    """

    tokens: Tensor
    positions: Tensor
    offsets: Tensor
    longest: int
    rows: Tensor
    targets: Tensor
    row_sample: Tensor
    samples: tuple[int, ...]


def pack(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], numbers: Sequence[int], *, multiple: int, device: torch.device
) -> Microbatch:
    """Pack (prompt ids, response ids) of the samples `numbers` (indices into `sequences`) into one microbatch.

    multiple: the token count is brought to a multiple of it (sequence parallelism needs TP) by a dummy sequence of its own,
    which has no loss rows; so is an empty microbatch. Raises ValueError for an empty prompt: nothing predicts its first token.
    """
    tokens: list[int] = []
    positions: list[int] = []
    offsets = [0]
    rows: list[int] = []
    targets: list[int] = []
    row_sample: list[int] = []
    for number in numbers:
        prompt, response = sequences[number]
        if not prompt:
            raise ValueError(f"sample {number} has an empty prompt")
        first = len(tokens) + len(prompt) - 1
        rows.extend(range(first, first + len(response)))
        targets.extend(response)
        row_sample.extend([number] * len(response))
        tokens.extend(prompt)
        tokens.extend(response)
        positions.extend(range(len(prompt) + len(response)))
        offsets.append(len(tokens))
    missing = -len(tokens) % multiple or (0 if tokens else multiple)
    if missing:
        tokens.extend([0] * missing)
        positions.extend(range(missing))
        offsets.append(len(tokens))

    def integers(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Microbatch(
        tokens=integers(tokens)[None],
        positions=integers(positions)[None],
        offsets=integers(offsets, torch.int32),
        longest=max(end - begin for begin, end in itertools.pairwise(offsets)),
        rows=integers(rows),
        targets=integers(targets),
        row_sample=integers(row_sample),
        samples=tuple(numbers),
    )
