"""Turn rewarded groups into policy batches. Everything that needs whole groups is computed here, before batches are split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from etr_megatron.config import Config, resolved
from etr_megatron.errors import UserError
from etr_megatron.objective import (
    ElasticBounds,
    control_radii,
    group_statistics,
    kl_penalty,
    overlong_punishment,
    pass_rate_bins,
    rollout_correction,
    token_weights,
)
from etr_megatron.policy import PolicyBatch, StepRouting, TokenLogprobs
from etr_megatron.types import Group, Sample, TokenSequence
from etr_megatron.weights import Experts


def sequences_of(groups: Sequence[Group]) -> tuple[TokenSequence, ...]:
    """The tokens of every sample of the step."""
    pairs = ((group.problem.prompt_ids, sample) for group in groups for sample in group.samples)
    return tuple(TokenSequence(prompt, sample.response_ids, sample.loss_mask) for prompt, sample in pairs)


def is_trained(sample: Sample, config: Config) -> bool:
    """Whether the loss covers the sample. Truncated samples are left out with `objective.mask_truncated`. Dialogues that a
    failed call ended are always left out, also from their group's statistics: they say nothing about the policy."""
    if sample.call_failed:
        return False
    return not (config.objective.mask_truncated and sample.finish_reason == "length")


def why_untrained(groups: list[Group]) -> str:
    """Why the loss leaves out all samples, as part of a sentence."""
    failed = [sample.call_failed for group in groups for sample in group.samples]
    reasons = [] if all(failed) else ["cut off (objective.mask_truncated)"]
    return " or ".join(reasons + ["ended by a failed call of environment.function"] * any(failed))


def routing_of(groups: Sequence[Group], experts: Experts, layers: int) -> tuple[torch.Tensor, ...]:
    """`StepRouting.chosen` from the samples that have routing. layers: number of layers with experts.

    Raises RuntimeError, naming the sample, if the engine's routing does not fit the model or the tokens, and UserError if the
    engine did not record its choice and reports zeros.
    """
    found = []
    for group in groups:
        for sample in group.samples:
            chosen = torch.from_numpy(np.frombuffer(sample.routing, dtype=np.uint8))  # shares the sample's memory
            tokens = len(group.problem.prompt_ids) + len(sample.response_ids)
            of_token = layers * experts.per_token
            highest = int(chosen.max()) if len(chosen) else 0  # not `chosen >= count`: a count of 256 would wrap to 0 in uint8
            if len(chosen) % of_token or len(chosen) > tokens * of_token or highest >= experts.count:
                raise RuntimeError(
                    f"the engine reports {len(chosen)} chosen experts up to {highest} for sample {group.id}/{sample.index}, "
                    f"whose {tokens} tokens have {of_token} each, of {experts.count}"
                )
            found.append(chosen.view(-1, layers, experts.per_token))
            if experts.per_token > 1 and bool((found[-1][..., 0] == found[-1][..., 1]).any()):
                raise UserError(
                    f"the engine reports the same expert twice for a token of sample {group.id}/{sample.index}, as SGLang does "
                    "when its expert kernel routes by itself (as on Blackwell): add --moe-runner-backend,triton to "
                    "sglang.arguments, or set train.routing_replay to false"
                )
    return tuple(found)


