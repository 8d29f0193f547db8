"""Suggest settings: the peak memory and step time with one setting changed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from etr_megatron.config import Config, SglangConfig
from etr_megatron.config.megatron_fields import FIELDS, RECOMPUTATION
from etr_megatron.errors import UserError
from etr_megatron.planner.cluster import Cluster
from etr_megatron.planner.memory import SERVER_FRACTION
from etr_megatron.planner.plan import Plan, make_plan

UNCOUNTED = ("parallel.", "train.optimizer_offload", "sglang.dp_attention")
"""Settings whose cost in time is not modeled (more communication, an update on the CPU, groups of GPUs that wait for the one
with the most tokens). They are listed after settings with a known time."""


ADAPTERS_RANK = 32
"""Rank of the adapters that are suggested."""


@dataclass(frozen=True)
class Suggestion:
    """setting: one override, or several separated by spaces. peak: bytes of the tightest rank with it. fits: whether the config
    then fits. step: seconds if it does."""

    setting: str
    peak: int
    fits: bool
    step: float = inf

    @property
    def is_counted(self) -> bool:
        """Whether `step` includes the setting's full cost; else it is a lower bound."""
        return not self.setting.startswith(UNCOUNTED)


def suggestions(config: Config, plan: Plan, **options: Any) -> list[Suggestion]:
    """Single changes that help; which these are depends on the plan.

    - The plan does not fit: changes that lower the peak of ranks that do not fit, or make servers fit. If none of them makes
      the plan fit but low-rank adapters do, training adapters is suggested too.
    - The plan fits: changes that also fit and save at least 1% of the step time.

    Changes that fit come first, and among them changes with a known cost, sorted by time.

    config: the planned config, unresolved. options: see `make_plan`.
    """
    tried = (_tried(setting, changed, plan, options) for setting, changed in _changes(plan, config))
    found = [suggestion for suggestion in tried if suggestion]
    if not plan.fits and not config.lora.rank and not any(suggestion.fits for suggestion in found):
        adapters = _tried(*_with_adapters(config), plan, options)
        found += [adapters] if adapters and adapters.fits else []
    return sorted(found, key=lambda s: (not s.fits, s.fits and not s.is_counted, s.step if s.fits else s.peak))


def _tried(setting: str, changed: Config, plan: Plan, options: dict[str, Any]) -> Suggestion | None:
    """The suggestion of a changed config; None if it is not valid or does not help."""
    try:
        other = make_plan(changed, plan.cluster.gpus, **options)
    except UserError:
        return None
    lower = not plan.ranks_fit and other.tightest.peak < plan.tightest.peak
    helps = lower or other.server_fits > plan.server_fits
    if plan.fits:
        helps = other.fits and other.time.step < 0.99 * plan.time.step
    step = other.time.step if helps and other.fits else inf
    return Suggestion(setting, other.tightest.peak, other.fits, step) if helps else None


def _with_adapters(config: Config) -> tuple[str, Config]:
    """(overrides, config with them) that train adapters and reset settings that adapters rule out."""
    train: dict[str, Any] = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    train |= {"grads_dtype": "float32", "optimizer_offload": False, "moe_freeze_router": False}
    train = {key: value for key, value in train.items() if getattr(config.train, key) != value}
    reset = [f"train.{key}" for key in train]
    train |= _without_fields(config, [name for name, field in FIELDS.items() if field.void_at and field.void_at[0] in reset])
    lora = replace(config.lora, rank=ADAPTERS_RANK)
    fp8: dict[str, Any] = {"param": False} if config.fp8.param else {}
    texts = [f"lora.rank={ADAPTERS_RANK}", *filter(None, (_overrides("train", train), _overrides("fp8", fp8)))]
    return " ".join(texts), replace(config, lora=lora, train=replace(config.train, **train), fp8=replace(config.fp8, **fp8))


def _without_fields(config: Config, names: Collection[str]) -> dict[str, Any]:
    """A change of the section train that drops these fields of Megatron; empty if none of them is set."""
    fields = config.train.megatron
    return {} if fields.keys().isdisjoint(names) else {"megatron": {key: fields[key] for key in fields if key not in names}}


def _overrides(section: str, values: dict[str, Any]) -> str:
    """Changes of a section as overrides, without a space in any of them."""
    texts = (value if isinstance(value, str) else json.dumps(value, separators=(",", ":")) for value in values.values())
    return " ".join(f"{section}.{key}={text}" for key, text in zip(values, texts, strict=True))


