"""Plans of low-rank adapters: elements against formulas and what a policy builds; bytes, seconds, advice."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from etr_megatron.checks import check_inputs
from etr_megatron.config import load_config
from etr_megatron.errors import UserError
from etr_megatron.flops import head_flops
from etr_megatron.planner import GPUS, H100, Plan, make_plan, render, suggestions
from etr_megatron.planner.adapters import adapters_by_rank, merge_seconds, projection_seconds
from etr_megatron.planner.architecture import MODELS
from etr_megatron.planner.cluster import Cluster
from etr_megatron.planner.dry_run import check_ranks, fewest_gpus
from etr_megatron.weights import LowRank, TrainingLayout, megatron_shard, read_architecture
from etr_megatron.weights.low_rank import add_gradients, add_products
from tests.memory import peak_bytes

CONFIGS = MODELS.parent
DENSE, EXPERTS = CONFIGS / "qwen3_32b_8gpu_lora.yaml", CONFIGS / "qwen3_30b_a3b_8gpu_lora.yaml"
LENGTHS = ["data.max_prompt_tokens=32", "rollout.max_response_tokens=32"]
WITHOUT_OVERLAP = ["train.overlap_grad_reduce=false", "train.overlap_param_gather=false"]
# Qwen3-32B: rows + columns of q and o, k and v, gate, up and down.
SIDES_32B = 64 * (2 * (8192 + 5120) + 2 * (1024 + 5120) + 3 * (25600 + 5120))
MATRICES_32B = 64 * 5120 * (2 * 8192 + 2 * 1024 + 3 * 25600)


@cache
def dense(*overrides: str, gpus: int = 8, name: str = DENSE.name) -> Plan:
    return make_plan(load_config(CONFIGS / name, overrides), gpus)


def test_adapters_of_a_dense_model_are_whole_on_every_tensor_parallel_rank_and_split_over_stages() -> None:
    plan = dense("lora.rank=24", *WITHOUT_OVERLAP, name="qwen3_32b_32gpu.yaml", gpus=32)  # TP4 x PP4 x DP2
    assert plan.adapters == 24 * SIDES_32B
    assert {rank.adapters for rank in plan.ranks} == {24 * SIDES_32B // 4}
    for rank in plan.ranks:
        assert rank.parameters == 2 * rank.elements + 4 * rank.adapters
        assert rank.gradients == 4 * rank.adapters
        assert rank.optimizer == 8 * rank.adapters // 2  # two moments, sharded over two replicas
    on_gpu = dense("lora.rank=24", "lora.offload_base=false", *WITHOUT_OVERLAP, name="qwen3_32b_32gpu.yaml", gpus=32)
    assert {rank.base for rank in on_gpu.ranks} == {2 * MATRICES_32B // 16}


def test_targets_choose_the_matrices_and_the_whole_fused_one_is_held() -> None:
    plan = dense("lora.rank=6", "lora.targets=[v_proj, down_proj]", "lora.offload_base=false")  # TP8
    assert plan.adapters == 6 * 64 * (1024 + 5120 + 25600 + 5120)
    assert plan.ranks[0].base == 2 * 64 * 5120 * (8192 + 2 * 1024 + 25600) // 8  # q, k, v are one parameter


def test_experts_have_their_own_rank_and_are_on_the_ranks_that_hold_them() -> None:
    arch = replace(read_architecture(MODELS / "Qwen3-30B-A3B"), layers=3)
    attention, expert = 3 * (2 * (4096 + 2048) + 2 * (512 + 2048)), 3 * 3 * (768 + 2048)
    spread = adapters_by_rank(arch, TrainingLayout(tp=2, dp=4, ep=8, etp=1), LowRank(32, 32.0, expert_rank=4))
    assert {(one.trained.dense, one.trained.expert) for one in spread} == {(32 * attention, 4 * expert * 16)}
    cut = adapters_by_rank(arch, TrainingLayout(tp=4, dp=2, ep=4, etp=2), LowRank(32, 32.0, expert_rank=4))
    assert {one.trained.expert for one in cut} == {4 * expert * 32}  # whole on both ranks of an expert
    assert {one.trained.expert for one in adapters_by_rank(arch, TrainingLayout(), LowRank(32, 32.0, expert_rank=0))} == {0}
    # A grouped GEMM returns the gradients of all of a rank's experts, here of gate and up; a weight is merged alone.
    assert {(one.gradients, one.part) for one in spread} == {(16 * 2 * 768 * 2048, 4096 // 2 * 2048)}
    assert {one.shard for one in spread} == {5120 // 2 * 2048}


def test_the_states_of_experts_adapters_are_sharded_over_the_experts_replicas(hf_models) -> None:
    split = ["parallel.tp=2", "parallel.ep=3", "parallel.etp=1", "parallel.sequence_parallel=true"]
    chosen = ["lora.rank=5", "lora.expert_rank=3", f"model.path={hf_models['qwen3_moe']}", "train.distributed_optimizer=true"]
    rank = make_plan(load_config(None, [*chosen, *split, *LENGTHS]), 24, gpus_per_node=24).ranks[0]
    of_dense, of_experts = 4 * 5 * (2 * (64 + 48) + 2 * (32 + 48)), 2 * 4 * 3 * 3 * (28 + 48)
    assert rank.adapters == of_dense + of_experts
    assert rank.optimizer == 8 * (of_dense // 12 + of_experts // 8)


@pytest.mark.parametrize(
    ("family", "overrides", "world"),
    [
        ("qwen3_moe", ["parallel.tp=2", "parallel.ep=2", "parallel.etp=1", "parallel.sequence_parallel=true"], 4),
        ("deepseek_v3", ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true", "lora.targets=[kv_b_proj]"], 4),
    ],
)
def test_every_rank_has_the_adapters_that_a_policy_builds(hf_models, family, overrides, world) -> None:
    chosen = ["lora.rank=5", "lora.expert_rank=3", f"model.path={hf_models[family]}", "parallel.tp=2"]
    plan = make_plan(load_config(None, [*chosen, *LENGTHS, *overrides]), world)
    check_ranks(plan, range(world))
    assert plan.ranks[0].adapters > 0


def test_a_plan_that_counts_other_adapters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dense()
    monkeypatch.setattr("etr_megatron.planner.dry_run.elements_built", lambda *_: (plan.ranks[0].elements, 7))
    with pytest.raises(RuntimeError, match=r"rank 2 has adapters of 7 elements, the plan says 268435456"):
        check_ranks(plan, [2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_merging_and_projecting_need_for_a_while_is_what_the_operators_hold(hf_models, dtype: torch.dtype) -> None:
    arch, spec = read_architecture(hf_models["qwen3"]), LowRank(3, 6.0, targets=("gate_proj", "up_proj"))
    (planned, _) = adapters_by_rank(arch, TrainingLayout(tp=2), spec)
    weight, adapters = next(iter(spec.adapted(arch)))
    shard = megatron_shard(weight, arch, 2, 0)
    pairs = {one.hf: (one, (torch.ones(3, one.columns), torch.ones(one.rows, 3))) for one in adapters}
    base = torch.ones(shard.shape, dtype=dtype)
    merged = peak_bytes(lambda: add_products(base.clone(), shard, pairs))  # the clone stands for a copy from the CPU
    # Beside what is planned, there are factors in fp64, and the thresholds of rows and columns; the larger the less they count.
    small = 128 * sum(shard.pieces[0].size)
    assert 0 <= merged - planned.merge_bytes(dtype.itemsize, offloaded=True) <= small
    merged = peak_bytes(lambda: add_products(base, shard, pairs))
    assert 0 <= merged - planned.merge_bytes(dtype.itemsize, offloaded=False) <= small
    into = {one.hf: (torch.zeros(3, one.columns), torch.zeros(one.rows, 3)) for one in adapters}
    projected = peak_bytes(lambda: add_gradients(base.clone(), shard, pairs, into))
    assert planned.gradient_bytes(dtype.itemsize) == projected


def test_transients_count_in_the_phase_that_they_are_in() -> None:
    rank = dense().ranks[0]
    gate_and_up = 2 * 25600 * 5120 // 8
    assert rank.projected == 2 * gate_and_up + 4 * gate_and_up // 2
    assert rank.step == (2 + 2) * gate_and_up + (8 + 4) * gate_and_up // 2  # of sums, gate and up one after the other
    assert rank.phases["train"] - replace(rank, projected=0).phases["train"] == rank.projected
    bare = replace(rank, activations=0, head=0)
    assert bare.phases["train"] - replace(bare, step=0).phases["train"] == rank.step - rank.projected


def test_original_values_are_in_cpu_memory_that_torch_rounds_up_or_beside_the_weights() -> None:
    offloaded, beside = dense(), dense("lora.offload_base=false")
    # Of q, k and v, the output's, gate and up, down: 2 bytes each, rounded up to powers of two.
    sizes = [2 * 5120 * rows // 8 for rows in (8192 + 2 * 1024, 8192, 2 * 25600, 25600)]
    pinned = 64 * sum(next(2**power for power in range(40) if 2**power >= size) for size in sizes)
    assert {(rank.base, rank.base_on_host) for rank in offloaded.ranks} == {(0, pinned)}
    assert {(rank.base, rank.base_on_host) for rank in beside.ranks} == {(2 * MATRICES_32B // 8, 0)}
    assert (offloaded.base_on_host, beside.base_on_host) == (8 * pinned, 0)
    assert beside.ranks[0].resident - offloaded.ranks[0].resident == 2 * MATRICES_32B // 8
    assert f"original values: {8 * pinned / 2**30:.1f} GiB of a node's memory" in render(offloaded)
    assert "of a node's memory" not in render(beside)
    assert offloaded.as_dict()["base_bytes_on_host"] == 8 * pinned


def test_ranks_are_on_the_nodes_on_which_torchrun_starts_them() -> None:
    even = Cluster(16, 8, 12, servers=2, server_tp=2)  # dedicated servers on every node
    assert [even.node_of(rank) for rank in range(12)] == [0] * 6 + [1] * 6
    uneven = Cluster(24, 8, 19, servers=1, server_tp=5, first_node_ranks=3)
    assert [uneven.node_of(rank) for rank in range(19)] == [0] * 3 + [1] * 8 + [2] * 8


def test_the_reference_is_the_model_itself() -> None:
    assert {rank.reference for rank in dense("objective.kl_coef=0.01").ranks} == {0}


def test_offloaded_optimizer_states_of_adapters_keep_a_copy_of_them() -> None:
    plain, leaves = dense().ranks[0], dense("train.offload_for_rollout=true").ranks[0]
    assert (plain.optimizer, leaves.optimizer) == (8 * plain.adapters, 12 * plain.adapters)
    assert leaves.offloaded == (12 + 4) * plain.adapters


def test_updates_make_no_gradient_of_the_head_and_the_rest_is_for_adapters() -> None:
    full, adapted = dense("lora.rank=0").time, dense().time
    product = 1024 * head_flops(dense().arch, 4096) / (8 * H100.matmul * H100.dense_efficiency)
    assert full.adapters == 0 < adapted.adapters
    assert full.train - (adapted.train - adapted.adapters) == pytest.approx(product)
    assert adapted.logprobs == full.logprobs


def test_every_update_merges_and_every_microbatch_projects() -> None:
    plan = dense()
    (most,) = {*adapters_by_rank(plan.arch, TrainingLayout(tp=8), LowRank(32, 32.0))}
    elements = MATRICES_32B / 8
    memory, products = 0.8 * 3.35e12, 0.6 * 67e12
    project = 6 * elements / memory + max(8 * elements / memory, 4 * 32 * elements / products)
    # 30 bytes are copied per element, and 72 read and written to round it.
    merge = 2 * elements / 2e10 + 102 * elements / memory + max(16 * elements / memory, 2 * 32 * elements / products)
    assert projection_seconds(most, 2, H100) == pytest.approx(project)
    assert merge_seconds(most, 2, H100, offloaded=True) == pytest.approx(merge)
    assert plan.time.adapters == pytest.approx(4 * (128 * project + merge))  # optimizer steps, microbatches
    assert dense("train.epochs=3").time.adapters == pytest.approx(3 * plan.time.adapters)
    beside = dense("lora.offload_base=false").time
    assert plan.time.adapters - beside.adapters == pytest.approx(4 * 2 * elements / 2e10)
    referred = dense("objective.kl_coef=0.01").time
    assert referred.adapters - plan.time.adapters == pytest.approx(2 * elements / 2e10 + merge)
    assert referred.logprobs - 2 * plan.time.logprobs == pytest.approx(referred.adapters - plan.time.adapters)


def test_wide_adapters_are_bound_by_products_and_each_gpu_has_its_rate() -> None:
    arch = read_architecture(MODELS / "Qwen3-8B")
    narrow, wide = (adapters_by_rank(arch, TrainingLayout(), LowRank(rank, 1.0))[0] for rank in (256, 512))
    seconds = [[projection_seconds(one, 2, gpu) for one in (narrow, wide)] for gpu in GPUS.values()]
    for (less, more), gpu in zip(seconds, GPUS.values(), strict=True):
        assert more - less == pytest.approx(4 * 256 * narrow.base / (0.6 * gpu.matmul_fp32))


def test_original_values_on_the_gpu_are_advised_where_they_fit_and_save_time_and_in_cpu_memory_where_not() -> None:
    config = load_config(DENSE, ["rollout.prompts_per_step=4", "train.epochs=4", "sglang.mem_fraction=0.3"])
    found = {one.setting: one for one in suggestions(config, make_plan(config, 8))}
    assert found["lora.offload_base=false"].fits
    tight = load_config(DENSE, ["rollout.prompts_per_step=4", "lora.offload_base=false"])
    found = {one.setting: one for one in suggestions(tight, make_plan(tight, 8))}
    assert found["lora.offload_base=true"].fits


def test_adapters_are_advised_only_where_nothing_else_makes_a_config_fit() -> None:
    path, asked = CONFIGS / "qwen3_32b_32gpu.yaml", ["parallel.tp=8", "parallel.pp=1", "rollout.prompts_per_step=8"]

    def settings(fraction: float) -> list[str]:
        config = load_config(path, [*asked, f"sglang.mem_fraction={fraction}"])
        return [one.setting for one in suggestions(config, make_plan(config, 8)) if one.fits]

    adapters = "lora.rank=32 train.overlap_grad_reduce=false train.overlap_param_gather=false"
    assert settings(0.6) == [adapters]
    assert make_plan(load_config(path, [*asked, "sglang.mem_fraction=0.6", *adapters.split()]), 8).fits
    assert adapters not in settings(0.3) != []


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["lora.targets=[q_proj, q_a_proj]"], r"^lora\.targets: the model has no trainable q_a_proj; it has q_proj, k_proj, "),
        (["lora.expert_rank=2"], r"has no experts, so lora\.expert_rank has no effect; set it to null$"),
    ],
)
def test_adapters_of_what_a_model_does_not_have_are_refused_by_a_plan_and_before_a_job(hf_models, overrides, told) -> None:
    for model in ("tiny", hf_models["qwen3"]):
        config = load_config(None, ["lora.rank=4", "parallel.tp=1", f"model.path={model}", *LENGTHS, *overrides])
        for check in (lambda job: make_plan(job, 1), lambda job: check_inputs(job, 1), fewest_gpus):
            with pytest.raises(UserError, match=told):
                check(config)


def test_a_stage_without_adapters_is_refused_by_a_plan(hf_models) -> None:
    dense_layers_only = ["lora.rank=4", "lora.targets=[gate_proj]", "lora.expert_rank=0", "parallel.pp=4", "parallel.tp=1"]
    config = load_config(None, [*dense_layers_only, f"model.path={hf_models['qwen3_moe_dense']}", *LENGTHS])
    with pytest.raises(UserError, match=r"^lora\.targets: no layer of pipeline stage 3 has one of them"):
        make_plan(config, 4)
