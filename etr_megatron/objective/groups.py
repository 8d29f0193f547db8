"""Group statistics, the basis of GRPO's advantage and ETR's elastic bounds.

For group g with rewards R_i in a declared range [r_min, r_max]:

    mu_g = mean(R)    sigma_g = population std(R)    v_g = 4 sigma_g^2 / (r_max - r_min)^2  in [0, 1]
    A_i  = (R_i - mu_g) / (sigma_g + delta)

For 0/1 rewards v_g = 4 p (1 - p), where p is the pass rate. Statistics are taken over whole groups, by group id, before any
filtering or splitting. Only samples whose reward does not depend on the policy (see `counted`) are excluded. Groups may differ
in size; each is normalized separately.

Variants: no division by the deviation (Dr. GRPO, 2503.20783), and the mean of the group's other responses as the baseline
(leave-one-out, RLOO, 2402.14740): R_i - mean_{j != i}(R_j) = (R_i - mu_g) G / (G - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of each sample's group; all tensors float64 [N], in sample order.

    mean, std: statistics of the rewards that are trained on. variance: v_g of the verifier's rewards, normalized by the
    declared range. pass_rate: mean of the verifier's rewards as a fraction of the declared range. advantage: A_i; exactly 0 in
    a group whose rewards are all equal, including groups of one, and for samples that do not count.
    """

    mean: Tensor
    std: Tensor
    variance: Tensor
    pass_rate: Tensor
    advantage: Tensor


def _per_group(values: Tensor, index: Tensor, counts: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std over each sample's group, of the samples that count; std is exactly 0 if their values are equal.

    values: float64 [N]. index: [N], the sample's group. counts: bool [N]. size: float64 [groups], how many count, at least 1.
    """
    zeros, of_group, counted = torch.zeros(len(size), dtype=torch.float64), index[counts], values[counts]
    mean = zeros.index_add(0, of_group, counted) / size
    std = (zeros.index_add(0, of_group, (counted - mean[of_group]) ** 2) / size).sqrt()
    # If all rewards are equal, rounding of the mean leaves 1e-17, which dividing by delta would turn into a visible advantage.
    low = torch.full_like(zeros, torch.inf).scatter_reduce(0, of_group, counted, "amin")
    high = torch.full_like(zeros, -torch.inf).scatter_reduce(0, of_group, counted, "amax")
    std = torch.where(low == high, 0.0, std)
    return mean[index], std[index]


def group_statistics(
    rewards: Sequence[float],
    group_ids: Sequence[str],
    *,
    reward_range: tuple[float, float] = (0.0, 1.0),
    delta: float = 1e-6,
    verifier_rewards: Sequence[float] | None = None,
    counted: Sequence[bool] | None = None,
    baseline: str = "group_mean",
    normalize: bool = True,
) -> GroupStatistics:
    """Statistics of N samples that belong to groups.

    rewards: [N], the rewards to train on (shaping included). group_ids: [N]; samples of a group need not be adjacent.
    verifier_rewards: [N], the verifier's rewards in `reward_range`, if they differ from `rewards`; v_g is computed from them.
    counted: [N], whether a sample enters its group's statistics; if not, its reward does not affect other samples. Default:
    all. baseline: `group_mean` or `leave_one_out`. normalize: whether the advantage is divided by the deviation plus `delta`.
    Raises ValueError for mismatched lengths, a non-finite reward (naming the sample), a verifier reward outside its range
    and an unknown baseline.
    """
    verifier = rewards if verifier_rewards is None else verifier_rewards
    if not len(rewards) == len(group_ids) == len(verifier):
        raise ValueError(
            f"{len(rewards)} rewards, {len(group_ids)} group ids and {len(verifier)} verifier rewards must be equally many"
        )
    counts = torch.tensor([True] * len(rewards) if counted is None else list(counted), dtype=torch.bool)
    if len(counts) != len(rewards):
        raise ValueError(f"counted has {len(counts)} values for {len(rewards)} rewards")
    trained = torch.tensor(list(rewards), dtype=torch.float64)
    verified = torch.tensor(list(verifier), dtype=torch.float64)
    low, high = reward_range
    for name, values in (("reward", trained), ("verifier reward", verified)):
        if not bool(torch.isfinite(values).all()):
            at = int((~torch.isfinite(values)).nonzero()[0])
            raise ValueError(f"{name} of sample {at} in group {group_ids[at]!r} is {values[at].item()}")
    outside = (verified < low) | (verified > high)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"reward {verified[at].item()} of sample {at} in group {group_ids[at]!r} is outside the declared range [{low}, "
            f"{high}]; set reward.range_min and reward.range_max to include it"
        )
    order: dict[str, int] = {}
    index = torch.tensor([order.setdefault(name, len(order)) for name in group_ids], dtype=torch.long)
    size = torch.bincount(index[counts], minlength=len(order)).clamp(min=1).double()
    mean, std = _per_group(trained, index, counts, size)
    verified_mean, verified_std = _per_group(verified, index, counts, size)
    centred = (trained - mean).where(counts, 0.0)
    if baseline == "leave_one_out":
        centred = centred * (size / (size - 1).clamp(min=1))[index]
    elif baseline != "group_mean":
        raise ValueError(f"objective.baseline is {baseline!r}; known: group_mean, leave_one_out")
    advantage = torch.where(std > 0, centred / (std + delta) if normalize else centred, 0.0)
    variance = 4 * verified_std**2 / (high - low) ** 2
    return GroupStatistics(mean, std, variance, (verified_mean - low) / (high - low), advantage)
