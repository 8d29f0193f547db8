"""Random inputs of policy losses, and an independent reference of every loss and its gradients: float64 NumPy, by sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from etr_megatron.objective import LossInputs, LossSettings, Sequences

LENGTHS = (5, 1, 7, 3, 2)


@dataclass
class Case:
    """Rows of several samples as NumPy float64 [R]; `index` int [R] is each row's sample."""

    rows: dict[str, np.ndarray]
    index: np.ndarray
    lengths: np.ndarray
    settings: LossSettings

    def inputs(self, logp: torch.Tensor, entropy: torch.Tensor, dtype: torch.dtype = torch.float64) -> LossInputs:
        tensors = {name: torch.tensor(values, dtype=dtype) for name, values in self.rows.items()}
        sequences = Sequences(torch.tensor(self.index), torch.tensor(self.lengths))
        unknown = torch.full_like(tensors["old_logp"], torch.nan)
        known = LossInputs(logp=unknown, entropy=unknown, sequences=sequences, settings=self.settings, **tensors)
        return known.at(slice(None), logp, entropy)

    def part(self, samples: list[int]) -> Case:
        """Only these samples, as in another microbatch; their weights stay those of the whole."""
        rows = np.concatenate([np.flatnonzero(self.index == sample) for sample in samples])
        place = {sample: number for number, sample in enumerate(samples)}
        return replace(
            self,
            rows={name: values[rows] for name, values in self.rows.items()},
            index=np.array([place[sample] for sample in self.index[rows]]),
            lengths=self.lengths[samples],
        )


def random_case(
    seed: int, settings: LossSettings | None = None, spread: float = 0.4, lengths: tuple[int, ...] = LENGTHS
) -> tuple[Case, np.ndarray, np.ndarray]:
    """A case whose ratios straddle the bounds, and the policy's log-probs and entropies [R]."""
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(len(lengths)), lengths)
    count = len(index)
    old = rng.normal(-2, 1, count)

    def per_sample(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, len(lengths))[index]

    rows = {
        "old_logp": old,
        "rollout_logp": old + rng.normal(0, 0.1, count),
        "ref_logp": old + rng.normal(0, 0.5, count),
        "advantage": rng.choice([-1.0, 1.0], len(lengths))[index] * per_sample(0.3, 2.0),
        "clip_low": per_sample(0.05, 0.2),
        "clip_high": per_sample(0.05, 0.2),
        "weight": per_sample(0.01, 0.1),
        "correction": rng.uniform(0, 2, count),
        "group_mean": per_sample(0, 1),
        "group_std": per_sample(0, 0.5),
        "variance": per_sample(0, 1),
    }
    # Shift each sample as well, so that whole sequences leave their range.
    logp = old + rng.normal(0, spread, count) + rng.normal(0, 0.2, len(lengths))[index]
    case = Case(rows, index, np.array(lengths), settings or LossSettings())
    return case, logp, rng.uniform(0.1, 3, count)


def _bounded(log_ratio: float, bound: float) -> tuple[float, float]:
    """exp of the log-ratio within [-bound, bound], and its derivative, 0 beyond."""
    ratio = np.exp(min(max(log_ratio, -bound), bound))
    return ratio, ratio if abs(log_ratio) <= bound else 0.0


def _kl(x: float, estimator: str, bound: float) -> tuple[float, float]:
    """The estimator of x = log pi_ref - log pi, and its derivative with respect to log pi."""
    if estimator == "k1":
        return -x, 1.0
    if estimator == "k2":
        return x**2 / 2, -x
    ratio, slope = _bounded(x, bound)
    return ratio - 1 - min(max(x, -bound), bound), float(abs(x) <= bound) - slope


def _clipped(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> tuple[float, float]:
    """min(r A, clip(r) A) and its derivative with respect to r, with the dual clip."""
    bounded = min(max(ratio, 1 - low), 1 + high)
    value, slope = (ratio * advantage, advantage) if ratio * advantage <= bounded * advantage else (bounded * advantage, 0.0)
    if dual is not None and advantage < 0 and value < dual * advantage:
        return dual * advantage, 0.0
    return value, slope


def reference(name: str, case: Case, logp: np.ndarray, entropy: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss and its derivatives with respect to log-probs and entropies."""
    r, settings = case.rows, case.settings
    loss, d_logp = 0.0, np.zeros_like(logp)
    d_entropy = -settings.entropy_coef * r["weight"]
    bound = settings.log_ratio_bound
    for t in range(len(logp)):
        scale, advantage = r["weight"][t] * r["correction"][t], r["advantage"][t]
        low, high = r["clip_low"][t], r["clip_high"][t]
        ratio, d_ratio = _bounded(logp[t] - r["old_logp"][t], bound)
        if name == "clipped":
            value, slope = _clipped(ratio, advantage, low, high, settings.dual_clip)
            d_logp[t] -= scale * slope * d_ratio
        elif name == "gspo":
            own = np.flatnonzero(case.index == case.index[t])
            s, d_s = _bounded(np.mean(logp[own] - r["old_logp"][own]), bound)
            value, slope = _clipped(s, advantage, low, high, None)
            d_logp[own] -= scale * slope * d_s / len(own)
        else:
            factor = min(max(ratio, 1 - low), 1 + high) if name == "cispo" else 1.0
            value = factor * advantage * logp[t]
            d_logp[t] -= scale * factor * advantage
        loss -= scale * value
        kl, d_kl = _kl(r["ref_logp"][t] - logp[t], settings.kl_estimator, bound)
        loss += settings.kl_coef * r["weight"][t] * kl - settings.entropy_coef * r["weight"][t] * entropy[t]
        d_logp[t] += settings.kl_coef * r["weight"][t] * d_kl
    return loss, d_logp, d_entropy
