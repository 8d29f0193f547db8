"""Whether the GPU has a kernel for attention over packed sequences."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch

from etr_megatron.errors import UserError
from etr_megatron.policy.model_config import uses_transformer_engine


def require_packed_attention(fields: Mapping[str, object], dtype: str) -> None:
    """Raise UserError if Transformer Engine has no such kernel on this GPU for any model. fields: `train.megatron`. dtype: the
    model's; in float32 no GPU has one.

    cuDNN's needs compute capability 9.0 or newer (`nvte_get_fused_attn_backend` of Transformer Engine 2.11), and
    `get_attention_backend` excludes 12.0. flash-attn's is for 8.0 and newer. Without either, Transformer Engine would store
    the scores of all pairs of a microbatch's tokens, silently.
    """
    if not uses_transformer_engine() or dtype == "float32" or fields.get("attention_backend") == "unfused":
        return
    capability = torch.cuda.get_device_capability()
    if (9, 0) <= capability != (12, 0) or importlib.util.find_spec("flash_attn") is not None:
        return
    raise UserError(
        f"Transformer Engine has no kernel for packed sequences on {torch.cuda.get_device_name()} (compute capability "
        f"{capability[0]}.{capability[1]}) without the package flash-attn: install it, or set "
        "train.megatron.attention_backend=unfused, whose memory grows with the square of a microbatch's tokens"
    )
