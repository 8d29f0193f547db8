"""A step's metrics: one row of metrics.jsonl from its groups, batch and updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from etr_megatron import platform
from etr_megatron.batching import is_trained
from etr_megatron.config import Config, resolved, sets_by_name
from etr_megatron.data import set_of
from etr_megatron.flops import bf16_peak, sequence_flops
from etr_megatron.objective import PASS_RATE_BINS, kl_estimate
from etr_megatron.observe.metrics import REWARD_PREFIX, TRAIN_SET_PREFIX
from etr_megatron.policy import Policy, PolicyBatch, Update
from etr_megatron.types import Group, Sample


def logprob_gap(batch: PolicyBatch) -> torch.Tensor:
    """abs(engine - trainer) of the log-probs of all response tokens of the step that the model generated, fp32 [tokens]."""
    return (torch.cat(batch.rollout_logp) - torch.cat(batch.old_logp)).abs()


def generated_by_version(groups: Sequence[Group], version: int) -> torch.Tensor:
    """For each token of `logprob_gap`, whether it was sampled from weight version `version`: bool [tokens]."""
    samples = (sample for group in groups for sample in group.samples)
    return torch.tensor([one == version for sample in samples for one in sample.select_generated(sample.token_versions())])


def check_logprob_gap(batch: PolicyBatch, config: Config, comparable: torch.Tensor | None = None) -> bool:
    """Check in the first step of a process, fresh or resumed, that engine and trainer agree on the rollouts' log-probs.

    comparable: bool [tokens], true for tokens drawn from the trainer's current weights; None means all. Returns whether there
    were any. Raises RuntimeError with the mean and the worst sample if the mean gap of these tokens exceeds
    `rollout.max_logprob_gap`: training would silently use wrong importance ratios.
    """
    gap = logprob_gap(batch)
    comparable = torch.ones_like(gap, dtype=torch.bool) if comparable is None else comparable
    if not bool(comparable.any()):
        return False
    mean, limit = gap[comparable].mean(), resolved(config.rollout.max_logprob_gap)
    if mean <= limit:
        return True
    gap = gap.where(comparable, 0.0)
    parts = gap.split([len(old) for old in batch.old_logp])
    worst = torch.stack([part.max() if len(part) else gap.new_zeros(()) for part in parts]).argmax()  # a NaN is the largest
    raise RuntimeError(
        f"the engine's log-probs differ from the trainer's by {mean:.2e} on average (worst {gap.max():.2e}, sample "
        f"{batch.names[worst]}), more than rollout.max_logprob_gap={limit:g}"
    )


def rollout_metrics(step: int, groups: Sequence[Group], config: Config) -> dict[str, Any]:
    """The metrics of a step that need only its groups."""
    samples = [sample for group in groups for sample in group.samples]
    return {
        "step": step,
        "weight_version": max(sample.weight_version for sample in samples),
        **_groups_metrics(groups, config),
        "reward_timeouts": sum(sample.reward_status == "timeout" for sample in samples),
        "reward_errors": sum(sample.reward_status == "error" for sample in samples),
        **_failed_calls(samples, config),
        **_by_set(groups, config),
    }


def _failed_calls(samples: Sequence[Sample], config: Config) -> dict[str, int]:
    """Responses that a failed call of the environment's function ended; empty without an environment."""
    if config.environment.function is None:
        return {}
    found = [sample.environment_status for sample in samples]
    return {"environment_errors": found.count("error"), "environment_timeouts": found.count("timeout")}