def _changes(plan: Plan, config: Config) -> Iterator[tuple[str, Config]]:
    """(override, config with it)."""
    now = plan.config
    train, rollout, longest = now.train, now.rollout, plan.work.longest
    recompute = {"recompute": "none"} if train.recompute == "full" else {"recompute": "full"}
    wanted: list[tuple[str, dict[str, Any]]] = [("train", recompute | _without_fields(config, RECOMPUTATION))]
    if not train.distributed_optimizer:
        wanted.append(("train", {"distributed_optimizer": True}))
    if train.grads_dtype == "float32" and now.model.dtype == "bfloat16":
        wanted.append(("train", {"grads_dtype": "bfloat16"}))
    if train.distributed_optimizer and not train.optimizer_offload:
        wanted.append(("train", {"optimizer_offload": True}))
    if train.distributed_optimizer and now.sglang.placement == "colocated" and not train.offload_for_rollout:
        wanted.append(("train", {"offload_for_rollout": True}))
    if train.tokens_per_microbatch > longest:
        wanted.append(("train", {"tokens_per_microbatch": max(longest, train.tokens_per_microbatch // 2)}))
    if now.lora.rank:
        wanted.append(("lora", {"offload_base": not now.lora.offload_base}))
    if rollout.backend == "embedded" and rollout.batch_samples > 1:
        wanted.append(("rollout", {"batch_samples": rollout.batch_samples // 2}))
    if not plan.fits:
        wanted += _splits(plan)
    if rollout.backend == "sglang" and not now.sglang.urls:
        wanted += _servers(plan)
    for section, values in wanted:
        yield _overrides(section, values), replace(config, **{section: replace(getattr(config, section), **values)})


def _splits(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """Twice the size of each kind of parallelism."""
    parallel = plan.config.parallel
    sizes = {"tp": 2 * int(parallel.tp), "pp": 2 * parallel.pp, "cp": 2 * parallel.cp}
    if plan.arch.experts is not None:
        sizes["ep"] = 2 * parallel.ep
    for name, size in sizes.items():
        if name != "tp" or size <= plan.cluster.ranks_per_node:
            yield "parallel", {name: size}
    if parallel.tp != 1 and not parallel.sequence_parallel:
        yield "parallel", {"sequence_parallel": True}


def _servers(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """Another pool size, servers on every node, data-parallel attention for latents and, if weights leave no room for a cache,
    attention that is split again, or fewer servers with more GPUs."""
    sglang = plan.config.sglang
    fraction = SERVER_FRACTION if sglang.mem_fraction is None else sglang.mem_fraction
    for step in (-0.1, 0.1):
        if 0 < round(fraction + step, 2) < 1:
            yield "sglang", {"mem_fraction": round(fraction + step, 2)}
    if sglang.nodes == "first" and not sglang.dedicated_nodes and plan.cluster.nodes > 1:
        yield "sglang", {"nodes": "every"}
    if plan.arch.latent is not None and 1 == sglang.dp_attention < sglang.tp:
        yield "sglang", {"dp_attention": sglang.tp}
    if not plan.server_fits and sglang.dp_attention > 1:
        yield "sglang", {"dp_attention": 1}
    if not plan.server_holds_sample:
        yield from (("sglang", changes) for changes in _larger_servers(plan))


def _larger_servers(plan: Plan) -> list[dict[str, Any]]:
    """The fewest doublings of a server's GPUs with which its weights leave room for a sample: fewer servers on a node or, above
    the GPUs of a node, servers that span nodes. If nodes have servers and ranks, there are two suggestions: no more of a node's
    GPUs than before, so that the ranks keep their layout, and at most all GPUs of a node but one."""
    sglang, server, cluster = plan.config.sglang, plan.server, plan.cluster
    factor = 2
    while factor < cluster.gpus and server.weights / factor + plan.work.longest * server.token > server.pool:
        factor *= 2
    if sglang.placement == "colocated" or sglang.dedicated_nodes:
        room = [cluster.gpus_per_node]
    else:
        room = [*([sglang.gpus_of_a_node] if sglang.nodes == "every" else []), cluster.gpus_per_node - 1]
    found = [_with_larger(sglang, factor, most, cluster) for most in room]
    return [changes for at, changes in enumerate(found) if changes and changes not in found[:at]]


def _with_larger(sglang: SglangConfig, factor: int, room: int, cluster: Cluster) -> dict[str, Any]:
    """Changes to servers of `factor` times the GPUs, at most `room` of a node, on as few nodes as can be grouped, and no fewer
    than before; none if they cannot."""
    tp, apart = factor * sglang.tp, sglang.dedicated_nodes
    spans = range(max(-(-tp // room), sglang.nodes_per_server), cluster.nodes + 1)
    span = next((span for span in spans if tp % span == 0 and (apart or cluster.nodes % span == 0)), None)
    if span is None:
        return {}
    changes: dict[str, Any] = {"tp": tp}
    if sglang.servers > 1:
        changes["servers"] = max(1, sglang.servers // factor)
    if span == sglang.nodes_per_server:
        return changes
    changes["nodes_per_server"] = span
    if apart % span:
        changes["dedicated_nodes"] = -(-apart // span) * span
    if sglang.nodes == "first" and not apart:
        changes["nodes"] = "every"
    if sglang.placement == "colocated" and sglang.mem_fraction is None:
        changes["mem_fraction"] = SERVER_FRACTION
    return changes
