"""A rank's part of the vocabulary.

Symbols in this package: R loss rows, H hidden size, V real vocabulary size, Vp its padded size, TP ranks. A shard holds Vp/TP
rows of the LM head, of which `real` are real vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """The part of the vocabulary that a rank holds.

    size: rows of the shard, equal on every rank (Vp / TP). vocab_size: V, without padding. group: the tensor-parallel
    group, None for a single rank.
    """

    size: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        """Number of shards of the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This rank's index in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def start(self) -> int:
        """First vocabulary id of this rank's shard."""
        return self.size * self.rank

    @property
    def real(self) -> int:
        """Number of rows that are real vocabulary, possibly 0; they come first, since padding ends the vocabulary."""
        return min(max(self.vocab_size - self.start, 0), self.size)

    def columns(self, targets: Tensor) -> Tensor:
        """int64 [R]: column of each target id in this shard, -1 if another shard holds it.

        Targets must be below `vocab_size`; this is not checked here, because that would synchronize with the GPU
        (`policy.packing.refuse_unknown_tokens` checks it on the CPU).
        """
        column = targets - self.start
        return torch.where((column >= 0) & (column < self.real), column, -1)
