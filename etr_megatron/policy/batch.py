"""What an optimizer step trains on: samples with everything that was decided about them before any splitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyBatch:
    """N samples; the same on every rank.

    names: how an error calls a sample. sequences: (prompt ids, response ids) of each.
    advantage, clip_low, clip_high, weight: float32 [N]; `weight` is the aggregation weight of each of a sample's tokens, its
    denominator taken over this whole batch. rollout_logp, old_logp, old_entropy, ref_logp: per
    sample float32 [response tokens].
    """

    names: tuple[str, ...]
    sequences: tuple[tuple[Sequence[int], Sequence[int]], ...]
    advantage: Tensor
    clip_low: Tensor
    clip_high: Tensor
    weight: Tensor
    rollout_logp: tuple[Tensor, ...]
    old_logp: tuple[Tensor, ...] | None = None
    old_entropy: tuple[Tensor, ...] | None = None
    ref_logp: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def select(self, numbers: Sequence[int], weight: Tensor) -> PolicyBatch:
        """The samples `numbers` as a batch of its own; `weight` [len(numbers)] has that batch's denominator."""
        at = torch.tensor(list(numbers), dtype=torch.long)

        def pick(values: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            return None if values is None else tuple(values[i] for i in numbers)

        return replace(
            self,
            names=tuple(self.names[i] for i in numbers),
            sequences=tuple(self.sequences[i] for i in numbers),
            advantage=self.advantage[at],
            clip_low=self.clip_low[at],
            clip_high=self.clip_high[at],
            weight=weight,
            rollout_logp=pick(self.rollout_logp),
            old_logp=pick(self.old_logp),
            old_entropy=pick(self.old_entropy),
            ref_logp=pick(self.ref_logp),
        )
