"""What an optimizer step trains on: samples with everything that was decided about them before any splitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from etr_megatron.policy.routing import StepRouting


@dataclass(frozen=True)
class PolicyBatch:
    """N samples; the same on every rank.

    names: how an error calls a sample. sequences: (prompt ids, response ids) of each.
    advantage, clip_low, clip_high, weight, group_mean, group_std, variance: float32 [N]; `weight` is the aggregation weight of
    each of a sample's tokens, its denominator taken over this whole batch; the group's statistics are those of `LossInputs`.
    pass_rate_bin: int64 [N], see `objective.pass_rate_bins`.
    rollout_logp, old_logp, old_entropy, ref_logp, correction: per sample float32 [response tokens]; old_entropy is for the
    metrics, ref_logp is there with a KL term, correction with an off-policy correction.
    routing: with routing replay, which experts the engine chose for the first tokens of prompt and response of each sample; for
    the others the policy does.
    """

    names: tuple[str, ...]
    sequences: tuple[tuple[Sequence[int], Sequence[int]], ...]
    advantage: Tensor
    clip_low: Tensor
    clip_high: Tensor
    weight: Tensor
    group_mean: Tensor
    group_std: Tensor
    variance: Tensor
    pass_rate_bin: Tensor
    rollout_logp: tuple[Tensor, ...]
    old_logp: tuple[Tensor, ...]
    old_entropy: tuple[Tensor, ...] | None = None
    ref_logp: tuple[Tensor, ...] | None = None
    correction: tuple[Tensor, ...] | None = None
    routing: StepRouting | None = None

    def __len__(self) -> int:
        return len(self.names)

    def select(self, numbers: Sequence[int], weight: Tensor) -> PolicyBatch:
        """The samples `numbers` as a batch of its own; `weight` [len(numbers)] has that batch's denominator."""
        at = torch.tensor(list(numbers), dtype=torch.long)

        def pick(values: Tensor | tuple[Any, ...] | StepRouting | None) -> Tensor | tuple[Any, ...] | StepRouting | None:
            if values is None or isinstance(values, Tensor):
                return None if values is None else values[at]
            return values.select(numbers) if isinstance(values, StepRouting) else tuple(values[i] for i in numbers)

        picked: dict[str, Any] = {name: pick(values) for name, values in vars(self).items()}
        return replace(self, **{**picked, "weight": weight})
