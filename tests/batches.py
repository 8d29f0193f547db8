"""A step's groups, and the unsplit batch made of them."""

from __future__ import annotations

import torch

from etr_megatron.batching import build_batch
from etr_megatron.config import load_config, resolve
from etr_megatron.metrics import step_metrics
from etr_megatron.objective import PASS_RATE_BINS
from etr_megatron.policy import PolicyBatch, TokenLogprobs, Update
from etr_megatron.types import Group, Problem, Sample

LENGTHS = [[3, 1], [2, 5, 4], [6, 2], [1, 1, 1, 7]]
FLAT_LENGTHS = [n for lengths in LENGTHS for n in lengths]
REWARDS = [[1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]


def config(*overrides: str):
    return resolve(load_config(None, ["rollout.prompts_per_step=4", "train.minibatches=2", *overrides]), 1, cuda=False)


def logprobs(value: float = -1.0, seed: int | None = None) -> TokenLogprobs:
    """Log-probs of every response token of `groups()`: `value`, or random near it."""
    logp = torch.full((sum(FLAT_LENGTHS),), value)
    if seed is not None:
        logp += 0.4 * torch.randn(len(logp), generator=torch.Generator().manual_seed(seed))
    return TokenLogprobs(logp.split(FLAT_LENGTHS), torch.ones_like(logp).split(FLAT_LENGTHS))


def batch_of(
    *overrides: str,
    step: int = 1,
    old: TokenLogprobs | None = None,
    reference: TokenLogprobs | None = None,
    reward_range: tuple[float, float] = (0.0, 1.0),
) -> PolicyBatch:
    return build_batch(groups(reward_range), config(*overrides), step, old=old or logprobs(), reference=reference)


def groups(reward_range: tuple[float, float] = (0.0, 1.0)) -> list[Group]:
    """Groups whose wrong and right answers have the range's lower and upper reward."""
    made = []
    for number, (lengths, rewards) in enumerate(zip(LENGTHS, REWARDS, strict=True)):
        samples = [
            Sample(i, list(range(n)), [-1.0] * n, "stop" if i else "length", 7, reward=reward_range[int(r)], reward_status="ok")
            for i, (n, r) in enumerate(zip(lengths, rewards, strict=True))
        ]
        made.append(Group(f"p{number}@3", Problem(f"p{number}", "", "", [1, 2]), samples))
    return made


def with_old(gap: float) -> PolicyBatch:
    return batch_of(old=logprobs(-1.0 + gap))


def update(tokens: float, *, loss: float = 1.0, grad_norm: float = 2.0, lr: float = 1e-3, **sums: float) -> Update:
    names = ("ratio", "ratio_squared", "clip_upper", "clip_lower", "clip_radius", "kl", "entropy", "gap", "mismatch")
    every = {"tokens": tokens, **{name: sums.pop(name, 0.0) for name in names}}
    by_bin = {f"{name}_{place}": sums.pop(f"{name}_{place}", 0.0) for name in every for place in PASS_RATE_BINS}
    return Update(loss, {**every, **by_bin, **sums}, grad_norm, lr)


def metrics_row(batch: PolicyBatch, *overrides: str, updates: list[Update] | None = None) -> dict:
    updates = updates or [update(33.0, ratio=33.0, ratio_squared=33.0)]
    return step_metrics(3, groups(), batch, updates, config(*overrides))
