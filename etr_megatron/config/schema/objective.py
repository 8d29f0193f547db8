"""The policy loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ObjectiveConfig:
    """The policy loss and what goes into it. Fields left at null take the preset's value."""

    preset: Literal[
        "etr",
        "grpo",
        "dapo",
        "etr_micro",
        "etr_macro",
        "etr_second_order",
        "etr_matched",
        "etr_shuffled",
        "etr_inverted_macro",
        "dr_grpo",
        "gspo",
        "cispo",
        "rloo",
    ] = "etr"
    """The algorithm: a named set of the fields below."""
    loss: str | None = None
    """`clipped`, `gspo`, `cispo`, `reinforce`, or `package.module:function` of your own: `f(LossInputs) -> LossOutputs`."""
    options: dict[str, float] = field(default_factory=dict)
    """Numbers for a loss of your own, which finds them in `inputs.settings.options`, such as `{margin: 0.1}`."""
    baseline: Literal["group_mean", "leave_one_out"] | None = None
    """What a reward is compared with: the mean of its group, or of the group's other responses."""
    normalize: bool | None = None
    """Divide the advantage by the group's standard deviation."""
    micro: Literal["tanh", "linear", "none"] | None = None
    """How the radius follows the advantage's magnitude."""
    macro: Literal["variance", "inverse_variance", "std", "none"] | None = None
    """How the radius follows the group's variance."""
    control: Literal["none", "matched", "shuffled"] | None = None
    """Replaces the radii by a control's: their mean on the same batch, or the same radii dealt out to other samples."""
    alpha: float | None = None
    """Strength of micro `tanh`."""
    gamma: float | None = None
    """Strength of macro `variance`."""
    eps_low: float | None = None
    """Base radius below 1."""
    eps_high: float | None = None
    """Base radius above 1."""
    eps_min: float | None = None
    """Floor of both radii."""
    eps_max: float | None = None
    """Ceiling of both radii; below 1, except for `cispo`, where an `eps_low` of 1 is no lower bound."""
    delta: float = 1e-6
    """Added to the group's deviation in the advantage."""
    log_ratio_bound: float = 20.0
    """abs(log r) is bounded by this before exp()."""
    dual_clip: float | None = None
    """With a negative advantage the `clipped` loss stops at this many times the advantage (dual clip); above 1, null is off."""
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] | None = None
    """How token losses become one number per optimizer step: every token alike, every sequence alike, or tokens over a constant
    (no length bias)."""
    constant_length: int | None = None
    """Divisor per sequence of `constant_length`; null is `rollout.max_response_tokens`."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference model (the policy the run started from); 0 keeps no reference."""
    kl_in: Literal["loss", "reward"] | None = None
    """Where that KL goes: a term of the loss, or k1 summed over each response and subtracted from its trained reward."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the KL, per token; null is k3 in the loss, where the gradient of k1 has mean zero, and k1 in the reward,
    where k2 and k3 are refused."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Weights the policy term by trainer over engine probability: truncated at `correction_cap` (TIS), or 0 outside of
    `correction_floor` to `correction_cap` (MIS)."""
    correction_level: Literal["token", "sequence"] = "token"
    """The weight of each token, or of the whole response (their product)."""
    correction_cap: float = 2.0
    """Largest weight."""
    correction_floor: float = 0.5
    """Least weight that `mask` keeps."""
