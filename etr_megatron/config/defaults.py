"""Values that a config leaves open and that other values decide: the preset's, and `parallel.tp: auto`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from etr_megatron.config.presets import PRESETS
from etr_megatron.config.schema import Config, ObjectiveConfig, ParallelConfig

T = TypeVar("T")


def resolved(value: T | None) -> T:
    """The value of a field that `resolve` (one of the objective: `fill_objective`) has filled in where it was null."""
    assert value is not None
    return value


def fill_objective(objective: ObjectiveConfig) -> ObjectiveConfig:
    """`objective` with every null field that its preset names set to the preset's value, and the estimator of the KL to the one
    that pulls to the reference where that KL goes (see `objective.kl_estimate`).

    `constant_length` and `dual_clip` are no preset's business and stay as they are.
    """
    preset = PRESETS[objective.preset]
    missing: dict[str, Any] = {
        f.name: preset[f.name] for f in fields(objective) if f.name in preset and getattr(objective, f.name) is None
    }
    filled = replace(objective, **missing)
    return replace(filled, kl_estimator=filled.kl_estimator or ("k1" if filled.kl_in == "reward" else "k3"))


def tensor_parallel(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks that share a layer; `auto` is two where the world has two to spare for every pipeline stage, else one."""
    if parallel.tp != "auto":
        return parallel.tp
    return min(2, max(1, world_size // max(1, parallel.pp * parallel.cp)))


def response_limits(config: Config) -> dict[str, int]:
    """Most tokens of a response, by the key that says so: an evaluation, where there is any, may have a limit of its own."""
    own = config.eval.max_response_tokens if config.eval.every and config.data.eval is not None else None
    limits = {"rollout.max_response_tokens": config.rollout.max_response_tokens}
    return limits if own is None else limits | {"eval.max_response_tokens": own}
