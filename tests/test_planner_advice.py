"""Suggested settings: which, in which order, and that they are valid where they are needed."""

from __future__ import annotations

import pytest

from etr_megatron.config import load_config, validate
from etr_megatron.planner import make_plan, render, suggestions
from etr_megatron.planner.advice import _changes, _with_adapters
from etr_megatron.planner.architecture import MODELS

QWEN_32B = MODELS.parent / "qwen3_32b_32gpu.yaml"
FEW = ["rollout.prompts_per_step=12", "rollout.samples_per_prompt=2", "train.minibatches=1"]
"""Samples, for a fast estimate of generation."""


def test_settings_whose_cost_is_not_modelled_come_after_those_whose_time_is_known() -> None:
    config = load_config(QWEN_32B, [])
    tight = make_plan(config, 32, gpu_memory=70.0)
    fitting = [suggestion for suggestion in suggestions(config, tight, gpu_memory=70.0) if suggestion.fits]
    counted = [suggestion.is_counted for suggestion in fitting]
    assert counted == sorted(counted, reverse=True) and {True, False} == set(counted)
    text = render(tight, fitting)
    assert "train.grads_dtype=bfloat16: " in text and " GiB, fits, at least " in text.partition("parallel.tp=8: ")[2][:40]


@pytest.mark.slow
def test_experts_are_advised_to_be_spread_further_where_that_helps() -> None:
    experts = load_config(QWEN_32B.with_name("qwen3_30b_a3b_32gpu.yaml"), ["parallel.ep=4"])
    found = suggestions(experts, make_plan(experts, 32, gpu_memory=40.0), gpu_memory=40.0)
    assert "parallel.ep=8" in [suggestion.setting for suggestion in found]


FLASH = QWEN_32B.with_name("glm4.7_flash_16gpu.yaml")
TOGETHER = ["sglang.dp_attention=1", "sglang.concurrency=256", "sglang.arguments=[]"]


def test_attention_in_parallel_is_advised_where_every_gpu_of_a_server_caches_the_same_latents() -> None:
    given = load_config(FLASH, [*TOGETHER, "sglang.mem_fraction=0.25", "rollout.prompts_per_step=64"])
    plan = make_plan(given, 16, gpu_memory=140.0)
    found = {one.setting: one for one in suggestions(given, plan, gpu_memory=140.0)}
    assert plan.fits and found["sglang.dp_attention=4"].step < plan.time.step
    heads = load_config(QWEN_32B, FEW)
    assert not any("dp_attention" in setting for setting, _ in _changes(make_plan(heads, 32), heads))


def test_attention_on_all_gpus_is_advised_where_all_of_its_weights_leave_no_room() -> None:
    given = load_config(FLASH, [*FEW, "sglang.arguments=[]", "sglang.mem_fraction=0.117"])
    plan = make_plan(given, 16, gpu_memory=140.0)
    assert plan.ranks_fit and not plan.server_fits
    found = {one.setting: one for one in suggestions(given, plan, gpu_memory=140.0)}
    assert found["sglang.dp_attention=1"].fits


def test_larger_servers_are_advised_where_weights_leave_no_room() -> None:
    servers = load_config(QWEN_32B, [*FEW, "sglang.tp=1", "sglang.servers=8"])
    plan = make_plan(servers, 32)
    assert plan.ranks_fit and not plan.server_fits
    found = suggestions(servers, plan)
    assert [suggestion.setting for suggestion in found if suggestion.fits] == ["sglang.tp=2 sglang.servers=4"]


def test_servers_that_span_nodes_are_advised_where_a_node_does_not_hold_the_weights() -> None:
    """61 GiB and a sample of 2.3 GiB, in 18 GiB of each of a node's two GPUs."""
    node = dict(gpu_memory=60.0, gpus_per_node=2)
    few = [*FEW, "rollout.prompts_per_step=4", "sglang.tp=1", "sglang.servers=2"]
    given = load_config(QWEN_32B, [*few, "sglang.mem_fraction=0.3"])
    larger = dict(_changes(make_plan(given, 32, **node), given))["sglang.tp=4 sglang.servers=1 sglang.nodes_per_server=2"]
    plan = make_plan(larger, 32, **node)
    assert plan.server_fits and plan.cluster.servers == 8 and "8 servers of TP4 on 2 nodes, on the ranks' GPUs" in render(plan)
    left_open = load_config(QWEN_32B, [*few, "sglang.mem_fraction=null", "sglang.nodes=first"])
    changes = dict(_changes(make_plan(left_open, 32, gpu_memory=22.0, gpus_per_node=2), left_open))
    wanted = "sglang.tp=4 sglang.servers=1 sglang.nodes_per_server=2 sglang.nodes=every sglang.mem_fraction=0.85"
    assert not validate(changes[wanted], 32)


