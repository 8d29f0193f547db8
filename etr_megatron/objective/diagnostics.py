"""Diagnostics of every loss: per-row values, summed in float64 overall and by the pass rate of the row's group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from etr_megatron.objective.inputs import LossInputs, LossOutputs
from etr_megatron.objective.kl import kl_estimate
from etr_megatron.objective.losses import clip_bounds, importance_ratio

PASS_RATE_BINS = ("pass_0_25", "pass_25_50", "pass_50_75", "pass_75_100")
"""Pass rate p in (0, .25), [.25, .5), [.5, .75), [.75, 1)."""

_OF_THE_LOSS = ("ratio", "clip_upper", "clip_lower")


def pass_rate_bins(pass_rate: Tensor, variance: Tensor) -> Tensor:
    """Index into `PASS_RATE_BINS` of each sample's group, int64 [N]; -1 if the group has no variance.

    pass_rate: [N], the verifier's mean reward as a fraction of its declared range. variance: v_g [N].
    """
    # A quarter may come as 0.24999999999999997 if the range of rewards is not a power of two.
    place = (pass_rate.round(decimals=9) * len(PASS_RATE_BINS)).long().clamp(0, len(PASS_RATE_BINS) - 1)
    return torch.where(variance > 0, place, -1)


@dataclass(frozen=True)
class DiagnosticSums:
    """Sums over a microbatch's rows, on their device. by_bin: float64 [len(names), 1 + len(PASS_RATE_BINS)]; the first column
    is of rows whose group has no variance."""

    names: tuple[str, ...]
    by_bin: Tensor


def read_sums(parts: Sequence[DiagnosticSums]) -> dict[str, float]:
    """The sums over all parts by name, and by `<name>_<bin>` for each bin; reads once from the device."""
    if not parts:
        return {}
    sums: dict[str, float] = {}
    values = torch.cat([part.by_bin for part in parts]).cpu()
    for part, by_bin in zip(parts, values.split([len(part.names) for part in parts]), strict=True):
        for columns, end in ((by_bin.sum(1), ""), *zip(by_bin.T[1:], (f"_{name}" for name in PASS_RATE_BINS), strict=True)):
            for name, value in zip(part.names, columns.tolist(), strict=True):
                sums[name + end] = sums.get(name + end, 0.0) + value
    return sums


@torch.no_grad()
def diagnostic_sums(inputs: LossInputs, outputs: LossOutputs, bins: Tensor) -> DiagnosticSums:
    """Sums over the rows, additive over microbatches and ranks. Reads nothing from the device.

    bins: int64 [R], as from `pass_rate_bins`. Names: `tokens`; `entropy`; `ratio`, the importance ratio (per token, unless
    the loss reports its own), and `ratio_squared`; `clip_upper` and `clip_lower`, whether the bound stops the row's gradient
    (unless the loss reports its own); `clip_radius`; `kl` to the reference model, 0 without one; `gap`, the absolute difference
    of the engine's and the policy's log-probs, and `mismatch`, the k3 estimate of KL(engine || policy); `loss/<name>` for other
    rows.
    """
    own = {name: values.detach().double() for name, values in outputs.rows.items()}
    ratio = own.get("ratio")
    if ratio is None:
        ratio = importance_ratio(inputs.logp, inputs.old_logp, inputs.settings.log_ratio_bound).double()
    kl = torch.zeros_like(ratio)
    if inputs.ref_logp is not None:
        kl = kl_estimate(inputs.logp, inputs.ref_logp, inputs.settings.kl_estimator, inputs.settings.log_ratio_bound)
    engine, logp = inputs.rollout_logp.double(), inputs.logp.double()
    least, most = clip_bounds(inputs.clip_low, inputs.clip_high)
    rows = {
        "tokens": torch.ones_like(ratio),
        "entropy": inputs.entropy,
        "ratio": ratio,
        "ratio_squared": ratio**2,
        "clip_upper": own.get("clip_upper", (inputs.advantage > 0) & (ratio > most)),
        "clip_lower": own.get("clip_lower", (inputs.advantage < 0) & (ratio < least)),
        "clip_radius": (inputs.clip_low + inputs.clip_high) / 2,
        "kl": kl,
        "gap": (engine - logp).abs(),
        "mismatch": kl_estimate(engine, logp, "k3", inputs.settings.log_ratio_bound),
        **{f"loss/{name}": values for name, values in own.items() if name not in _OF_THE_LOSS},
    }
    values = torch.stack([row.double() for row in rows.values()])
    by_bin = torch.zeros(len(rows), 1 + len(PASS_RATE_BINS), dtype=torch.float64, device=values.device)
    return DiagnosticSums(tuple(rows), by_bin.index_add(1, bins + 1, values))
