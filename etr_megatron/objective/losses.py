"""Policy losses: a registry of functions from `LossInputs` to `LossOutputs`.

A loss of your own, in your own file:

    @register_loss("my_loss")
    def my_loss(inputs: LossInputs) -> LossOutputs: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from etr_megatron.objective.kl import kl_estimate


@dataclass(frozen=True)
class LossInputs:
    """What a loss may use: R loss rows (response tokens) of one microbatch, float32 [R] each unless said otherwise.

    Masked positions are not in here: they were selected out, never multiplied by zero.

    logp, entropy: of the policy being trained, with gradient. old_logp: the policy that the rollout's updates started from,
    recomputed by the trainer. rollout_logp: the inference engine's own. ref_logp: the reference model's, or None.
    advantage, clip_low, clip_high: of each row's sample. weight: aggregation weight, the global denominator included.
    log_ratio_bound, kl_coef, kl_estimator, entropy_coef: scalars of the objective.
    """

    logp: Tensor
    entropy: Tensor
    old_logp: Tensor
    rollout_logp: Tensor
    advantage: Tensor
    clip_low: Tensor
    clip_high: Tensor
    weight: Tensor
    ref_logp: Tensor | None = None
    log_ratio_bound: float = 20.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0


@dataclass(frozen=True)
class LossOutputs:
    """loss: scalar, already divided by the global denominator. sums: detached float64 sums over the rows, which add up over
    microbatches and ranks; every sum is divided by `sums["tokens"]` in the end."""

    loss: Tensor
    sums: dict[str, Tensor]


Loss = Callable[[LossInputs], LossOutputs]
_LOSSES: dict[str, Loss] = {}


def register_loss(name: str) -> Callable[[Loss], Loss]:
    """Decorator that makes a loss known by name. Raises ValueError when the name is taken."""

    def add(loss: Loss) -> Loss:
        if name in _LOSSES:
            raise ValueError(f"a loss named {name!r} is registered already")
        _LOSSES[name] = loss
        return loss

    return add


def get_loss(name: str) -> Loss:
    """The loss of that name. Raises ValueError naming the known ones."""
    if name not in _LOSSES:
        raise ValueError(f"no loss named {name!r}; known: {', '.join(sorted(_LOSSES))}")
    return _LOSSES[name]


@register_loss("clipped")
def clipped_loss(inputs: LossInputs) -> LossOutputs:
    """The clipped surrogate with a clip range per row (GRPO, DAPO and every ETR preset differ in the ranges alone).

        J = sum_t w_t min( r_t A, clip(r_t, 1 - eps_low, 1 + eps_high) A ),   loss = -J + kl_coef KL - entropy_coef H

    with r = exp(log pi - log pi_old), the log bounded by `log_ratio_bound` before exp(). Source: PPO (1707.06347) with
    GRPO's advantages (2402.03300).
    """
    log_ratio = (inputs.logp - inputs.old_logp).clamp(-inputs.log_ratio_bound, inputs.log_ratio_bound)
    ratio = log_ratio.exp()
    advantage, weight = inputs.advantage, inputs.weight
    clipped = torch.minimum(torch.maximum(ratio, 1 - inputs.clip_low), 1 + inputs.clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    loss = -(weight * surrogate).sum()
    kl = torch.zeros_like(inputs.logp)
    if inputs.ref_logp is not None:
        kl = kl_estimate(inputs.logp, inputs.ref_logp, inputs.kl_estimator, inputs.log_ratio_bound)
        loss = loss + inputs.kl_coef * (weight * kl).sum()
    if inputs.entropy_coef:
        loss = loss - inputs.entropy_coef * (weight * inputs.entropy).sum()
    with torch.no_grad():
        # A row counts as clipped where its bound is active, that is where its gradient is cut off.
        upper = (advantage > 0) & (ratio > 1 + inputs.clip_high)
        lower = (advantage < 0) & (ratio < 1 - inputs.clip_low)
        rows = {
            "tokens": torch.ones_like(ratio),
            "entropy": inputs.entropy,
            "ratio": ratio,
            "clip_upper": upper,
            "clip_lower": lower,
            "clip_radius": (inputs.clip_low + inputs.clip_high) / 2,
            "kl": kl,
        }
        sums = {name: values.detach().double().sum() for name, values in rows.items()}
    return LossOutputs(loss, sums)
