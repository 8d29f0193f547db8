"""A step's numbers: one row of metrics.jsonl from its groups, its batch and its updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from etr_megatron.config import Config
from etr_megatron.policy import PolicyBatch, Update
from etr_megatron.types import Group


def logprob_gap(batch: PolicyBatch) -> torch.Tensor:
    """abs(engine - trainer) log-prob of every response token of the step, fp32 [tokens]."""
    return (torch.cat(batch.rollout_logp) - torch.cat(batch.old_logp)).abs()


def check_logprob_gap(batch: PolicyBatch, config: Config) -> None:
    """The gate of a process's first step, fresh or resumed: engine and trainer must agree on the rollouts' log-probs.

    Raises RuntimeError with the mean and the worst sample when the mean gap is over `rollout.max_logprob_gap`: training would
    go on, silently, from wrong importance ratios.
    """
    gap = logprob_gap(batch)
    if gap.mean() <= config.rollout.max_logprob_gap:
        return
    sizes = [len(response) for _, response in batch.sequences]
    worst = max(range(len(batch)), key=lambda i: gap.split(sizes)[i].max().item())
    raise RuntimeError(
        f"the engine's log-probs differ from the trainer's by {gap.mean():.2e} on average (worst {gap.max():.2e}, sample "
        f"{batch.names[worst]}), more than rollout.max_logprob_gap={config.rollout.max_logprob_gap:g}"
    )


def step_metrics(
    step: int, groups: Sequence[Group], batch: PolicyBatch, updates: Sequence[Update], config: Config
) -> dict[str, Any]:
    """The row without times and tokens/s. Shares of tokens are over all updates of the step."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = [sample.reward for sample in samples]
    total = {name: sum(update.sums[name] for update in updates) for name in updates[0].sums}
    tokens = total["tokens"]
    gap = logprob_gap(batch)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return {
        "step": step,
        "weight_version": samples[0].weight_version,
        "reward_mean": mean(rewards),
        "accuracy": mean([float(reward == config.reward.range_max) for reward in rewards]),
        "entropy": torch.cat(batch.old_entropy).double().mean().item(),
        "loss": mean([update.loss for update in updates]),
        "grad_norm": mean([update.grad_norm for update in updates]),
        "lr": updates[-1].lr,
        "ratio_mean": total["ratio"] / tokens,
        "clip_frac_upper": total["clip_upper"] / tokens,
        "clip_frac_lower": total["clip_lower"] / tokens,
        "clip_radius_mean": total["clip_radius"] / tokens,
        "kl": total["kl"] / tokens,
        "logprob_gap_mean": gap.mean().item(),
        "logprob_gap_max": gap.max().item(),
        "zero_variance_groups": sum(len({sample.reward for sample in group.samples}) == 1 for group in groups),
        "truncated": sum(sample.finish_reason == "length" for sample in samples),
        "reward_timeouts": sum(sample.reward_status == "timeout" for sample in samples),
        "reward_errors": sum(sample.reward_status == "error" for sample in samples),
        "response_tokens_mean": mean([len(sample.response_ids) for sample in samples]),
    }
