"""Low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass

LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
"""The linear modules of every model family, by the last part of their HuggingFace name: those that FP8 quantises, too."""


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank adapters (LoRA, arXiv 2106.09685) instead of the weights."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights. An adapted matrix is W + alpha / rank * B A, and only B and A are trained,
    in float32."""
    alpha: float = 32.0
    """Scale of the adapters' product, which is divided by their rank."""
    targets: tuple[str, ...] = ()
    """The linear modules that are adapted, by the last part of their name, such as `[q_proj, v_proj]`; empty is all of them.
    Embeddings, the head, norms and routers are never trained."""
    expert_rank: int | None = None
    """Rank of the adapters of routed experts (models with experts): null is `rank`, 0 leaves experts as they are."""
    offload_base: bool = True
    """Keep the adapted matrices' original values, from which every update starts, in CPU memory. Otherwise they take as much
    GPU memory as the matrices."""
