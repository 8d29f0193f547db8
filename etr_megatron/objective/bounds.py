"""Elastic trust regions: a sample's clip range scales with its advantage's magnitude and its group's variance.

    eps_i^{lo|hi} = clamp( eps0^{lo|hi} * micro(|A_i|) * macro(v_g), eps_min, eps_max )

This is a **reconstruction** from the abstract of Zhang et al., "ETR: Outcome-Guided Elastic Trust Regions for Policy
Optimization" (arXiv 2601.03723): at the micro level, the boundary scales with the advantage's magnitude; at the macro level,
group variance gives a larger budget to prompts in the optimal learning zone. The paper's equations were not available.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ElasticBounds:
    """The bounds' parameters; alpha = gamma = 0 (or both forms `none`) is GRPO, bit for bit.

    micro: `tanh` 1 + alpha * tanh(|A| - 1), `linear` |A|, `none` 1.
    macro: `variance` 1 - gamma + gamma * v, `inverse_variance` 1 - gamma * v (a control), `std` sqrt(v), `none` 1.
    """

    micro: str
    macro: str
    alpha: float
    gamma: float
    eps_low: float
    eps_high: float
    eps_min: float
    eps_max: float

    def __call__(self, advantage: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Clip radii below and above 1, each float64 [N] like `advantage`, detached.

        advantage: A_i. variance: v_g in [0, 1] of each sample's group.
        """
        with torch.no_grad():
            scale = self._micro(advantage.abs()) * self._macro(variance)
            low = (self.eps_low * scale).clamp(self.eps_min, self.eps_max)
            high = (self.eps_high * scale).clamp(self.eps_min, self.eps_max)
        return low, high

    def _micro(self, magnitude: Tensor) -> Tensor:
        if self.micro == "tanh":
            return 1 + self.alpha * torch.tanh(magnitude - 1)
        if self.micro == "linear":
            return magnitude
        if self.micro == "none":
            return torch.ones_like(magnitude)
        raise ValueError(f"objective.micro is {self.micro!r}; known: tanh, linear, none")

    def _macro(self, variance: Tensor) -> Tensor:
        if self.macro == "variance":
            return 1 - self.gamma + self.gamma * variance
        if self.macro == "inverse_variance":
            return 1 - self.gamma * variance
        if self.macro == "std":
            return variance.sqrt()
        if self.macro == "none":
            return torch.ones_like(variance)
        raise ValueError(f"objective.macro is {self.macro!r}; known: variance, inverse_variance, std, none")
