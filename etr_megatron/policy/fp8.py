"""FP8 with Transformer Engine: requirements, Megatron's options and token-count multiples."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch

from etr_megatron import platform
from etr_megatron.config import Fp8Config
from etr_megatron.config.schema.fp8 import FP8_TOKENS
from etr_megatron.errors import UserError

_FORMAT = {"blockwise": "e4m3", "tensorwise": "hybrid", "delayed": "hybrid", "mxfp8": "e4m3"}
"""Megatron's number format: `hybrid` uses e5m2 for gradients, whose range exceeds that of e4m3 with one scale per tensor."""

_SUPPORT = {"blockwise": "is_fp8_block_scaling_available", "mxfp8": "is_mxfp8_available"}
"""Transformer Engine's check for device support of a recipe; the other recipes need only general FP8 support."""


def require_fp8(fp8: Fp8Config) -> None:
    """Raise UserError if FP8 is requested without CUDA, without Transformer Engine (Megatron would silently train in bf16) or
    on a device that lacks the recipe; on CUDA, even without FP8, if Transformer Engine is installed but cannot be imported."""
    installed = importlib.util.find_spec("transformer_engine") is not None
    if fp8.recipe != "none" and not platform.uses_cuda():
        raise UserError(f"fp8.recipe={fp8.recipe} needs a GPU, and this job runs on CPU; set fp8.recipe=none")
    if fp8.recipe != "none" and not installed:
        raise UserError(
            f"fp8.recipe={fp8.recipe} needs Transformer Engine, which is not installed: pip install -e '.[gpu]', or set "
            "fp8.recipe=none"
        )
    if not installed or not platform.uses_cuda():
        return
    try:
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager  # the import that Megatron uses
    except ImportError as error:
        why = str(error).partition("\n")[0]
        raise UserError(
            f"Transformer Engine is installed but cannot be imported ({why}); build it for this torch and CUDA, or uninstall it"
        ) from error
    if fp8.recipe == "none":
        return
    supported, reason = getattr(FP8GlobalStateManager, _SUPPORT.get(fp8.recipe, "is_fp8_available"))()
    if not supported:
        raise UserError(f"fp8.recipe={fp8.recipe} cannot run on this device: {reason} Choose another, or set fp8.recipe=none")


def drop_weight_copies(chunks: Iterable[torch.nn.Module]) -> None:
    """Free the FP8 copies of bf16 weights that Transformer Engine's modules keep; the next forward pass makes them again."""
    for chunk in chunks:
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()


def fp8_options(fp8: Fp8Config, *, experts: bool) -> dict[str, Any]:
    """FP8 fields of Megatron's TransformerConfig; empty without FP8. experts: whether the model has experts."""
    if fp8.recipe == "none":
        return {}
    return dict(
        fp8=_FORMAT[fp8.recipe],
        fp8_recipe=fp8.recipe,
        fp8_param=fp8.param,
        first_last_layers_bf16=fp8.first_last_layers_bf16,
        # Experts get uneven numbers of tokens, which must be padded to multiples as well.
        moe_router_padding_for_quantization=experts,
        # The defaults of TE's delayed recipe; Megatron's default history length is 1.
        **(dict(fp8_amax_history_len=1024, fp8_amax_compute_algo="max") if fp8.recipe == "delayed" else {}),
    )


def token_multiple(fp8: Fp8Config, tp: int, *, sequence_parallel: bool) -> int:
    """The number that a context-parallel rank's token count must be a multiple of. Then the token count between tensor-parallel
    regions (1 / TP of it per rank with sequence parallelism) is a multiple of what the recipe needs."""
    return FP8_TOKENS[fp8.recipe] * (tp if sequence_parallel else 1)
