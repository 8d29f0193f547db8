"""A rank's part of the vocabulary.

Letters used in this room: R loss rows, H hidden size, V real vocabulary, Vp its padded size, TP ranks; a shard holds Vp/TP rows
of the LM head, of which `real` are real vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Which part of the vocabulary a rank holds.

    size: rows of the shard, the same on every rank (Vp / TP). vocab_size: V, without padding. group: the tensor-parallel
    group, None for one rank.
    """

    size: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        """Shards that the vocabulary is cut into."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This rank's number among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def start(self) -> int:
        """First vocabulary id of this rank's shard."""
        return self.size * self.rank

    @property
    def real(self) -> int:
        """Rows of the shard that are real vocabulary: a prefix of it, since padding is at the very end (possibly 0)."""
        return min(max(self.vocab_size - self.start, 0), self.size)

    def columns(self, targets: Tensor) -> Tensor:
        """int64 [R]: column of each target id in this shard, -1 where another shard holds it.

        Targets must be below `vocab_size`: another is nobody's, which is not looked for here, as a GPU would have to be waited
        for (`policy.packing.refuse_unknown_tokens` does, on the CPU).
        """
        column = targets - self.start
        return torch.where((column >= 0) & (column < self.real), column, -1)
