"""The batch of an optimizer step: samples with everything computed for them before any splitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from etr_megatron.policy.routing import StepRouting
from etr_megatron.types import TokenSequence


@dataclass(frozen=True)
class PolicyBatch:
    """N samples; identical on every rank.

    names: sample names for error messages. sequences: each sample's tokens; (prompt ids, response ids) pairs are converted.
    advantage, clip_low, clip_high, weight, group_mean, group_std, variance: float32 [N]; `weight` is the aggregation weight of
    each token of a sample, with this whole batch's denominator; for the group statistics see `LossInputs`.
    pass_rate_bin: int64 [N], see `objective.pass_rate_bins`.
    rollout_logp, old_logp, old_entropy, ref_logp, correction: per sample float32 [response tokens that the model generated];
    old_logp is the trainer's or, without old_entropy, the engine's. ref_logp is set with a KL term, correction with an
    off-policy correction.
    routing: with routing replay, the experts that the engine chose for the first tokens of each sample (prompt and response);
    the policy routes the other tokens itself.
    """

    names: tuple[str, ...]
    sequences: tuple[TokenSequence, ...]
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", tuple(TokenSequence(*one) for one in self.sequences))

    def __len__(self) -> int:
        return len(self.names)

    def relative_to_engine(self) -> PolicyBatch:
        """The same batch with the engine's log-probs as the old ones."""
        return replace(self, old_logp=self.rollout_logp, old_entropy=None)

    def select(self, numbers: Sequence[int], weight: Tensor) -> PolicyBatch:
        """A batch of the samples `numbers`; `weight` [len(numbers)] has the new batch's denominator."""
        at = torch.tensor(list(numbers), dtype=torch.long)

        def pick(values: Tensor | tuple[Any, ...] | StepRouting | None) -> Tensor | tuple[Any, ...] | StepRouting | None:
            if values is None or isinstance(values, Tensor):
                return None if values is None else values[at]
            return values.select(numbers) if isinstance(values, StepRouting) else tuple(values[i] for i in numbers)

        picked: dict[str, Any] = {name: pick(values) for name, values in vars(self).items()}
        return replace(self, **{**picked, "weight": weight})
