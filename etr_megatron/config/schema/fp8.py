"""Training in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FP8_BLOCK = 128
"""Rows and columns of a block that shares a scale, in servers and in every published FP8 checkpoint."""

FP8_TOKENS = {"none": 1, "blockwise": 128, "tensorwise": 16, "delayed": 16, "mxfp8": 32}
"""Per recipe, the number that token counts must be a multiple of: the block size, or what FP8 products need."""


@dataclass(frozen=True)
class Fp8Config:
    """Training in FP8 with Transformer Engine (CUDA only)."""

    recipe: Literal["none", "blockwise", "tensorwise", "delayed", "mxfp8"] = "none"
    """Scaling of tensors; `none` is no FP8. `blockwise` (128 x 128; on Blackwell with powers of two as scales) is also what FP8
    rollout servers use; `mxfp8` needs Blackwell. `delayed` takes scales from earlier updates, so log-probs before the first
    update are poor."""
    first_last_layers_bf16: bool = False
    """Keep the first and last layer in bfloat16."""
    param: bool = False
    """Hold the weights themselves in FP8, beside the optimizer's fp32 copies. These then start from the rounded weights."""