def build_batch(
    groups: Sequence[Group],
    config: Config,
    step: int,
    *,
    old: TokenLogprobs | None,
    reference: TokenLogprobs | None,
    routing: StepRouting | None = None,
) -> PolicyBatch:
    """All samples of a step with the inputs of the loss. The aggregation weights are those of the step as one batch.

    The groups must be rewarded. step: the rollout step, which seeds the `shuffled` control. old, reference: log-probs of the
    groups' sequences. old is the trainer's, or None for the engine's; reference is None unless the objective has a KL term.
    routing: see `PolicyBatch`. Raises ValueError for a reward outside the configured range.
    """
    objective = config.objective
    pairs = [(group, sample) for group in groups for sample in group.samples]
    trained = [is_trained(sample, config) for _, sample in pairs]
    lengths = [sample.num_generated for _, sample in pairs]
    rewards = [sample.known_reward() for _, sample in pairs]
    engine = (np.asarray(sample.select_generated(sample.rollout_logprobs)) for _, sample in pairs)
    rollout_logp = tuple(torch.tensor(logprobs, dtype=torch.float32) for logprobs in engine)
    old_logp = rollout_logp if old is None else old.logp
    statistics = group_statistics(
        _trained_rewards(rewards, [len(sample.response_ids) for _, sample in pairs], config, old_logp, reference),
        [group.id for group, _ in pairs],
        reward_range=(config.reward.range_min, config.reward.range_max),
        delta=objective.delta,
        verifier_rewards=rewards,
        counted=[not sample.call_failed for _, sample in pairs],
        baseline=resolved(objective.baseline),
        normalize=resolved(objective.normalize),
    )
    low, high = _bounds(config)(statistics.advantage, statistics.variance)
    low, high = control_radii(
        low,
        high,
        how=resolved(objective.control),
        advantage=statistics.advantage.where(torch.tensor(trained), 0.0),
        tokens=lengths,
        seed=config.run.seed * 1_000_003 + step,
    )
    return PolicyBatch(
        names=tuple(f"{group.id}/{sample.index}" for group, sample in pairs),
        sequences=sequences_of(groups),
        advantage=statistics.advantage.float(),
        clip_low=low.float(),
        clip_high=high.float(),
        weight=_weights(lengths, trained, config),
        group_mean=statistics.mean.float(),
        group_std=statistics.std.float(),
        variance=statistics.variance.float(),
        pass_rate_bin=pass_rate_bins(statistics.pass_rate, statistics.variance),
        rollout_logp=rollout_logp,
        old_logp=old_logp,
        old_entropy=None if old is None else old.entropy,
        ref_logp=None if reference is None else reference.logp,
        correction=_correction(old_logp, rollout_logp, config),
        routing=routing,
    )


def minibatches(batch: PolicyBatch, groups: Sequence[Group], config: Config) -> list[PolicyBatch]:
    """Split the step's batch into `train.minibatches` batches of whole groups. Each has its own denominator. Samples that the
    loss does not cover are left out."""
    trained = [is_trained(sample, config) for group in groups for sample in group.samples]
    ends = torch.tensor([len(group.samples) for group in groups]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    per_update = len(groups) // config.train.minibatches
    parts = []
    for first in range(0, len(groups), per_update):
        whole = range(starts[first], ends[first + per_update - 1])
        numbers = [i for i in whole if trained[i]] or list(whole)  # an update needs samples, even if all have weight 0
        lengths = [batch.sequences[i].rows for i in numbers]
        parts.append(batch.select(numbers, _weights(lengths, [trained[i] for i in numbers], config)))
    return parts


def _trained_rewards(
    rewards: Sequence[float],
    lengths: Sequence[int],
    config: Config,
    old_logp: tuple[torch.Tensor, ...],
    reference: TokenLogprobs | None,
) -> list[float]:
    """The verifier's rewards [N] after shaping: the overlong penalty, and the KL penalty if `kl_in` is "reward".

    lengths: tokens of the whole responses, which the overlong penalty limits. The KL covers only generated tokens.
    """
    objective, limit = config.objective, config.rollout.max_response_tokens
    buffer, factor = config.reward.overlong_buffer, config.reward.overlong_penalty
    trained = [
        reward + factor * overlong_punishment(length, max_length=limit, buffer=buffer)
        for reward, length in zip(rewards, lengths, strict=True)
    ]
    if objective.kl_in == "reward" and reference is not None:
        penalties = map(kl_penalty, old_logp, reference.logp)
        trained = [reward - objective.kl_coef * kl for reward, kl in zip(trained, penalties, strict=True)]
    return trained


def _correction(
    old_logp: tuple[torch.Tensor, ...], rollout_logp: tuple[torch.Tensor, ...], config: Config
) -> tuple[torch.Tensor, ...] | None:
    objective = config.objective
    return rollout_correction(
        old_logp,
        rollout_logp,
        how=objective.correction,
        level=objective.correction_level,
        cap=objective.correction_cap,
        floor=objective.correction_floor,
        bound=objective.log_ratio_bound,
    )


def _bounds(config: Config) -> ElasticBounds:
    fields = ("micro", "macro", "alpha", "gamma", "eps_low", "eps_high", "eps_min", "eps_max")
    return ElasticBounds(**{name: getattr(config.objective, name) for name in fields})


def _weights(lengths: Sequence[int], trained: Sequence[bool], config: Config) -> torch.Tensor:
    """Aggregation weights [N]. Samples that are not `trained` have weight 0 and do not count in the denominator. lengths:
    number of tokens of each sample that the loss covers."""
    objective = config.objective
    weight, covered = torch.zeros(len(lengths)), torch.tensor(trained)
    counted = [length for length, is_covered in zip(lengths, trained, strict=True) if is_covered]
    weight[covered] = torch.tensor(token_weights(counted, resolved(objective.aggregation), objective.constant_length))
    return weight
