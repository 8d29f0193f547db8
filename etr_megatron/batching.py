"""From rewarded groups to what the policy trains on: everything that looks at a whole group happens here, before any split."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from etr_megatron.config import Config
from etr_megatron.objective import ElasticBounds, control_radii, group_statistics, token_weights
from etr_megatron.policy import PolicyBatch
from etr_megatron.types import Group


def build_batch(groups: Sequence[Group], config: Config, step: int) -> PolicyBatch:
    """All samples of a step with their advantages and clip ranges; aggregation weights are for the step as one batch.

    The groups must be rewarded. step: the rollout step, which seeds the `shuffled` control.
    Raises ValueError for a reward outside of the declared range.
    """
    pairs = [(group, sample) for group in groups for sample in group.samples]
    statistics = group_statistics(
        [sample.reward for _, sample in pairs],
        [group.id for group, _ in pairs],
        reward_range=(config.reward.range_min, config.reward.range_max),
        delta=config.objective.delta,
    )
    low, high = _bounds(config)(statistics.advantage, statistics.variance)
    lengths = [len(sample.response_ids) for _, sample in pairs]
    low, high = control_radii(
        low,
        high,
        how=config.objective.control,
        advantage=statistics.advantage,
        tokens=lengths,
        seed=config.run.seed * 1_000_003 + step,
    )
    return PolicyBatch(
        names=tuple(f"{group.id}/{sample.index}" for group, sample in pairs),
        sequences=tuple((group.problem.prompt_ids, sample.response_ids) for group, sample in pairs),
        advantage=statistics.advantage.float(),
        clip_low=low.float(),
        clip_high=high.float(),
        weight=_weights(lengths, config),
        rollout_logp=tuple(torch.tensor(sample.rollout_logprobs, dtype=torch.float32) for _, sample in pairs),
    )


def minibatches(batch: PolicyBatch, groups: Sequence[Group], config: Config) -> list[PolicyBatch]:
    """The step's batch as `train.minibatches` batches of whole groups, each with its own denominator."""
    ends = torch.tensor([len(group.samples) for group in groups]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    per_update = len(groups) // config.train.minibatches
    parts = []
    for first in range(0, len(groups), per_update):
        numbers = range(starts[first], ends[min(first + per_update, len(groups)) - 1])
        lengths = [len(batch.sequences[i][1]) for i in numbers]
        parts.append(batch.select(numbers, _weights(lengths, config)))
    return parts


def _bounds(config: Config) -> ElasticBounds:
    fields = ("micro", "macro", "alpha", "gamma", "eps_low", "eps_high", "eps_min", "eps_max")
    return ElasticBounds(**{name: getattr(config.objective, name) for name in fields})


def _weights(lengths: Sequence[int], config: Config) -> torch.Tensor:
    objective = config.objective
    return torch.tensor(token_weights(lengths, objective.aggregation, objective.constant_length), dtype=torch.float32)
