"""The policy loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ObjectiveConfig:
    """The policy loss and its inputs. Fields left at null take the preset's value."""

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
    """The algorithm: a named set of values of the fields below."""
    loss: str | None = None
    """`clipped`, `gspo`, `cispo`, `reinforce`, or your own as `package.module:function`: `f(LossInputs) -> LossOutputs`."""
    options: dict[str, float] = field(default_factory=dict)
    """Numbers for your own loss, such as `{margin: 0.1}`; it reads them from `inputs.settings.options`."""
    baseline: Literal["group_mean", "leave_one_out"] | None = None
    """What is subtracted from a reward: the mean of its group, or of the other responses in the group."""
    normalize: bool | None = None
    """Divide the advantage by the group's standard deviation."""
    micro: Literal["tanh", "linear", "none"] | None = None
    """How the clip radius depends on the magnitude of the advantage."""
    macro: Literal["variance", "inverse_variance", "std", "none"] | None = None
    """How the clip radius depends on the reward variance of the group."""
    control: Literal["none", "matched", "shuffled"] | None = None
    """Control experiment: replaces the radii by their mean on the same batch (`matched`), or assigns the same radii to other
    samples (`shuffled`)."""
    alpha: float | None = None
    """Strength of micro `tanh`."""
    gamma: float | None = None
    """Strength of macro `variance` and `inverse_variance`."""
    eps_low: float | None = None
    """Base radius below 1."""
    eps_high: float | None = None
    """Base radius above 1."""
    eps_min: float | None = None
    """Floor of both radii."""
    eps_max: float | None = None
    """Ceiling of both radii, below 1 for `clipped` and `gspo`. In `cispo`, an `eps_low` of 1 means no lower bound."""
    delta: float = 1e-6
    """Added to the group's standard deviation when the advantage is divided by it."""
    log_ratio_bound: float = 20.0
    """Bound of abs(log r), applied before exp()."""
    dual_clip: float | None = None
    """Dual clip: if the advantage is negative, the `clipped` loss is bounded at this many times the advantage. Above 1; null is
    off."""
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] | None = None
    """How token losses become one number per optimizer step: equal weight per token, equal weight per sequence, or each
    sequence's sum divided by a constant (no length bias)."""
    constant_length: int | None = None
    """Divisor per sequence for `aggregation: constant_length`; null is `rollout.max_response_tokens`."""
    mask_truncated: bool = False
    """Overlong filtering: leave responses that were cut off at `rollout.max_response_tokens` out of the loss and its
    denominators. Their rewards still count in their groups' statistics."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference model, which is the policy at the run's start. 0 loads no reference model."""
    kl_in: Literal["loss", "reward"] | None = None
    """Where the KL goes. `loss`: a term of the loss. `reward`: k1, summed over each response and subtracted from the reward
    that is trained on."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """KL estimator per token; null is k3 in the loss and k1 in the reward. In the loss, the gradient of k1 has mean zero; in
    the reward, k2 and k3 are refused."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    old_logp: Literal["trainer", "engine"] = "trainer"
    """Log-probs of the policy that the importance ratio compares with. `trainer`: computed before the step's updates. `engine`:
    those with which the tokens were generated. This saves a forward pass, but the ratio, and so the clipping, also covers the
    gap between engine and trainer and the age of tokens. The first step computes the trainer's anyway, for
    `rollout.max_logprob_gap`."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Weights the policy term by the ratio of the trainer's to the engine's probability. `truncate` (TIS) bounds the weight at
    `correction_cap`; `mask` (MIS) sets it to 0 outside `correction_floor` to `correction_cap`."""
    correction_level: Literal["token", "sequence"] = "token"
    """Whether each token has its own weight, or the whole response has the product of its tokens' weights."""
    correction_cap: float = 2.0
    """Maximum weight."""
    correction_floor: float = 0.5
    """Minimum weight that `mask` keeps."""
