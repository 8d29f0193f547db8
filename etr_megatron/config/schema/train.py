"""Optimisation of the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of the policy."""

    minibatches: int = 4
    """Minibatches of whole groups that `rollout.prompts_per_step` is split into; each is one optimizer step."""
    epochs: int = 1
    """Passes over a rollout; a rollout gives `epochs * minibatches` optimizer steps."""
    tokens_per_microbatch: int = 4096
    """Token budget of one packed microbatch, on all its context-parallel ranks; a longer sample gets one of its own."""
    lr: float = 1e-6
    """Peak learning rate of Adam."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_updates: int = 0
    """Linear warm-up from zero, in optimizer steps; the first one's learning rate is 0."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up, over the whole run."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Adam's first decay rate."""
    adam_beta2: float = 0.95
    """Adam's second decay rate."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm limit; 0 is off."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, core attention only (with flash attention more is kept, not less), or whole layers."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights over data-parallel ranks while the forward pass goes on (with the distributed optimizer)."""
    grads_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that gradients are summed in over microbatches and ranks; bfloat16 halves them, for a bfloat16 model."""
    optimizer_offload: bool = False
    """Keep optimizer state and update in CPU memory (CUDA only)."""
    moe_aux_loss_coef: float = 0.0
    """Weight of the experts' load-balancing loss, averaged over tokens (models with experts); 0 is off."""
    moe_router_fp32: bool = False
    """Compute the router's product in float32 whatever the model's type (models with experts)."""
    routing_replay: bool = False
    """Train every token with the experts that the engine chose for it (models with experts; Rollout Routing Replay, arXiv
    2510.11370): the engine and all updates of a step then choose alike, whatever they round. Servers at `sglang.urls` need
    `--enable-return-routed-experts`."""
    head_chunk_rows: int | None = None
    """Loss rows per chunk of the LM head: `rows x V/TP` fp32 logits exist at a time, twice that with TP on CUDA; null is at
    most 384 on CPU, 1024 on CUDA."""
