"""Parameter counts of the shipped architectures, and of ranks, against transformers and the layout's arithmetic."""

from __future__ import annotations

import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from etr_megatron.config import load_config
from etr_megatron.errors import UserError
from etr_megatron.planner import make_plan
from etr_megatron.planner.adapters import adapters_by_rank
from etr_megatron.planner.architecture import MODELS, architecture_of
from etr_megatron.planner.cluster import divide
from etr_megatron.planner.parameters import (
    counted_weights,
    largest_weight,
    parameters_by_rank,
    total_matrices,
    total_parameters,
)
from etr_megatron.weights import LowRank, ServerLayout, TrainingLayout, padded_vocab_size, read_architecture, weights_of
from etr_megatron.weights import map as weight_map
from etr_megatron.weights.layout import shards_of
from tests.weight_cases import ARCHITECTURES

CARDS = {
    "DeepSeek-V3": 671,
    "GLM-4.5-Air": 106,
    "GLM-4.7-Flash": 30,
    "Llama-3.1-8B": 8.03,
    "Llama-3.1-70B": 70.6,
    "Qwen2.5-32B": 32.8,
    "Qwen2.5-Math-7B": 7.62,
    "Qwen3-8B": 8.19,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-32B": 32.8,
}
"""Billions of parameters, as the hub shows them next to the model cards; a whole number is the card's own, cut off or rounded
(the hub counts the layer for multi-token prediction)."""


