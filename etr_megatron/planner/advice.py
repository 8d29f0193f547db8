"""Which knob to turn: what the peak would be with one setting changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from etr_megatron.config import Config
from etr_megatron.errors import UserError
from etr_megatron.planner.memory import SERVER_FRACTION
from etr_megatron.planner.plan import Plan, make_plan


@dataclass(frozen=True)
class Suggestion:
    """setting: as an override. peak: bytes of the tightest rank with it. step: seconds. fits: whether it then fits."""

    setting: str
    peak: int
    step: float
    fits: bool


def suggestions(config: Config, plan: Plan, **options: Any) -> list[Suggestion]:
    """Single changes: of a plan that does not fit those that lower the peak or make servers fit, those that then fit first and
    the fastest of them first; of one that fits those that fit as well and save at least one step in a hundred.

    config: as it was planned, unresolved. options: of `make_plan`.
    """
    found = []
    for setting, changed in _changes(plan, config):
        try:
            other = make_plan(changed, plan.cluster.gpus, **options)
        except UserError:
            continue
        helps = other.tightest.peak < plan.tightest.peak or other.server_fits > plan.server_fits
        if plan.fits:
            helps = other.fits and other.time.step < 0.99 * plan.time.step
        if helps:
            found.append(Suggestion(setting, other.tightest.peak, other.time.step, other.fits))
    return sorted(found, key=lambda s: (not s.fits, s.step if s.fits else s.peak))


def _changes(plan: Plan, config: Config) -> Iterator[tuple[str, Config]]:
    """(override, config with it)."""
    now = plan.config
    train, parallel, longest = now.train, now.parallel, now.data.max_prompt_tokens + now.rollout.max_response_tokens
    wanted: list[tuple[str, str, Any]] = []
    wanted.append(("train", "recompute", "none" if train.recompute == "full" else "full"))
    if not train.distributed_optimizer:
        wanted.append(("train", "distributed_optimizer", True))
    if train.grads_dtype == "float32" and now.model.dtype == "bfloat16":
        wanted.append(("train", "grads_dtype", "bfloat16"))
    if train.distributed_optimizer and not train.optimizer_offload:
        wanted.append(("train", "optimizer_offload", True))
    if train.tokens_per_microbatch > longest:
        wanted.append(("train", "tokens_per_microbatch", max(longest, train.tokens_per_microbatch // 2)))
    if not plan.fits:
        # What more splitting costs in time is not modelled, so it is never said to be faster.
        sizes = {"tp": 2 * int(parallel.tp), "pp": 2 * parallel.pp, "cp": 2 * parallel.cp}
        wanted += [("parallel", k, v) for k, v in sizes.items() if k != "tp" or v <= plan.cluster.ranks_per_node]
        if parallel.tp != 1 and not parallel.sequence_parallel:
            wanted.append(("parallel", "sequence_parallel", True))
    if now.rollout.backend == "embedded" and now.rollout.batch_samples > 1:
        wanted.append(("rollout", "batch_samples", now.rollout.batch_samples // 2))
    if now.rollout.backend == "sglang" and not now.sglang.urls:
        fraction = SERVER_FRACTION if now.sglang.mem_fraction is None else now.sglang.mem_fraction
        wanted += [("sglang", "mem_fraction", round(fraction + step, 2)) for step in (-0.1, 0.1) if 0 < fraction + step < 1]
    for section, key, value in wanted:
        text = str(value).lower() if isinstance(value, bool) else value
        yield f"{section}.{key}={text}", replace(config, **{section: replace(getattr(config, section), **{key: value})})
