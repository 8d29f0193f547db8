"""Rules about the policy loss; null fields are already filled with the preset's values."""

from __future__ import annotations

from collections.abc import Iterator

from etr_megatron.config.defaults import resolved
from etr_megatron.config.import_path import IMPORT_PATH
from etr_megatron.config.presets import LOSSES
from etr_megatron.config.rules.violation import Violation
from etr_megatron.config.schema import Config


def objective(config: Config) -> Iterator[Violation]:
    """The loss and its terms."""
    objective = config.objective
    if objective.loss not in LOSSES and not IMPORT_PATH.fullmatch(objective.loss or ""):
        yield Violation(
            ("objective.loss",), f"must be one of {', '.join(LOSSES)}, or an import path of the form package.module:function"
        )
    if objective.options and objective.loss in LOSSES:
        yield Violation(("objective.options", "objective.loss"), "only a custom loss takes options; remove them")
    if objective.dual_clip is not None:
        if objective.dual_clip <= 1:
            yield Violation(("objective.dual_clip",), "must be greater than 1, or null to disable it")
        if objective.loss in LOSSES and objective.loss != "clipped":
            yield Violation(
                ("objective.dual_clip", "objective.loss"),
                "only the clipped loss has a dual clip; set dual_clip to null",
            )
    if objective.kl_coef > 0 and objective.kl_in == "reward" and objective.kl_estimator != "k1":
        yield Violation(
            ("objective.kl_in", "objective.kl_estimator"),
            "a KL term in the reward has no gradient of its own, so only k1 pulls towards the reference; set kl_estimator to "
            "k1, or kl_in to loss",
            given=("objective.kl_coef",),
        )
    if objective.kl_coef > 0 and objective.kl_in == "reward" and objective.normalize:
        yield Violation(
            ("objective.kl_in", "objective.normalize"),
            "if the rewards of a group are otherwise equal, normalization scales even a tiny KL term to full-size "
            "advantages; set normalize to false, or kl_in to loss",
            given=("objective.kl_coef",),
        )
    if objective.old_logp == "engine":
        if objective.correction != "none":
            yield Violation(
                ("objective.old_logp", "objective.correction"),
                "the ratio to the engine's log-probs already covers what the correction weights; set correction to none, or "
                "old_logp to trainer",
            )
        if objective.kl_coef > 0 and objective.kl_in == "reward":
            yield Violation(
                ("objective.old_logp", "objective.kl_in"),
                "a KL term in the reward needs the trainer's log-probs; set old_logp to trainer, or kl_in to loss",
                given=("objective.kl_coef",),
            )
    if objective.correction_floor > objective.correction_cap:
        yield Violation(
            ("objective.correction_floor", "objective.correction_cap"), "correction_floor must not exceed correction_cap"
        )
    if not 0 < objective.log_ratio_bound <= 80:
        yield Violation(
            ("objective.log_ratio_bound",),
            "must be greater than 0 and at most 80, so that exp() stays within the float32 range",
        )
    if objective.constant_length is not None and objective.constant_length < 1:
        yield Violation(("objective.constant_length",), "must be at least 1, or null for rollout.max_response_tokens")


def off_policy(config: Config) -> Iterator[Violation]:
    """A warning: a loss without an importance ratio over several optimizer steps."""
    if config.objective.loss == "reinforce" and config.train.epochs * config.train.minibatches > 1:
        yield Violation(
            ("objective.loss", "train.epochs", "train.minibatches"),
            "this loss has no importance ratio, so nothing corrects or bounds the optimizer steps after the first of each "
            "rollout, which are off-policy; set train.epochs and train.minibatches to 1 for the original algorithm",
        )


def stale(config: Config) -> Iterator[Violation]:
    """A warning: tokens of older weights whose probabilities nothing corrects."""
    objective = config.objective
    is_ahead = config.rollout.max_staleness and not config.rollout.only
    if is_ahead and objective.old_logp == "trainer" and objective.correction == "none":
        yield Violation(
            ("rollout.max_staleness", "objective.old_logp", "objective.correction"),
            "tokens of older weights are trained on as if the current weights had generated them; set correction to truncate "
            "or mask, or old_logp to engine",
        )


def clip_range(config: Config) -> Iterator[Violation]:
    """The clip radii."""
    objective = config.objective
    eps_min, eps_max = resolved(objective.eps_min), resolved(objective.eps_max)
    if objective.loss in ("clipped", "gspo") and eps_max >= 1:
        yield Violation(
            ("objective.eps_max",),
            "must be below 1, otherwise the lower clip bound 1 - eps is not positive",
            given=("objective.loss",),
        )
    if eps_min > eps_max:
        yield Violation(("objective.eps_min", "objective.eps_max"), "eps_min must not exceed eps_max")
        return
    for side in ("eps_low", "eps_high"):
        if not eps_min <= getattr(objective, side) <= eps_max:
            yield Violation(
                (f"objective.{side}", "objective.eps_min", "objective.eps_max"),
                f"{side} must lie between eps_min and eps_max, otherwise it never takes effect",
            )
