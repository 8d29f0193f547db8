"""Rules about low-rank adapters."""

from __future__ import annotations

from collections.abc import Iterator

from etr_megatron.config.rules.violation import Violation
from etr_megatron.config.schema import Config
from etr_megatron.config.schema.lora import LORA_TARGETS


def lora(config: Config) -> Iterator[Violation]:
    """Low-rank adapters."""
    lora = config.lora
    if lora.expert_rank is not None and lora.expert_rank < 0:
        yield Violation(("lora.expert_rank",), "must be at least 0, or null for rank")
    unknown = [name for name in lora.targets if name not in LORA_TARGETS]
    if unknown:
        yield Violation(
            ("lora.targets",), f"no linear module is called {', '.join(unknown)}; choose from {', '.join(LORA_TARGETS)}"
        )
    if len(set(lora.targets)) < len(lora.targets):
        yield Violation(("lora.targets",), "must not repeat a name")
    if lora.rank < 1:
        if lora.expert_rank:
            yield Violation(
                ("lora.expert_rank", "lora.rank"), "without a rank all weights are trained; set rank, or expert_rank to null"
            )
        if lora.targets:
            yield Violation(("lora.targets", "lora.rank"), "without a rank all weights are trained; set rank, or targets to []")
        return
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(config.train, name):
            yield Violation(
                (f"train.{name}", "lora.rank"),
                f"there is nothing to overlap with the few weights of adapters; set {name} to false",
            )
    if config.train.grads_dtype == "bfloat16":
        yield Violation(
            ("train.grads_dtype", "lora.rank"), "adapters and their gradients are float32; set grads_dtype to float32"
        )
    if config.train.moe_freeze_router:
        yield Violation(
            ("train.moe_freeze_router", "lora.rank"), "adapters never train the routers; set moe_freeze_router to false"
        )
    if config.train.optimizer_offload:
        yield Violation(
            ("train.optimizer_offload", "lora.rank"),
            "Megatron can offload the optimizer only for bfloat16 weights, and adapters are float32; set optimizer_offload to "
            "false",
        )
    if config.fp8.param:
        yield Violation(
            ("fp8.param", "lora.rank"),
            "weights held in FP8 cannot be merged with adapters; set fp8.param to false",
            given=("fp8.recipe",),
        )
