"""Rules about the optimization."""

from __future__ import annotations

from collections.abc import Iterator

from etr_megatron.config.rules.violation import Violation
from etr_megatron.config.schema import Config


def train(config: Config) -> Iterator[Violation]:
    """The optimization."""
    train = config.train
    if train.head_chunk_rows is not None and train.head_chunk_rows < 1:
        yield Violation(("train.head_chunk_rows",), "must be at least 1, or null to choose by device")
    if train.min_lr > train.lr:
        yield Violation(("train.min_lr", "train.lr"), "min_lr must not exceed lr")
    if min(train.minibatches, train.epochs, config.run.steps) >= 1:
        updates = config.run.steps * train.epochs * train.minibatches
        if train.lr_warmup_updates >= updates:
            yield Violation(
                ("train.lr_warmup_updates", "run.steps", "train.epochs", "train.minibatches"),
                f"the warm-up must end before the run, which has {updates} optimizer steps; lower lr_warmup_updates",
            )
    if train.overlap_param_gather and not (train.distributed_optimizer and train.overlap_grad_reduce):
        yield Violation(
            ("train.overlap_param_gather", "train.distributed_optimizer", "train.overlap_grad_reduce"),
            "overlap_param_gather needs distributed_optimizer and overlap_grad_reduce; set all three to true, or "
            "overlap_param_gather to false",
        )
    if train.optimizer_offload and not train.distributed_optimizer:
        yield Violation(
            ("train.optimizer_offload", "train.distributed_optimizer"),
            "only the distributed optimizer can be offloaded; set distributed_optimizer to true, or optimizer_offload to false",
        )
    if train.optimizer_offload and config.model.dtype == "float32":
        yield Violation(
            ("train.optimizer_offload", "model.dtype"),
            "Megatron can offload the optimizer only for bfloat16 weights; set model.dtype to bfloat16 or auto",
        )
    if train.offload_for_rollout and not train.distributed_optimizer:
        yield Violation(
            ("train.offload_for_rollout", "train.distributed_optimizer"),
            "only the distributed optimizer can be offloaded; set distributed_optimizer to true, or offload_for_rollout to "
            "false",
        )
    if train.offload_for_rollout and config.sglang.placement != "colocated":
        yield Violation(
            ("train.offload_for_rollout", "sglang.placement"),
            "only colocated servers need the GPU memory; set offload_for_rollout to false",
        )
    if train.grads_dtype == "bfloat16" and config.model.dtype == "float32":
        yield Violation(
            ("train.grads_dtype", "model.dtype"),
            "the gradients of a float32 model are float32; set grads_dtype to float32",
        )


def fp8(config: Config) -> Iterator[Violation]:
    """Training in FP8."""
    fp8 = config.fp8
    if fp8.recipe == "none":
        for name in ("first_last_layers_bf16", "param"):
            if getattr(fp8, name):
                yield Violation(
                    (f"fp8.{name}", "fp8.recipe"), f"there is no FP8 without a recipe; choose one, or set {name} to false"
                )
        return
    if config.model.dtype == "float32":
        yield Violation(
            ("fp8.recipe", "model.dtype"),
            "FP8 training needs a bfloat16 model; set model.dtype to bfloat16 or auto",
        )
    if fp8.recipe == "delayed" and fp8.first_last_layers_bf16:
        yield Violation(
            ("fp8.recipe", "fp8.first_last_layers_bf16"),
            "Megatron's delayed scaling applies to all layers; set first_last_layers_bf16 to false",
        )
    if fp8.recipe == "mxfp8" and fp8.param:
        yield Violation(("fp8.recipe", "fp8.param"), "weights held in FP8 are not supported with mxfp8; set fp8.param to false")
    if fp8.param and not config.train.distributed_optimizer:
        yield Violation(
            ("fp8.param", "train.distributed_optimizer"),
            "only the distributed optimizer updates weights that are held in FP8; set distributed_optimizer to true, or "
            "param to false",
            given=("fp8.recipe",),
        )
    if fp8.param and config.train.optimizer_offload:
        yield Violation(
            ("fp8.param", "train.optimizer_offload"),
            "the offloaded optimizer updates only bfloat16 weights; set one of the two to false",
            given=("fp8.recipe",),
        )


def on_cpu(config: Config) -> Iterator[Violation]:
    """Settings that need CUDA."""
    if config.fp8.recipe != "none":
        yield Violation(("fp8.recipe",), "FP8 needs a GPU, and this job runs on CPU; set fp8.recipe to none")
    if config.train.optimizer_offload:
        yield Violation(
            ("train.optimizer_offload",),
            "there is no GPU memory to offload from on CPU; set optimizer_offload to false",
        )
    if config.train.grads_dtype == "bfloat16" and config.model.dtype == "auto":
        yield Violation(
            ("train.grads_dtype", "model.dtype"),
            "the model is float32 on CPU, and so are its gradients; set grads_dtype to float32, or dtype to bfloat16",
        )
