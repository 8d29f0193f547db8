"""Rules about `train.megatron`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from etr_megatron.config.coerce import describe
from etr_megatron.config.megatron_fields import FIELDS, GOVERNED, KEY, RECOMPUTATION, REFUSED, needs_gpu
from etr_megatron.config.rules.violation import Violation, get
from etr_megatron.config.schema import Config


def megatron(config: Config) -> Iterator[Violation]:
    """Fields of Megatron's own configs."""
    given = config.train.megatron
    for name, value in given.items():
        key = f"{KEY}.{name}"
        if problem := _refusal(name) or _mismatch(name, value):
            yield Violation((key,), problem)
            continue
        field = FIELDS[name]
        if field.with_field is not None and given.get(field.with_field[0]) != field.with_field[1]:
            yield Violation((key,), f"has no effect without {KEY}.{field.condition}; set that as well, or remove it")
        if field.void_at is not None and get(config, field.void_at[0]) == field.void_at[1]:
            switch = field.void_at[0]
            yield Violation((key, switch), f"the field has no effect with this {switch}; change that, or remove the field")
    if "moe_deepep_num_sms" in given and given.get("moe_flex_dispatcher_backend") == "hybridep":
        keys = (f"{KEY}.moe_deepep_num_sms", f"{KEY}.moe_flex_dispatcher_backend")
        yield Violation(keys, "DeepEP's number has no effect on HybridEP; remove it, or set moe_hybridep_num_sms")
    if config.train.recompute != "none" and (names := [name for name in given if name in RECOMPUTATION]):
        yield Violation(
            (f"{KEY}.{names[0]}", "train.recompute"),
            "both choose what is recomputed; set recompute to none, or remove Megatron's fields for it",
        )
    if given.get("deallocate_pipeline_outputs") is True and config.parallel.vpp > 1:
        # The interleaved schedule waits for the send of an output only after that of the next one, and frees it before: on CPU,
        # with `overlap_p2p_comm_warmup_flush`, the next stage got other numbers.
        yield Violation(
            (f"{KEY}.deallocate_pipeline_outputs", "parallel.vpp"),
            "with several chunks per stage, Megatron frees outputs that it is still sending; remove it, or set vpp to 1",
        )
    if given.get("cpu_offloading") is True and "cpu_offloading_num_layers" not in given:
        yield Violation((f"{KEY}.cpu_offloading",), f"moves nothing without {KEY}.cpu_offloading_num_layers; set that as well")
    if given.get("reduce_scatter_with_fp32_accumulation") is True and config.fp8.param and config.train.overlap_grad_reduce:
        yield Violation(
            (f"{KEY}.reduce_scatter_with_fp32_accumulation", "fp8.param", "train.overlap_grad_reduce"),
            "Megatron reduces weights in FP8 together with others, and its sums in float32 do not overlap for both; set one of "
            "them to false",
            given=("fp8.recipe",),
        )
    if given.get("moe_router_fusion") is True and config.train.routing_replay:
        yield Violation(
            (f"{KEY}.moe_router_fusion", "train.routing_replay"),
            "Megatron's fused router cannot be told which experts to choose; remove it, or set routing_replay to false",
        )


def on_cpu(config: Config) -> Iterator[Violation]:
    """Fields that need a GPU."""
    for name, value in config.train.megatron.items():
        if name in FIELDS and needs_gpu(name, value):
            yield Violation((f"{KEY}.{name}",), "needs a GPU and Transformer Engine, and this job runs on CPU; remove it")


def _refusal(name: str) -> str:
    """Why a field cannot be set; "" if it can."""
    if name in FIELDS:
        return ""
    if name in GOVERNED:
        return f"follows from {GOVERNED[name]}; set that instead"
    if name in REFUSED:
        return f"{REFUSED[name]}; remove it"
    near = difflib.get_close_matches(name, [*FIELDS, *GOVERNED, *REFUSED], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "docs/config.md lists those that can be set"
    return f"Megatron has no field of this name; {hint}"


def _mismatch(name: str, value: Any) -> str:
    """What is wrong with a field's value; "" if nothing is."""
    hint = FIELDS[name].hint
    if get_origin(hint) is tuple:
        choices = get_args(get_args(hint)[0])
        fits = isinstance(value, tuple | list) and value and all(one in choices for one in value)
        return "" if fits else f"must be a list of some of {', '.join(choices)}"
    if get_origin(hint) is Literal:
        return "" if value in get_args(hint) else f"must be {describe(hint)}"
    if type(value) is not hint:  # true is no number
        return f"must be {describe(hint)}"
    if hint is int and not 1 <= value < 2**31:
        return "must be at least 1 and below 2**31"
    return ""
