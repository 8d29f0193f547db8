"""Off-policy correction for the gap between the inference engine's log-probs and the trainer's old log-probs.

Samples come from the engine's pi_rollout, updates start from the trainer's pi_old. Both are the same policy, computed by
different kernels. w = pi_old / pi_rollout makes the policy term unbiased again, and is bounded by one of

    truncate   min(w, cap)                               truncated importance sampling (TIS; Ionides 2008, IMPALA 1802.01561)
    mask       w where floor <= w <= cap, else 0         masked importance sampling (MIS)

A masked token stays in the denominator and in the KL and entropy terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rollout_correction(
    old_logp: Sequence[Tensor],
    rollout_logp: Sequence[Tensor],
    *,
    how: str,
    level: str,
    cap: float,
    floor: float,
    bound: float = 20.0,
) -> tuple[Tensor, ...] | None:
    """Weight of every token of N samples, float32 [response tokens] each; None if `how` is `none`.

    old_logp, rollout_logp: of WHOLE responses, [response tokens] each, without the tokens of an environment's replies. level:
    `token` gives each token its own w; `sequence` gives every token the product of w over its response. bound: of |log w|
    before exp(). Raises ValueError for other names.
    """
    if how == "none":
        return None
    if how not in ("truncate", "mask"):
        raise ValueError(f"objective.correction is {how!r}; known: none, truncate, mask")
    if level not in ("token", "sequence"):
        raise ValueError(f"objective.correction_level is {level!r}; known: token, sequence")
    weights = []
    for old, rollout in zip(old_logp, rollout_logp, strict=True):
        log_ratio = old.double() - rollout.double()
        if level == "sequence":
            log_ratio = log_ratio.sum().expand_as(log_ratio)
        ratio = log_ratio.clamp(-bound, bound).exp()
        kept = ratio.clamp(max=cap) if how == "truncate" else torch.where((ratio >= floor) & (ratio <= cap), ratio, 0.0)
        weights.append(kept.float())
    return tuple(weights)
