"""The rules: functions of a `Config` that yield every `Violation`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from etr_megatron.config.rules import inputs, lora, megatron, objective, parallel, rollout, train, values
from etr_megatron.config.rules.violation import Violation, get
from etr_megatron.config.schema import Config

RULES: tuple[Callable[[Config], Iterator[Violation]], ...] = (
    values.bounds,
    inputs.run,
    inputs.tiny,
    inputs.arithmetic,
    inputs.data,
    inputs.environment,
    inputs.reward,
    rollout.rollout,
    rollout.asynchronous,
    rollout.recorded,
    rollout.sglang,
    objective.objective,
    objective.clip_range,
    train.train,
    train.fp8,
    megatron.megatron,
    lora.lora,
    parallel.parallel,
)
"""Rules that apply to every config; `parallel.layout` also needs the number of ranks."""

WARNING_RULES: tuple[Callable[[Config], Iterator[Violation]], ...] = (
    objective.off_policy,
    objective.stale,
    inputs.observation,
)
"""Rules for settings that work but are probably unintended: they cause a warning at the start of a run, not an error."""

__all__ = ["RULES", "WARNING_RULES", "Violation", "get", "megatron", "parallel", "train"]