def test_servers_beside_ranks_are_advised_to_span_nodes_rather_than_to_take_the_ranks_gpus() -> None:
    """15.3 GiB on each of four GPUs of a node, of whose memory a server has 12."""
    beside = ["sglang.placement=dedicated", "sglang.nodes=every", "sglang.tp=4", "sglang.servers=1", "sglang.sync=broadcast"]
    given, node = load_config(QWEN_32B, [*FEW, *beside, "sglang.mem_fraction=0.03"]), dict(gpu_memory=400.0)
    plan = make_plan(given, 32, **node)
    assert not plan.server_fits and plan.cluster.ranks_per_node == 4
    found = {suggestion.setting: suggestion for suggestion in suggestions(given, plan, **node)}
    assert found["sglang.tp=8 sglang.nodes_per_server=2"].fits
    larger = make_plan(dict(_changes(plan, given))["sglang.tp=8 sglang.nodes_per_server=2"], 32, **node).cluster
    assert (larger.ranks, larger.ranks_per_node, larger.servers) == (16, 4, 2)


@pytest.mark.parametrize(("spread", "gpus"), [([], 8), (["sglang.nodes_per_server=2"], 16)], ids=["one node", "two nodes"])
def test_servers_are_advised_to_take_more_gpus_of_the_nodes_that_they_have(spread: list[str], gpus: int) -> None:
    """Beside ranks, of one node, as there is no other to span; of two, on which a colocated server has one GPU each."""
    placed = ["sglang.placement=colocated", *spread] if spread else ["sglang.placement=dedicated", "sglang.sync=broadcast"]
    keys = [*placed, "sglang.nodes=every", "sglang.tp=2", "sglang.servers=1", "sglang.mem_fraction=0.06"]
    given, node = load_config(QWEN_32B, [*FEW, *keys, "parallel.tp=2", "parallel.pp=1"]), dict(gpu_memory=400.0)
    plan = make_plan(given, gpus, **node)
    larger = make_plan(dict(_changes(plan, given))["sglang.tp=4"], gpus, **node)
    assert larger.server_fits > plan.server_fits


@pytest.mark.parametrize(("apart", "gpus", "wanted"), [(1, 8, 2), (3, 12, 4)])
def test_dedicated_nodes_are_advised_to_be_as_many_as_larger_servers_divide(apart: int, gpus: int, wanted: int) -> None:
    layout = ["parallel.tp=2", "parallel.pp=1", "sglang.tp=2", "sglang.servers=1", "sglang.sync=broadcast"]
    nodes = ["sglang.placement=dedicated", "sglang.nodes=first", f"sglang.dedicated_nodes={apart}"]
    given = load_config(QWEN_32B, [*FEW, *layout, *nodes, "sglang.mem_fraction=0.06"])
    node = dict(gpu_memory=400.0, gpus_per_node=2)
    found = suggestions(given, make_plan(given, gpus, **node), **node)
    larger = f"sglang.tp=4 sglang.nodes_per_server=2 sglang.dedicated_nodes={wanted}"
    assert larger in [suggestion.setting for suggestion in found if suggestion.fits]


def test_servers_on_every_node_are_advised_where_only_the_first_has_some() -> None:
    config = load_config(QWEN_32B.with_name("qwen3_8b_8gpu.yaml"), [])
    assert "sglang.nodes=every" in [suggestion.setting for suggestion in suggestions(config, make_plan(config, 16))]
    assert "sglang.nodes=every" not in [suggestion.setting for suggestion in suggestions(config, make_plan(config, 8))]
    apart = load_config(QWEN_32B.with_name("qwen3_32b_64gpu_async.yaml"), [])
    assert "sglang.nodes=every" not in [suggestion.setting for suggestion in suggestions(apart, make_plan(apart, 64))]


def test_fields_of_megatron_that_a_suggestion_rules_out_are_dropped_in_it() -> None:
    fields = "recompute_granularity: selective, recompute_modules: [mlp], bucket_size: 5000000, bias_dropout_fusion: false"
    train = ["train.overlap_grad_reduce=true", "train.recompute=none", f"train.megatron={{{fields}}}"]
    train += ["fp8.recipe=blockwise", "fp8.param=true"]
    given = load_config(QWEN_32B, [*FEW, *train])
    kept, left = given.train.megatron, {"bias_dropout_fusion": False}
    recomputed, adapters = next(_changes(make_plan(given, 32), given)), _with_adapters(given)
    for (setting, changed), wanted in (
        (recomputed, left | {"bucket_size": 5000000}),
        (adapters, {name: value for name, value in kept.items() if name != "bucket_size"}),
    ):
        assert load_config(QWEN_32B, [*FEW, *train, *setting.split()]) == changed and changed.train.megatron == wanted
