"""Fill in values that a config leaves open and that follow from others: the preset's, `parallel.tp: auto`, the transport of
weight syncs, and the time for servers to start and to answer."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from etr_megatron.config.presets import PRESETS
from etr_megatron.config.schema import Config, ObjectiveConfig, ParallelConfig, SglangConfig

T = TypeVar("T")

_SLOWEST = 10.0
"""Tokens per second at which a server decodes a long response at least."""

EVALUATED = ("eval.every", "data.eval", "rollout.only")
"""The keys that decide whether the run evaluates, and so whether `response_limits` has a limit for evaluations."""


def resolved(value: T | None) -> T:
    """The value of a field that cannot be null any more: `resolve` (for the objective, `fill_objective`) has filled it in."""
    assert value is not None
    return value


def fill_objective(objective: ObjectiveConfig) -> ObjectiveConfig:
    """`objective` with null fields filled in: fields that the preset defines get its value, and the KL estimator becomes one
    whose gradient pulls towards the reference for this `kl_in` (see `objective.kl_estimate`).

    Presets do not define `constant_length` and `dual_clip`, which stay unchanged.
    """
    preset = PRESETS[objective.preset]
    missing: dict[str, Any] = {
        f.name: preset[f.name] for f in fields(objective) if f.name in preset and getattr(objective, f.name) is None
    }
    filled = replace(objective, **missing)
    return replace(filled, kl_estimator=filled.kl_estimator or ("k1" if filled.kl_in == "reward" else "k3"))


def tensor_parallel(parallel: ParallelConfig, world_size: int) -> int:
    """The resolved `parallel.tp`; `auto` is two if there are at least two ranks per pipeline stage and CP rank, else one."""
    if parallel.tp != "auto":
        return parallel.tp
    return min(2, max(1, world_size // max(1, parallel.pp * parallel.cp)))


def response_limits(config: Config) -> dict[str, int]:
    """Maximum tokens of a response, by the key that sets it; an evaluation, if there is one, may have its own limit."""
    is_evaluated = config.eval.every and config.data.eval is not None and not config.rollout.only
    own = config.eval.max_response_tokens if is_evaluated else None
    limits = {"rollout.max_response_tokens": config.rollout.max_response_tokens}
    return limits if own is None else limits | {"eval.max_response_tokens": own}


def startup_timeout_of(config: SglangConfig) -> float:
    """`startup_timeout_s` with null resolved to the default. SGLang says that DeepGEMM compiles for 10 to 20 minutes."""
    return config.startup_timeout_s or (2400.0 if config.fp8 else 900.0)


def request_timeout_of(config: SglangConfig, longest: int = 0) -> float:
    """`request_timeout_s` with null resolved to the default. longest: maximum tokens of a response; `resolve` knows it, and has
    replaced null."""
    return config.request_timeout_s or max(1800.0, longest / _SLOWEST)


def sync_of(config: SglangConfig) -> str:
    """The transport of weight syncs, with null resolved to the default."""
    return config.sync or ("tensor" if config.placement == "colocated" else "broadcast")
