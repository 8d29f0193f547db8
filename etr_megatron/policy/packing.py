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
from etr_megatron.types import AnySequence, TokenSequence


@dataclass(frozen=True)
class Microbatch:
    """A context-parallel rank's part of packed sequences (THD): T of the CP * T tokens, with R loss rows.

    tokens, positions: int64 [1, T]. cu_seqlens: int32 [sequences + 1], sequence offsets over the tokens of all CP ranks.
    max_seqlen: tokens of the longest sequence, over all CP ranks.
    rows: int64 [R], indices of the tokens whose hidden states predict response tokens that the model generated. targets: int64
    [R], those tokens. row_sample: int64 [R], the index of each row's sample in the optimizer step. row_position: int64 [R], the
    position of the target among the tokens of that sample that the model generated. These two stay on the CPU, where the values
    are that they select. samples: indices of the samples, in the order of their rows.
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

    With a padded vocabulary the embedding would accept such an id. But no shard of the head has it as a target, so its log-prob
    would silently be minus the log-sum-exp.
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
        # Arrays, as a microbatch may have a million tokens, and the GPU waits for it.
        ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in (prompt, response)])
        drawn = np.asarray(mask, dtype=bool) if mask else np.ones(len(response), dtype=bool)
        packed.add(ids, len(prompt), number, drawn)
    whole = math.lcm(multiple * cp, padded_length(1, cp))
    missing = -packed.cu_seqlens[-1] % whole or (0 if packed.length else whole)
    if missing:
        packed.add(np.zeros(missing, dtype=np.int64), missing, -1, np.zeros(0, dtype=bool))

    def integers(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts))

    return Microbatch(
        tokens=integers(packed.tokens)[None].to(device),
        positions=integers(packed.positions)[None].to(device),
        cu_seqlens=torch.tensor(packed.cu_seqlens, dtype=torch.int32, device=device),
        max_seqlen=max(end - begin for begin, end in itertools.pairwise(packed.cu_seqlens)),
        rows=integers(packed.rows).to(device),
        targets=integers(packed.targets).to(device),
        row_sample=integers(packed.row_sample),
        row_position=integers(packed.row_position),
        samples=tuple(numbers),
    )


class _Packed:
    """The int64 arrays that make up a microbatch, while sequences are added. length: tokens so far, of this rank."""

    def __init__(self, cp: int, cp_rank: int) -> None:
        self.cp, self.cp_rank, self.length = cp, cp_rank, 0
        self.cu_seqlens = [0]
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.row_sample: list[np.ndarray] = []
        self.row_position: list[np.ndarray] = []

    def add(self, ids: np.ndarray, prompt: int, sample: int, mask: np.ndarray) -> None:
        """Add a sequence whose first `prompt` tokens are not predicted; of the others, those with True in `mask`.

        ids: int64 [L]. mask: bool [L - prompt].
        """
        first, padded = prompt - 1, padded_length(len(ids), self.cp)
        tokens = np.pad(ids, (0, padded - len(ids)))
        for part in own_ranges(padded, self.cp, self.cp_rank):
            begin, end = max(part.start, first), min(part.stop, len(ids) - 1)
            # Tokens that predict one that the model generated.
            drawn = begin + np.flatnonzero(mask[begin - first : max(end - first, 0)])
            self.rows.append(self.length - part.start + drawn)
            self.targets.append(ids[drawn + 1])
            self.row_sample.append(np.full(len(drawn), sample))
            self.row_position.append(np.count_nonzero(mask[: begin - first]) + np.arange(len(drawn)))
            self.tokens.append(tokens[part.start : part.stop])
            self.positions.append(np.arange(part.start, part.stop))
            self.length += len(part)
        self.cu_seqlens.append(self.cu_seqlens[-1] + padded)