def test_every_shipped_architecture_has_a_published_size() -> None:
    assert {folder.name for folder in MODELS.iterdir()} == set(CARDS)


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_shipped_architecture_has_the_parameters_that_transformers_builds_and_its_card_says(name: str) -> None:
    total = total_parameters(read_architecture(MODELS / name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODELS / name))
    biases = [buffer for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias")]
    assert total == sum(tensor.numel() for tensor in (*model.parameters(), *biases))
    assert abs(total / 1e9 - CARDS[name]) < (1 if isinstance(CARDS[name], int) else 0.06)


def test_ranks_hold_the_checkpoint_once_per_replica_and_the_padding() -> None:
    arch = read_architecture(MODELS / "Qwen3-32B")
    layout = TrainingLayout(tp=4, pp=4, dp=2)
    held = parameters_by_rank(arch, layout)
    padding = 2 * (padded_vocab_size(arch.vocab_size, 4) - arch.vocab_size) * arch.hidden_size
    # Norms are on every tensor-parallel rank.
    norms = arch.layers * 2 * (arch.hidden_size + arch.head_dim) + arch.hidden_size
    assert sum(rank.total for rank in held) == 2 * (total_parameters(arch) + padding + 3 * norms)
    assert len({rank.total for rank in held[:8]}) == 1  # a stage's ranks are alike


def test_experts_are_counted_apart_and_once_per_expert_replica() -> None:
    arch = read_architecture(MODELS / "Qwen3-30B-A3B")
    held = parameters_by_rank(arch, TrainingLayout(tp=2, pp=1, dp=16, ep=8, etp=1))
    of_all = 48 * 128 * 3 * 2048 * 768
    assert {rank.expert for rank in held} == {of_all // 8}
    assert sum(rank.expert for rank in held) == 4 * of_all


@pytest.mark.parametrize("family", ["qwen3_moe_dense", "deepseek_v3"])
@pytest.mark.parametrize(
    "layout",
    [TrainingLayout(tp=2, pp=2, dp=6, ep=3, etp=1), ServerLayout(tp=4, ep=2, attention_dp=2)],
    ids=["training", "server"],
)
def test_experts_counted_as_one_are_as_many_elements_as_all_of_them(family: str, layout: TrainingLayout | ServerLayout) -> None:
    arch, spec = ARCHITECTURES[family], LowRank(4, 4.0, expert_rank=3)
    held, adapters = parameters_by_rank(arch, layout, unquantised=(1,)), adapters_by_rank(arch, layout, spec)
    for rank in range(layout.world):
        shards = list(shards_of(layout, arch, rank))
        sizes = [prod(shard.shape) for _, shard in shards]
        experts = [size for size, (weight, _) in zip(sizes, shards, strict=True) if weight.expert is not None]
        matrices = [size for size, (weight, _) in zip(sizes, shards, strict=True) if weight.fp8 and weight.layer != 1]
        assert (held[rank].total, held[rank].expert, held[rank].matrices) == (sum(sizes), sum(experts), sum(matrices))
        adapted = [(3 if weight.expert is not None else 4, prod(shard.shape)) for weight, shard in shards if weight.fp8]
        own = adapters[rank]
        assert own.base == own.parts == sum(size for _, size in adapted)
        assert own.products == sum(rank * size for rank, size in adapted)
        assert own.pinned == sum(next(power for power in (2**n for n in range(32)) if power >= size) for _, size in adapted)
    every = [(weight.fp8, sum(prod(shape) for shape in weight.shapes)) for weight in weights_of(arch)]
    assert total_parameters(arch) == sum(size for _, size in every)
    assert total_matrices(arch) == sum(size for fp8, size in every if fp8)
    assert largest_weight(arch) == max(size for _, size in every)


def test_a_plan_does_not_build_the_weights_of_every_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 in DeepSeek-V3, which took half a minute."""
    built = []
    monkeypatch.setattr(weight_map, "_weight", lambda *args, build=weight_map._weight: built.append(args) or build(*args))
    counted_weights.cache_clear()
    plan = make_plan(load_config(MODELS.parent / "deepseek_v3_256gpu_fp8.yaml", []), 256)
    assert plan.parameters == 671_026_419_200
    assert 0 < len(built) < 3000


def test_a_shared_expert_is_split_as_a_dense_mlp_and_a_routers_bias_is_counted() -> None:
    arch = read_architecture(MODELS / "GLM-4.5-Air")
    held = parameters_by_rank(arch, TrainingLayout(tp=4, pp=1, dp=16, ep=8, etp=1))
    hidden, q, kv = 4096, 96 * 128, 8 * 128
    assert {rank.expert for rank in held} == {45 * 128 * 3 * hidden * 1408 // 8}
    vocabulary = 2 * padded_vocab_size(arch.vocab_size, 4) * hidden
    split = vocabulary + 46 * ((2 * q + 2 * kv) * hidden + q + 2 * kv) + 3 * hidden * (10944 + 45 * 1408)
    whole = hidden + 46 * 2 * hidden + 45 * (128 * hidden + 128)  # norms, routers and their biases
    assert {rank.dense for rank in held} == {split // 4 + whole}


def test_importing_the_planner_does_not_import_torch() -> None:
    code = "import sys, etr_megatron.planner; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_that_is_not_there_and_not_shipped_is_named() -> None:
    with pytest.raises(UserError, match=r"no config\.json of a model Nobody-1B is shipped"):
        architecture_of(load_config(None, ["model.path=models/Nobody-1B"]))


def test_the_tiny_policy_is_planned_as_it_is_made() -> None:
    plan = make_plan(load_config(None, []), 2, gpu_memory=8)
    layer = 64 * (4 + 2 * 2 + 4) * 24 + 3 * 64 * 192 + 2 * 64 + 2 * 24
    assert plan.parameters == 3 * layer + 64 + 2 * 320 * 64


def test_servers_take_gpus_of_their_own_only_when_dedicated() -> None:
    keys = ["rollout.backend=sglang", "sglang.tp=2", "sglang.servers=1"]
    dedicated = divide(load_config(None, [*keys, "sglang.nodes=every"]), gpus=16)
    assert (dedicated.ranks, dedicated.servers, dedicated.ranks_per_node) == (12, 2, 6)
    first = divide(load_config(None, keys), gpus=16)
    assert (first.ranks, first.first_node_ranks, first.ranks_per_node) == (14, 6, 8)  # the second node has no server
    shared = divide(load_config(None, [*keys, "sglang.placement=colocated", "sglang.nodes=every"]), gpus=16)
    assert (shared.ranks, shared.servers) == (16, 2)
    whole = divide(load_config(None, [*keys, "sglang.servers=4", "sglang.dedicated_nodes=2"]), gpus=40)
    assert (whole.ranks, whole.servers, whole.ranks_per_node, whole.first_node_ranks) == (24, 8, 8, None)
    assert divide(load_config(None, ["rollout.backend=sglang", "sglang.urls=[http://a:1]"]), gpus=16).ranks == 16


def test_servers_that_span_nodes_have_equally_many_gpus_on_each() -> None:
    keys = ["rollout.backend=sglang", "sglang.tp=6", "sglang.nodes_per_server=3"]
    colocated = [*keys, "sglang.nodes=every", "sglang.placement=colocated", "sglang.mem_fraction=0.5"]
    shared = divide(load_config(None, colocated), gpus=30, gpus_per_node=5)
    assert (shared.ranks, shared.servers, shared.server_tp, shared.nodes_per_server) == (30, 2, 6, 3)
    assert [shared.shares_gpu(rank) for rank in range(30)] == [True, True, False, False, False] * 6
    beside = divide(load_config(None, [*keys, "sglang.nodes=every"]), gpus=30, gpus_per_node=5)
    assert (beside.ranks, beside.servers, beside.ranks_per_node) == (18, 2, 3)
    apart = divide(load_config(None, [*keys, "sglang.dedicated_nodes=3"]), gpus=28, gpus_per_node=4)
    assert (apart.ranks, apart.servers, apart.ranks_per_node, apart.nodes_per_server) == (16, 1, 4, 3)
    yours = ["rollout.backend=sglang", "sglang.tp=20", "sglang.urls=[http://a:1]"]
    assert [divide(load_config(None, yours), gpus=gpus).nodes_per_server for gpus in (4, 16)] == [3, 3]


@pytest.mark.parametrize(
    ("overrides", "gpus", "told"),
    [
        (
            ["sglang.tp=16"],
            16,
            r"which has 8; lower one of them, or raise sglang\.nodes_per_server, for servers that span nodes$",
        ),
        (["sglang.tp=4", "sglang.servers=3"], 16, "which has 8; lower one of them$"),
        (
            ["sglang.tp=36", "sglang.nodes_per_server=3", "sglang.nodes=every"],
            24,
            r"=1 of sglang\.tp=36 on sglang\.nodes_per_server=3 nodes need 12 GPUs on a node, which has 8; lower sglang\.tp",
        ),
        (
            ["sglang.tp=6", "sglang.nodes_per_server=3", "sglang.nodes=every"],
            32,
            r"nodes_per_server=3: the 4 nodes of 32 GPUs are no multiple of it; give another --gpus, or lower it",
        ),
        (
            ["sglang.tp=24", "sglang.nodes_per_server=3", "sglang.nodes=every"],
            24,
            r"take 24 of 24 GPUs and leave none to train on; raise sglang\.nodes_per_server, lower sglang\.tp, or give ",
        ),
        (["sglang.tp=8", "sglang.servers=2"], 8, "need 16 GPUs on a node, which has 8"),
        (["sglang.tp=8"], 8, "leave none to train on"),
        (["sglang.tp=8"], 16, "take all 8 GPUs of the first node, where rank 0"),
        ([], 12, "is not a multiple of the 8 GPUs of a node"),
        (["sglang.dedicated_nodes=2"], 16, r"dedicated_nodes=2 leaves none of the 2 nodes \(16 GPUs\) to train on"),
        (["sglang.dedicated_nodes=1", "sglang.servers=9"], 16, "need 9 GPUs on a node, which has 8"),
    ],
)
def test_servers_that_cannot_be_placed_are_refused(overrides: list[str], gpus: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        divide(load_config(None, ["rollout.backend=sglang", *overrides]), gpus)


def test_the_parameters_in_json_are_the_checkpoints(tmp_path: Path) -> None:
    import json

    config = MODELS.parent / "qwen3_8b_8gpu.yaml"
    tool = Path(__file__).parents[1] / "tools" / "plan.py"
    found = subprocess.run(
        [sys.executable, tool, "--config", config, "--gpus", "8", "--json"], check=True, capture_output=True, text=True
    )
    told = json.loads(found.stdout)
    assert told["parameters"] == 8_190_735_360
    assert len(told["ranks"]) == 8
    assert told["fits"] is True
