"""A microbatch as packed tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.policy.context import own_ranges, padded_length
from etr_megatron.types import AnySequence, TokenSequence, of_drawn


@dataclass(frozen=True)
class Microbatch:
    """A context-parallel rank's part of packed sequences (THD): T of the CP * T tokens, with R loss rows.

    tokens, positions: int64 [1, T]. cu_seqlens: int32 [sequences + 1], sequence offsets over the tokens of all CP ranks.
    max_seqlen: tokens of the longest sequence, over all CP ranks.
    rows: int64 [R], indices of the tokens whose hidden states predict response tokens that the model drew. targets: int64 [R],
    those tokens. row_sample: int64 [R], the index of each row's sample in the optimizer step. row_position: int64 [R], the
    position of the target among the tokens of that sample that the model drew. samples: indices of the samples, in the order of
    their rows.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor
    targets: Tensor
    row_sample: Tensor
    row_position: Tensor
    samples: tuple[int, ...]


def refuse_unknown_tokens(sequences: Sequence[AnySequence], vocab_size: int) -> None:
    """Raise UserError, naming the sample, for an id outside [0, vocab_size).

    With a padded vocabulary the embedding would accept it, but no shard of the head has it as a target: its log-prob would
    silently be minus the log-sum-exp.
    """
    for number, sequence in enumerate(sequences):
        for part, ids in zip(("prompt", "response"), sequence[:2], strict=True):
            found = np.asarray(ids)
            if len(found) and not 0 <= found.min() <= found.max() < vocab_size:
                unknown = next(one for one in ids if not 0 <= one < vocab_size)
                raise UserError(
                    f"the {part} of sample {number} has token {unknown}, outside the model's vocab_size of {vocab_size}; check "
                    "that the tokenizer and the rollout engine belong to the model"
                )


def pack(
    sequences: Sequence[AnySequence],
    numbers: Sequence[int],
    *,
    multiple: int,
    device: torch.device,
    cp: int = 1,
    cp_rank: int = 0,
) -> Microbatch:
    """Pack the tokens of the samples `numbers` (indices into `sequences`) into one microbatch.

    multiple: a dummy sequence without loss rows pads a context-parallel rank's token count to a multiple of it (sequence
    parallelism needs TP, FP8 a multiple of its blocks); it also fills an empty microbatch. With cp > 1 every sequence is padded
    at the end, where no real token sees it. Raises ValueError for an empty prompt, as nothing predicts its first response
    token, and for a loss mask of another length than the response.
    """
    packed = _Packed(cp, cp_rank)
    for number in numbers:
        prompt, response, mask = TokenSequence(*sequences[number])
        if not prompt:
            raise ValueError(f"sample {number} has an empty prompt")
        if mask and len(mask) != len(response):
            raise ValueError(f"sample {number} has a loss mask of {len(mask)} values for {len(response)} response tokens")
        packed.add([*prompt, *response], len(prompt), number, mask)
    whole = math.lcm(multiple * cp, padded_length(1, cp))
    missing = -packed.cu_seqlens[-1] % whole or (0 if packed.tokens else whole)
    if missing:
        packed.add([0] * missing, missing, -1)

    def integers(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Microbatch(
        tokens=integers(packed.tokens)[None],
        positions=integers(packed.positions)[None],
        cu_seqlens=integers(packed.cu_seqlens, torch.int32),
        max_seqlen=max(end - begin for begin, end in itertools.pairwise(packed.cu_seqlens)),
        rows=integers(packed.rows),
        targets=integers(packed.targets),
        row_sample=integers(packed.row_sample),
        row_position=integers(packed.row_position),
        samples=tuple(numbers),
    )


class _Packed:
    """The lists that make up a microbatch, while sequences are added."""

    def __init__(self, cp: int, cp_rank: int) -> None:
        self.cp, self.cp_rank = cp, cp_rank
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.cu_seqlens = [0]
        self.rows: list[int] = []
        self.targets: list[int] = []
        self.row_sample: list[int] = []
        self.row_position: list[int] = []

    def add(self, ids: list[int], prompt: int, sample: int, mask: Sequence[int] = ()) -> None:
        """Add a sequence whose first `prompt` tokens are not predicted; of the others, those with 1 in `mask`, or all."""
        length, first = len(ids), prompt - 1
        padded = padded_length(length, self.cp)
        for part in own_ranges(padded, self.cp, self.cp_rank):
            begin, end = max(part.start, first), min(part.stop, length - 1)
            at = len(self.tokens) - part.start
            rows = of_drawn(range(at + begin, at + end), mask[begin - first :])
            before = sum(mask[: begin - first]) if mask else begin - first
            self.rows.extend(rows)
            self.targets.extend(of_drawn(ids[begin + 1 : end + 1], mask[begin - first :]))
            self.row_sample.extend([sample] * len(rows))
            self.row_position.extend(range(before, before + len(rows)))
            self.tokens.extend(ids[part.start : part.stop])
            self.tokens.extend([0] * (part.stop - max(part.start, length)))
            self.positions.extend(part)
        self.cu_seqlens.append(self.cu_seqlens[-1] + padded)
