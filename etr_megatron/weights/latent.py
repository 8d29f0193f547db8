"""A model's multi-head latent attention (MLA, arXiv 2405.04434) from its HuggingFace config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etr_megatron.errors import UserError
from etr_megatron.weights.hf_config import positive_int, spelled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose keys and values are projected up from one latent per token. A server caches only this latent.

    A head's query and key have `nope_dim` dimensions without a position and `rope_dim` that the rotary embedding rotates. The
    rotated part of the key is shared by all heads and cached beside the latent of width `kv_rank`. value_dim: size of a head's
    value. q_rank: width of the queries' latent; None if queries are projected directly from the hidden states.
    """

    kv_rank: int
    q_rank: int | None
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def head_dim(self) -> int:
        """Dimensions of a head's query, and of its key."""
        return self.nope_dim + self.rope_dim

    @property
    def up_dim(self) -> int:
        """Dimensions of a head's key and value that are projected up from the latent."""
        return self.nope_dim + self.value_dim

    @property
    def cached_dim(self) -> int:
        """Elements that a server caches per token and layer, independent of the number of heads and of the server's ranks."""
        return self.kv_rank + self.rope_dim


def read_latent_attention(config: dict[str, Any], source: Path) -> LatentAttention:
    """source: the file, for messages. Raises UserError for missing, malformed or unsupported values."""
    if config.get("rope_interleave", True) is not True:
        raise UserError(f"{source}: rope_interleave is {spelled(config['rope_interleave'])}; only true is supported")
    rope_dim = positive_int(config, "qk_rope_head_dim", source)
    if rope_dim % 2:
        raise UserError(f"{source}: qk_rope_head_dim is {rope_dim}, but a rotary embedding turns pairs of dimensions")
    if config.get("head_dim") not in (None, rope_dim):  # transformers writes it, and prefers it
        raise UserError(
            f"{source}: head_dim is {spelled(config['head_dim'])}; only {rope_dim}, as qk_rope_head_dim, is supported"
        )
    at_once = config.get("q_lora_rank", 0) is None
    return LatentAttention(
        kv_rank=positive_int(config, "kv_lora_rank", source),
        q_rank=None if at_once else positive_int(config, "q_lora_rank", source),
        nope_dim=positive_int(config, "qk_nope_head_dim", source),
        rope_dim=rope_dim,
        value_dim=positive_int(config, "v_head_dim", source),
    )


def use_norm_eps(model: PreTrainedModel) -> None:
    """Give the latents' norms of a transformers model the `rms_norm_eps` of its config, as servers and Megatron do;
    transformers leaves them at 1e-6."""
    for name, module in model.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = model.config.rms_norm_eps
