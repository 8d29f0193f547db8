"""Build a policy loss's inputs from a batch and one of its microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from etr_megatron.config import ObjectiveConfig, resolved
from etr_megatron.objective import LossInputs, LossSettings, Sequences
from etr_megatron.policy.batch import PolicyBatch
from etr_megatron.policy.packing import Microbatch

_BY_SAMPLE = ("advantage", "clip_low", "clip_high", "weight", "group_mean", "group_std", "variance")


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
    `logp` and `entropy` are NaN until `LossInputs.at` fills them in. Copies to the device wait for all of its work, so call
    this before the passes.
    """
    device = micro.targets.device
    place = _places(batch, micro)
    lengths = torch.tensor([batch.sequences[i].rows for i in micro.samples], dtype=torch.long)
    # Each context-parallel rank has some tokens of every sample.
    at = (lengths.cumsum(0) - lengths)[place] + micro.row_position
    by_token = {"old_logp": batch.old_logp, "rollout_logp": batch.rollout_logp}
    by_token |= {name: values for name in ("ref_logp", "correction") if (values := getattr(batch, name)) is not None}
    rows = {name: _rows_of_tokens(values, micro, at) for name, values in by_token.items()}
    rows |= {name: getattr(batch, name)[micro.row_sample] for name in _BY_SAMPLE}
    rows.setdefault("correction", torch.ones_like(rows["old_logp"]))
    on_device = dict(zip(rows, torch.stack([*rows.values()]).to(device), strict=True))
    unknown = torch.full((), torch.nan, device=device).expand(len(at))
    sequences = Sequences(place.to(device), lengths.to(device), reduce)
    return LossInputs(logp=unknown, entropy=unknown, sequences=sequences, settings=settings, **on_device)


def pass_rate_bins_of_samples(batch: PolicyBatch, micro: Microbatch) -> Tensor:
    """int64 [S], on the microbatch's device: the pass-rate bin of each of its samples' groups."""
    return batch.pass_rate_bin[list(micro.samples)].to(micro.targets.device)


def _rows_of_tokens(values: Sequence[Tensor], micro: Microbatch, at: Tensor) -> Tensor:
    """[R]: each row's value. values: per sample. at: int64 [R], places in the concatenation of the microbatch's samples."""
    return torch.cat([values[i] for i in micro.samples] or [torch.zeros(0)])[at]


def _places(batch: PolicyBatch, micro: Microbatch) -> Tensor:
    """int64 [R] on the CPU: the index, within the microbatch, of each row's sample."""
    place = torch.zeros(len(batch), dtype=torch.long)
    place[list(micro.samples)] = torch.arange(len(micro.samples))
    return place[micro.row_sample]
