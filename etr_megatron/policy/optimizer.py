"""Map the config to Megatron's gradient buffers, Adam and learning-rate schedule."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from etr_megatron import platform
from etr_megatron.config import Config
from etr_megatron.policy.megatron_fields import fields_of
from etr_megatron.policy.model_config import DTYPES


def wrap_chunks(
    chunks: Sequence[torch.nn.Module], megatron: TransformerConfig, config: Config
) -> list[DistributedDataParallel]:
    """Wrap every chunk in Megatron's DDP, which reduces gradients over data- and context-parallel ranks."""
    train = config.train
    options = DistributedDataParallelConfig(
        **fields_of("ddp", train.megatron),
        grad_reduce_in_fp32=train.grads_dtype == "float32",
        use_distributed_optimizer=train.distributed_optimizer,
        overlap_grad_reduce=train.overlap_grad_reduce,
        overlap_param_gather=train.overlap_param_gather,
        check_for_nan_in_grad=False,  # `check_gradients_finite` looks, after the loss has been looked at on every rank
        fp8_param_gather=config.fp8.param,
    )
    # Reductions of later chunks overlap with other chunks' compute anyway; one bucket means fewer of them.
    return [
        DistributedDataParallel(megatron, options, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)
    ]


def optimizer_config(config: Config) -> OptimizerConfig:
    """Megatron's config for Adam."""
    train = config.train
    # Adapters are fp32 in a model of any type, and Megatron's optimizer for bf16 cannot store the state of such parameters.
    dtype = "float32" if config.lora.rank else config.model.dtype
    return OptimizerConfig(
        **fields_of("optimizer", train.megatron),
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        # With an infinite limit Megatron computes the norm but never scales gradients; with 0 it would not compute the norm.
        clip_grad=train.clip_grad or float("inf"),
        bf16=dtype == "bfloat16",
        params_dtype=DTYPES[dtype],
        use_distributed_optimizer=train.distributed_optimizer,
        overlap_param_gather=train.overlap_param_gather,
        optimizer_cpu_offload=train.optimizer_offload,
        optimizer_offload_fraction=1.0 if train.optimizer_offload else 0.0,
        use_precision_aware_optimizer=train.optimizer_offload,
        fp8_recipe=None if config.fp8.recipe == "none" else config.fp8.recipe,
    )


def build_optimizer(chunks: Sequence[DistributedDataParallel], config: Config) -> Any:
    """Megatron's optimizer of wrapped chunks; a collective."""
    if config.train.optimizer_offload and platform.uses_cuda():
        # By default torchrun gives a rank one thread, and then an update takes seconds per 10^9 weights.
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(torch.get_num_threads(), cores))
    optimizer: Any = get_megatron_optimizer(optimizer_config(config), [*chunks], use_gloo_process_groups=False)
    if config.lora.rank and len(optimizer.chained_optimizers) > 1:
        # Megatron makes an optimizer for dense weights even if no rank trains any, and cannot write that stub to a checkpoint.
        optimizer.chained_optimizers = [one for one in optimizer.chained_optimizers if not one.is_stub_optimizer]
    return optimizer


def lr_scheduler(optimizer: Any, config: Config) -> OptimizerParamScheduler:
    """Warmup and decay over the whole run."""
    train = config.train
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.lr_warmup_updates,
        lr_decay_steps=config.run.steps * train.epochs * train.minibatches,
        lr_decay_style=train.lr_decay,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
