"""Build a policy loss's inputs from a batch and one of its microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from etr_megatron.config import ObjectiveConfig, resolved
from etr_megatron.objective import LossInputs, LossSettings, Sequences
from etr_megatron.policy.batch import PolicyBatch
from etr_megatron.policy.packing import Microbatch


def loss_settings(objective: ObjectiveConfig) -> LossSettings:
    """The scalars of a resolved objective that losses use."""
    return LossSettings(
        log_ratio_bound=objective.log_ratio_bound,
        kl_coef=objective.kl_coef if objective.kl_in == "loss" else 0.0,
        kl_estimator=resolved(objective.kl_estimator),
        entropy_coef=objective.entropy_coef,
        dual_clip=objective.dual_clip,
        options=objective.options,
    )


def loss_inputs(
    batch: PolicyBatch,
    micro: Microbatch,
    settings: LossSettings,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> LossInputs:
    """Everything known before the forward pass of `micro`, on its device: R rows in the microbatch's order.

    reduce: see `Sequences`.
    `logp` and `entropy` are NaN until `LossInputs.at` fills them in.
    """
    device = micro.row_sample.device
    place = _places(batch, micro)
    lengths = torch.tensor([batch.sequences[i].rows for i in micro.samples], dtype=torch.long)
    # Each context-parallel rank has some tokens of every sample.
    at = (lengths.cumsum(0) - lengths)[place] + micro.row_position.cpu()

    def per_token(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([values[i] for i in micro.samples] or [torch.zeros(0)])[at].to(device)

    def per_sample(values: Tensor) -> Tensor:
        return values.to(device)[micro.row_sample]

    old_logp = per_token(batch.old_logp)
    unknown = torch.full_like(old_logp, torch.nan)
    return LossInputs(
        logp=unknown,
        entropy=unknown,
        old_logp=old_logp,
        rollout_logp=per_token(batch.rollout_logp),
        ref_logp=None if batch.ref_logp is None else per_token(batch.ref_logp),
        correction=torch.ones_like(old_logp) if batch.correction is None else per_token(batch.correction),
        advantage=per_sample(batch.advantage),
        clip_low=per_sample(batch.clip_low),
        clip_high=per_sample(batch.clip_high),
        weight=per_sample(batch.weight),
        group_mean=per_sample(batch.group_mean),
        group_std=per_sample(batch.group_std),
        variance=per_sample(batch.variance),
        sequences=Sequences(place.to(device), lengths.to(device), reduce),
        settings=settings,
    )


def pass_rate_bins_of_rows(batch: PolicyBatch, micro: Microbatch) -> Tensor:
    """int64 [R]: the pass-rate bin of each row's group."""
    return batch.pass_rate_bin.to(micro.row_sample.device)[micro.row_sample]


def _places(batch: PolicyBatch, micro: Microbatch) -> Tensor:
    """int64 [R] on the CPU: the index, within the microbatch, of each row's sample."""
    place = torch.zeros(len(batch), dtype=torch.long)
    place[list(micro.samples)] = torch.arange(len(micro.samples))
    return place[micro.row_sample.cpu()]
