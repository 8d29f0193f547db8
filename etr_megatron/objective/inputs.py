"""The contract of a policy loss: `LossInputs` in, `LossOutputs` out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from etr_megatron.errors import UserError


@dataclass(frozen=True)
class LossSettings:
    """Scalars of the objective that a loss may use.

    log_ratio_bound: bound on |log r| before exp(). kl_coef, kl_estimator: coefficient and estimator of the KL term in the loss;
    kl_coef is 0 without such a term, also if the KL is in the reward. entropy_coef: coefficient of the entropy bonus.
    dual_clip: c of the dual clip, None is off.
    options: `objective.options`, numbers for a custom loss.
    """

    log_ratio_bound: float = 20.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    dual_clip: float | None = None
    options: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sequences:
    """Which sequence each row belongs to; for sequence-level ratios under packing and context parallelism.

    index: int64 [R], the sequence of each row. lengths: int64 [S], rows of each WHOLE sequence, even if this rank holds only
    some of them. reduce: differentiable sum of a [S] tensor over the ranks that hold parts of the same sequences (its backward
    also sums the gradients over those ranks); None if every sequence is whole.
    is_cut: whether the rows are only a chunk of the microbatch, so that sums over sequences are not possible.
    """

    index: Tensor
    lengths: Tensor
    reduce: Callable[[Tensor], Tensor] | None = None
    is_cut: bool = False

    def mean(self, rows: Tensor) -> Tensor:
        """Mean of `rows` [R] over each whole sequence [S]; 0 for a sequence without tokens.

        Raises UserError for a chunk of the rows: a loss that needs whole sequences must not be marked token-local.
        """
        if self.is_cut:
            raise UserError("a loss that is marked token-local uses sums over sequences; remove the mark")
        sums = torch.zeros(len(self.lengths), dtype=rows.dtype, device=rows.device).index_add(0, self.index, rows)
        if self.reduce is not None:
            sums = self.reduce(sums)
        return sums / self.lengths.clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """Each sequence's value [S] at each of its rows, [R]."""
        return values[self.index]


_ROWS = (
    "old_logp",
    "rollout_logp",
    "advantage",
    "clip_low",
    "clip_high",
    "weight",
    "correction",
    "group_mean",
    "group_std",
    "variance",
)


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a loss: R loss rows (response tokens) of one microbatch, float32 [R] each unless stated otherwise.

    Masked positions, such as the tokens of an environment's replies, are absent: they were dropped, not multiplied by zero.

    logp, entropy: the trained policy's log-prob and entropy, with gradient. old_logp: log-prob under the policy before the
    step's updates, recomputed by the trainer, or `rollout_logp` (`objective.old_logp`). rollout_logp: log-prob from the
    inference engine. ref_logp: log-prob under the reference model, or None.
    advantage, clip_low, clip_high: values of each row's sample. weight: aggregation weight, including the global denominator.
    correction: off-policy weight of the row for the gap between rollout_logp and old_logp; ones when off.
    group_mean, group_std: mean and std over the row's group of the rewards that are trained on. variance: v_g of the group's
    verifier rewards.
    """

    logp: Tensor
    entropy: Tensor
    old_logp: Tensor
    rollout_logp: Tensor
    advantage: Tensor
    clip_low: Tensor
    clip_high: Tensor
    weight: Tensor
    correction: Tensor
    group_mean: Tensor
    group_std: Tensor
    variance: Tensor
    sequences: Sequences
    ref_logp: Tensor | None = None
    settings: LossSettings = field(default_factory=LossSettings)

    def at(self, rows: slice, logp: Tensor, entropy: Tensor) -> LossInputs:
        """Only the rows `rows`, with the policy's values filled in.

        The inputs are built before the forward pass, with placeholders for `logp` and `entropy`; a chunked head then takes one
        chunk after the other.
        """
        count = len(self.old_logp)
        index, lengths = self.sequences.index[rows], self.sequences.lengths
        is_cut = self.sequences.is_cut or len(range(*rows.indices(count))) < count
        return replace(
            self,
            logp=logp,
            entropy=entropy,
            ref_logp=None if self.ref_logp is None else self.ref_logp[rows],
            sequences=Sequences(index, lengths, self.sequences.reduce, is_cut),
            **{name: getattr(self, name)[rows] for name in _ROWS},
        )

    def row_tensors(self) -> dict[str, Tensor]:
        """Every float tensor [R] by name."""
        named = {name: getattr(self, name) for name in ("logp", "entropy", *_ROWS)}
        return named if self.ref_logp is None else {**named, "ref_logp": self.ref_logp}


@dataclass(frozen=True)
class LossOutputs:
    """loss: scalar, already divided by the global denominator (through the weights).

    rows: detached values [R] to sum over the whole step, overall and by pass rate; the same names in every call.
    `ratio`, `clip_upper` and `clip_lower` replace the defaults (see `objective.diagnostics`); any other name becomes
    the metric `loss/<name>`, a mean over tokens.
    """

    loss: Tensor
    rows: dict[str, Tensor] = field(default_factory=dict)