def _groups_metrics(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """Rewards and lengths of at least one group."""
    samples = [sample for group in groups for sample in group.samples]
    return {
        "zero_variance_groups": sum(group.has_zero_variance for group in groups),
        "truncated": sum(sample.finish_reason == "length" for sample in samples),
        **response_metrics(samples, config),
    }


def response_metrics(samples: Sequence[Sample], config: Config) -> dict[str, float]:
    """Means over graded responses (at least one), for training or evaluation. `reward/<name>` is the mean of a further number
    that the user's reward function returns, over the samples that have it. Turns and reply tokens: only with an environment."""
    turns: dict[str, float] = {}
    if config.environment.function is not None:
        turns["turns_mean"] = _mean([sample.turns for sample in samples])
        turns["reply_tokens_mean"] = _mean([len(sample.response_ids) - sample.num_generated for sample in samples])
    parts: dict[str, list[float]] = {}
    for sample in samples:
        for name, part in sample.reward_parts.items():
            parts.setdefault(REWARD_PREFIX + name, []).append(part)
    return {
        "accuracy": _mean([float(sample.reward == config.reward.range_max) for sample in samples]),
        "reward_mean": _mean([sample.known_reward() for sample in samples]),
        "response_tokens_mean": _mean([len(sample.response_ids) for sample in samples]),
        **turns,
        **{name: _mean(values) for name, values in parts.items()},
    }


def _by_set(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """Metrics of each named training set's groups."""
    found: dict[str, float] = {}
    for name in filter(None, sets_by_name(config.data.train)):
        own = [group for group in groups if set_of(group.problem.id) == name]
        values = {"groups": len(own), **(_groups_metrics(own, config) if own else {})}
        found |= {f"{TRAIN_SET_PREFIX}{name}/{key}": value for key, value in values.items()}
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def step_metrics(
    step: int, groups: Sequence[Group], batch: PolicyBatch, updates: Sequence[Update], config: Config
) -> dict[str, Any]:
    """The step's row without times and tokens/s. Fractions of tokens are taken over all updates of the step."""
    total = {name: sum(update.sums[name] for update in updates) for name in updates[0].sums}
    tokens = total["tokens"]
    return {
        **rollout_metrics(step, groups, config),
        **_before_updates(batch, updates[0], config),
        "loss": _mean([update.loss for update in updates]),
        "grad_norm": _mean([update.grad_norm for update in updates]),
        "lr": updates[-1].lr,
        "ratio_mean": total["ratio"] / tokens,
        "effective_sample_size": total["ratio"] ** 2 / (tokens * total["ratio_squared"]),
        "clip_frac_upper": total["clip_upper"] / tokens,
        "clip_frac_lower": total["clip_lower"] / tokens,
        "clip_radius_mean": total["clip_radius"] / tokens,
        **_radius_quantiles(batch, torch.arange(len(batch))),
        "kl": total["kl"] / tokens,
        **_correction(batch, config),
        **_replayed(batch),
        **_shaped_reward(groups, batch, config),
        **{name: _mean([update.balance[name] for update in updates]) for name in updates[0].balance},
        **{name: max(update.memory[name] for update in updates) for name in updates[0].memory},
        **_by_pass_rate(batch, total),
        **{
            name: value / tokens
            for name, value in total.items()
            if name.startswith("loss/") and not name.endswith(PASS_RATE_BINS)
        },
    }


def training_speed(policy: Policy, groups: Sequence[Group], config: Config, seconds: float) -> dict[str, float]:
    """TFLOP/s per rank over the `seconds` spent on a step's log-probs and updates, and the MFU if the device's bf16 peak is
    known; empty if nothing was trained.

    Counts model FLOPs as Megatron does, without recomputation: one forward pass for the old log-probs unless they are the
    engine's, one for a reference model's, and the equivalent of three (forward and backward) in every epoch.
    """
    if not seconds:
        return {}
    logprobs = (config.objective.old_logp == "trainer") + policy.has_reference
    step = 0.0
    for group in groups:
        for sample in group.samples:
            passes = logprobs + 3 * config.train.epochs * is_trained(sample, config)
            tokens = len(group.problem.prompt_ids) + len(sample.response_ids)
            step += passes * sequence_flops(policy.arch, tokens, sample.num_generated)
    rate = step / seconds / policy.layout.world
    peak = bf16_peak(torch.cuda.get_device_name()) if platform.uses_cuda() else None
    return {"tflops_per_gpu": rate / 1e12} | ({} if peak is None else {"mfu": rate / peak})


def _replayed(batch: PolicyBatch) -> dict[str, float]:
    """Of the positions that predict a token generated by the model, the fraction for which the engine reported experts."""
    if batch.routing is None:
        return {}
    known = 0
    for length, one in zip(batch.routing.lengths, batch.sequences, strict=True):
        predicted = max(length - len(one.prompt) + 1, 0)
        known += one._replace(response=one.response[:predicted], loss_mask=one.loss_mask[:predicted]).rows
    return {"routing_replayed": known / sum(one.rows for one in batch.sequences)}


def _before_updates(batch: PolicyBatch, first: Update, config: Config) -> dict[str, float]:
    """Entropy, and gap and KL between engine and trainer, under the weights before the updates. If the trainer did not compute
    old log-probs, they are those of the first update's tokens, and the largest gap is unknown."""
    if batch.old_entropy is None:
        tokens = first.sums["tokens"]
        named = {"entropy": "entropy", "logprob_gap_mean": "gap", "mismatch_kl": "mismatch"}
        return {key: first.sums[name] / tokens for key, name in named.items()} | {"logprob_gap_max": math.nan}
    gap = logprob_gap(batch)
    rollout, old = torch.cat(batch.rollout_logp).double(), torch.cat(batch.old_logp).double()
    return {
        "entropy": torch.cat(batch.old_entropy).double().mean().item(),
        "logprob_gap_mean": gap.mean().item(),
        "logprob_gap_max": gap.max().item(),
        "mismatch_kl": kl_estimate(rollout, old, "k3", config.objective.log_ratio_bound).mean().item(),
    }


def _correction(batch: PolicyBatch, config: Config) -> dict[str, float]:
    """Statistics of the off-policy correction."""
    objective = config.objective
    if batch.correction is None:
        return {"correction_mean": 1.0, "correction_frac": 0.0}
    weight = torch.cat(batch.correction)
    # An unmodified weight is never 0, and equals the cap only if it was clipped to it.
    limited = weight == (0.0 if objective.correction == "mask" else objective.correction_cap)
    return {"correction_mean": weight.double().mean().item(), "correction_frac": limited.double().mean().item()}


def _shaped_reward(groups: Sequence[Group], batch: PolicyBatch, config: Config) -> dict[str, float]:
    """Mean of the shaped rewards over the samples that count in their groups, if they differ from the verifier's."""
    kl_in_reward = config.objective.kl_in == "reward" and config.objective.kl_coef > 0
    if not (config.reward.overlong_buffer or kl_in_reward):
        return {}
    counted = torch.tensor([not sample.call_failed for group in groups for sample in group.samples])
    # `group_mean` of a sample is the mean over the counted samples of its group, so its mean over these is the mean reward.
    return {"reward_shaped_mean": batch.group_mean[counted].double().mean().item()} if counted.any() else {}


def _by_pass_rate(batch: PolicyBatch, total: dict[str, float]) -> dict[str, float]:
    """Clip fractions and radii by the group's pass rate; only bins that have tokens."""
    found: dict[str, float] = {}
    for place, name in enumerate(PASS_RATE_BINS):
        tokens = total[f"tokens_{name}"]
        if not tokens:
            continue
        found[f"clip_frac_upper_{name}"] = total[f"clip_upper_{name}"] / tokens
        found[f"clip_frac_lower_{name}"] = total[f"clip_lower_{name}"] / tokens
        found[f"clip_radius_mean_{name}"] = total[f"clip_radius_{name}"] / tokens
        quantiles = _radius_quantiles(batch, (batch.pass_rate_bin == place).nonzero()[:, 0])
        found |= {f"{key}_{name}": value for key, value in quantiles.items()}
    return found


def _radius_quantiles(batch: PolicyBatch, numbers: torch.Tensor) -> dict[str, float]:
    """10th and 90th percentiles of the clip radius over the tokens of those samples in `numbers` that the loss covers. A
    percentile is the smallest radius that this share of tokens does not exceed."""
    covered = numbers[batch.weight[numbers] > 0]
    numbers = covered if len(covered) else numbers
    radius = ((batch.clip_low + batch.clip_high) / 2)[numbers].double()
    tokens = torch.tensor([one.rows for one in batch.sequences], dtype=torch.float64)[numbers]
    order = radius.argsort()
    share = tokens[order].cumsum(0) / tokens.sum()
    return {f"clip_radius_p{percent}": radius[order][(share < percent / 100).sum()].item() for percent in (10, 90)}
