"""The built-in policy losses; each returns `-J + kl_coef KL - entropy_coef H`.

In all of them w_t is the aggregation weight, which includes the denominator of the whole optimizer step, and c_t the off-policy
correction of the row, which multiplies only the policy term. r_t = exp(log pi - log pi_old), with the log bounded before exp().
"""

from __future__ import annotations

import torch
from torch import Tensor

from etr_megatron.objective.inputs import LossInputs, LossOutputs
from etr_megatron.objective.kl import kl_estimate
from etr_megatron.objective.registry import register_loss

MIN_CLIP_RADIUS = 1e-4
"""Smaller clip radii, in particular 0, are raised to this. With a radius of 0, rounding would decide at r = 1 whether a token
gets its full gradient, a part of it (a tie of minimum and maximum) or none; and rounding differs between layouts. A step's
first update, where r is 1 up to rounding, must be unclipped for any radius. GSPO's 3e-4 and 4e-4 are the smallest in use."""


def importance_ratio(logp: Tensor, old_logp: Tensor, bound: float) -> Tensor:
    """exp(logp - old_logp), of the shape of `logp`; the log is clamped to +-`bound`, beyond which the gradient is zero."""
    return (logp - old_logp).clamp(-bound, bound).exp()


def clip_bounds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds 1 - low and 1 + high of a ratio, with radii of at least `MIN_CLIP_RADIUS`."""
    return 1 - low.clamp(min=MIN_CLIP_RADIUS), 1 + high.clamp(min=MIN_CLIP_RADIUS)


def clip_ratio(ratio: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`ratio` clipped to the `clip_bounds` of the radii `low` and `high`, all of one shape."""
    least, most = clip_bounds(low, high)
    return torch.minimum(torch.maximum(ratio, least), most)


def regularized(inputs: LossInputs, surrogate: Tensor, rows: dict[str, Tensor] | None = None) -> LossOutputs:
    """The loss of a policy term: -sum_t w_t c_t surrogate_t + kl_coef sum_t w_t KL_t - entropy_coef sum_t w_t H_t.

    surrogate: [R], to be maximized. rows: see `LossOutputs`. Raises ValueError for a surrogate of another shape, which would
    silently broadcast over the rows ([R, 1] to R x R), and for a KL term without reference log-probs.
    """
    settings, weight = inputs.settings, inputs.weight
    if surrogate.shape != weight.shape:
        raise ValueError(
            f"the surrogate has shape {list(surrogate.shape)}, but must have {list(weight.shape)}, one value per row"
        )
    loss = -(weight * inputs.correction * surrogate).sum()
    if settings.kl_coef:
        if inputs.ref_logp is None:
            raise ValueError(f"objective.kl_coef is {settings.kl_coef:g}, but there are no reference log-probs")
        kl = kl_estimate(inputs.logp, inputs.ref_logp, settings.kl_estimator, settings.log_ratio_bound)
        loss = loss + settings.kl_coef * (weight * kl).sum()
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * (weight * inputs.entropy).sum()
    return LossOutputs(loss, {name: values.detach() for name, values in (rows or {}).items()})


@register_loss("clipped", token_local=True)
def clipped_loss(inputs: LossInputs) -> LossOutputs:
    """The clipped surrogate with a clip range per row (GRPO, DAPO and every ETR preset differ only in the ranges).

        J = sum_t w_t c_t min( r_t A, clip(r_t, 1 - eps_low, 1 + eps_high) A )

    With `dual_clip` c > 1, if A < 0: max( that, c A ), which bounds the loss of a token whose ratio explodes.
    Sources: PPO (1707.06347) with GRPO's advantages (2402.03300); dual clip: Ye et al. (1912.09729).
    """
    ratio = importance_ratio(inputs.logp, inputs.old_logp, inputs.settings.log_ratio_bound)
    advantage = inputs.advantage
    surrogate = torch.minimum(ratio * advantage, clip_ratio(ratio, inputs.clip_low, inputs.clip_high) * advantage)
    limit = inputs.settings.dual_clip
    if limit is None:
        return regularized(inputs, surrogate)
    stopped = (advantage < 0) & (ratio > limit)
    return regularized(inputs, torch.where(stopped, limit * advantage, surrogate), {"dual_clip": stopped})


@register_loss("gspo", token_local=False)
def gspo_loss(inputs: LossInputs) -> LossOutputs:
    """GSPO: one ratio per sequence, the geometric mean of its tokens' ratios, clipped as a whole.

        s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|),   J = sum_t w_t c_t min( s_i A, clip(s_i, 1 - eps_low, 1 + eps_high) A )

    For the paper's mean over sequences use the aggregation `sequence_mean`. Source: Zheng et al. (2507.18071), eq. 5 to 7.
    """
    sequences, bound = inputs.sequences, inputs.settings.log_ratio_bound
    log_ratio = sequences.mean(inputs.logp - inputs.old_logp)
    ratio = sequences.spread(log_ratio.clamp(-bound, bound).exp())
    clipped = clip_ratio(ratio, inputs.clip_low, inputs.clip_high)
    return regularized(inputs, torch.minimum(ratio * inputs.advantage, clipped * inputs.advantage), {"ratio": ratio})


@register_loss("cispo", token_local=True)
def cispo_loss(inputs: LossInputs) -> LossOutputs:
    """CISPO: the importance weight is clipped and detached, so that every token keeps its gradient.

        J = sum_t w_t c_t sg( clip(r_t, 1 - eps_low, 1 + eps_high) ) A log pi(t)

    Source: MiniMax-M1 (2506.13585), eq. 4 and 5.
    """
    ratio = importance_ratio(inputs.logp, inputs.old_logp, inputs.settings.log_ratio_bound).detach()
    clipped = clip_ratio(ratio, inputs.clip_low, inputs.clip_high)
    least, most = clip_bounds(inputs.clip_low, inputs.clip_high)
    rows = {"clip_upper": ratio > most, "clip_lower": ratio < least}
    return regularized(inputs, clipped * inputs.advantage * inputs.logp, rows)


@register_loss("reinforce", token_local=True)
def reinforce_loss(inputs: LossInputs) -> LossOutputs:
    """REINFORCE: J = sum_t w_t c_t A log pi(t), without a ratio: correct for one optimizer step per rollout.

    With leave-one-out baselines this is RLOO, Ahmadian et al. (2402.14740).
    """
    never = torch.zeros_like(inputs.advantage, dtype=torch.bool)
    return regularized(inputs, inputs.advantage * inputs.logp, {"clip_upper": never, "clip_lower": never})
