"""Resolve values that a user may leave open (`auto`, null), once the machine is known."""

from __future__ import annotations

from dataclasses import replace

from etr_megatron.config.defaults import fill_objective, request_timeout_of, response_limits, tensor_parallel
from etr_megatron.config.invalid import InvalidConfigError
from etr_megatron.config.rules import megatron, train
from etr_megatron.config.schema import Config
from etr_megatron.config.validate import render, validate

LOGPROB_GAP_LIMIT = {"float32": 1e-4, "bfloat16": 5e-2, "fp8": 0.2}
"""Mean gap between rollout and trainer log-probs (nats per token) above which the first step is refused. `fp8`: if the servers,
the trainer or both compute in FP8; docs/rollout.md explains this value."""


def resolve(config: Config, world_size: int, *, cuda: bool) -> Config:
    """A config without `auto`, with null fields of the objective, a null limit of the log-prob gap and a null
    timeout of requests filled in.

    Remaining nulls mean what the schema says: "none", "off", or that the code using the value chooses.
    world_size: ranks in the job, at least 1. cuda: whether this machine has a CUDA device.
    Raises InvalidConfigError, which lists every violated constraint, including those of the layout on `world_size` ranks and
    `run.platform: cuda` without a device.
    """
    problems = validate(config, world_size)
    if config.run.platform == "cuda" and not cuda:
        problems.append('run.platform = "cuda": this machine has no CUDA device; set run.platform=cpu')
    if config.run.platform == "cpu" or not cuda:
        problems += [render(violation, config) for rule in (train.on_cpu, megatron.on_cpu) for violation in rule(config)]
    if problems:
        raise InvalidConfigError(f"invalid configuration on {world_size} ranks", problems, config)

    platform = ("cuda" if cuda else "cpu") if config.run.platform == "auto" else config.run.platform
    dtype = ("bfloat16" if platform == "cuda" else "float32") if config.model.dtype == "auto" else config.model.dtype
    objective = fill_objective(config.objective)
    if objective.constant_length is None:
        objective = replace(objective, constant_length=config.rollout.max_response_tokens)
    gap = config.rollout.max_logprob_gap
    is_fp8 = config.fp8.recipe != "none" or (config.rollout.backend == "sglang" and config.sglang.fp8)
    longest = max(response_limits(config).values())
    return replace(
        config,
        run=replace(config.run, platform=platform),
        model=replace(config.model, dtype=dtype),
        parallel=replace(config.parallel, tp=tensor_parallel(config.parallel, world_size)),
        objective=objective,
        rollout=replace(config.rollout, max_logprob_gap=LOGPROB_GAP_LIMIT["fp8" if is_fp8 else dtype] if gap is None else gap),
        sglang=replace(config.sglang, request_timeout_s=request_timeout_of(config.sglang, longest)),
    )
