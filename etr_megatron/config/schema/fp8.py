"""Training in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FP8_TOKENS = {"none": 1, "blockwise": 128, "tensorwise": 16, "delayed": 16, "mxfp8": 32}
"""Token counts must be multiples of it, by recipe: of the blocks, else of what FP8 products need."""


@dataclass(frozen=True)
class Fp8Config:
    """Training in FP8 with Transformer Engine (CUDA only)."""

    recipe: Literal["none", "blockwise", "tensorwise", "delayed", "mxfp8"] = "none"
    """How tensors are scaled: none is no FP8; blockwise (128 x 128, Hopper) is what rollout servers in FP8 compute with; mxfp8
    needs Blackwell; delayed takes its scales from earlier updates, so that log-probs before the first one are poor."""
    first_last_layers_bf16: bool = False
    """Keep the first and the last layer in bfloat16."""
    param: bool = False
    """Hold the weights themselves in FP8, beside the optimizer's fp32 copies (which then start from the rounded weights)."""
