"""Optimisation of the policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of the policy."""

    minibatches: int = 4
    """Minibatches of whole groups per rollout step; must divide `rollout.prompts_per_step`. Each is one optimizer step."""
    epochs: int = 1
    """Passes over a rollout, which has `epochs * minibatches` optimizer steps."""
    tokens_per_microbatch: int = 4096
    """Token budget of a packed microbatch, over all context-parallel ranks. A longer sample gets its own microbatch."""
    lr: float = 1e-6
    """Peak learning rate of Adam."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_updates: int = 0
    """Optimizer steps of linear warm-up from zero; the first step has a learning rate of 0."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up, over the whole run."""
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
    """Shard optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation. `selective`: core attention only, which with flash attention keeps more memory, not less.
    `full`: whole layers."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction over data-parallel ranks with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the gathering of updated weights over data-parallel ranks with the forward pass. Needs `distributed_optimizer`
    and `overlap_grad_reduce`."""
    grads_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed over microbatches and ranks. bfloat16 halves their memory; it needs a bfloat16
    model."""
    optimizer_offload: bool = False
    """Keep the optimizer state in CPU memory, and update there (CUDA only)."""
    offload_for_rollout: bool = False
    """While colocated servers have the GPUs, keep the optimizer state in CPU memory and free the gradients' buffers, so that
    `sglang.mem_fraction` can be larger. Needs `distributed_optimizer`; with a float32 model, less memory is freed."""
    moe_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss of experts, averaged over tokens (models with experts); 0 is off."""
    moe_router_fp32: bool = False
    """Compute the router's matrix product in float32, whatever the model's type (models with experts). Always the case for
    GLM-4.5, GLM-4.7-Flash and DeepSeek-V3."""
    moe_freeze_router: bool = False
    """Do not train the routers (models with experts)."""
    routing_replay: bool = False
    """Train every token with the experts that the engine chose for it (Rollout Routing Replay, arXiv 2510.11370; models with
    experts). Rounding then no longer changes the choice. Servers at `sglang.urls` need `--enable-return-routed-experts`."""
    head_chunk_rows: int | None = None
    """Loss rows per chunk of the LM head. `rows x V/TP` fp32 logits exist at a time, with TP on CUDA twice that. null is at
    most 384 on CPU and 1024 on CUDA."""
    megatron: dict[str, bool | int | float | tuple[str, ...] | str] = field(default_factory=dict)
    """Fields of Megatron's own configs for which there is no key here, such as `{recompute_granularity: full, recompute_method:
    block, recompute_num_layers: 8}`. `train.megatron.moe_permute_fusion=true` sets one. Which, and what they do:
    [Fields of Megatron](#fields-of-megatron)."""
