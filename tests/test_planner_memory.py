"""Memory: what each setting changes, and passes in flight against a simulation of the schedules."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace

import pytest

from etr_megatron.config import SglangConfig, load_config
from etr_megatron.planner import Plan, make_plan, render, suggestions
from etr_megatron.planner.activations import (
    EXPERT_IMBALANCE,
    Split,
    gradients_of_layer,
    passes_in_flight,
    saved_by_layer,
    stage_activations,
)
from etr_megatron.planner.architecture import MODELS
from etr_megatron.planner.cuda_graphs import _prefill_sizes, graph_bytes
from etr_megatron.planner.recompute import Recomputation
from etr_megatron.weights import TrainingLayout, read_architecture

QWEN_32B = MODELS.parent / "qwen3_32b_32gpu.yaml"
SGLANG = list((MODELS.parents[1] / ".venv-sglang").glob("lib/*/site-packages/sglang/srt/arg_groups/cuda_graph_hook.py"))
GIB = 2**30


def plan(*overrides: str, gpus: int = 32, gpu_memory: float = 80.0) -> Plan:
    return make_plan(load_config(QWEN_32B, overrides), gpus, gpu_memory=gpu_memory)


def test_asynchronous_checkpoints_take_the_memory_of_a_nodes_part_of_a_checkpoint() -> None:
    at_once, later = plan(), plan("checkpoint.asynchronous=true")
    assert at_once.snapshot_on_host == 0 and "until it is written" not in render(at_once)
    part = 32_762_123_264 * (2 + 4 + 4 + 4) // 4  # of four nodes
    assert later.snapshot_on_host == part == later.as_dict()["snapshot_bytes_on_host"]
    assert f"checkpoint its copy takes {part / GIB:.1f} GiB of a node's memory until it is written" in render(later)


def peak_of_1f1b(stages: int, stage: int, microbatches: int) -> int:
    """One forward pass per later stage; then one forward, one backward; then the remaining backward passes."""
    warmup = min(stages - stage - 1, microbatches)
    order = ["F"] * warmup + ["F", "B"] * (microbatches - warmup) + ["B"] * warmup
    held, peak = 0, 0
    for kind in order:
        held += 1 if kind == "F" else -1
        peak = max(peak, held)
    assert held == 0
    return peak


@pytest.mark.parametrize("stages", [1, 2, 4, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 7])
def test_passes_in_flight_are_those_of_the_schedule(stages: int, microbatches: int) -> None:
    for stage in range(stages):
        expected = peak_of_1f1b(stages, stage, microbatches)
        assert passes_in_flight(TrainingLayout(pp=stages), stage, microbatches) == expected


def test_the_interleaved_schedule_holds_chunks_for_the_stages_behind_and_all_chunks_but_the_last() -> None:
    layout = TrainingLayout(pp=4, vpp=2)
    assert [passes_in_flight(layout, stage, 100) for stage in range(4)] == [11, 9, 7, 5]
    assert passes_in_flight(layout, 0, 3) == 6  # 3 microbatches of 2 chunks


def test_an_interleaved_plan_holds_more_passes_for_a_smaller_bubble() -> None:
    plain, interleaved = plan(), plan("parallel.vpp=2")
    # Stage 0 of 4 holds 11 passes of 8 layers instead of 4 of 16, plus the gradients of a layer, and hidden states for every
    # pass and two more for the next stage.
    split = Split(plain.work.microbatch_tokens, 4, True, 2)
    saved, gradients = saved_by_layer(plain.arch, 0, split, 4), gradients_of_layer(plain.arch, 0, split, 4)
    one = plain.work.microbatch_tokens // 4 * 5120 * 2
    assert plain.ranks[0].activations == 4 * 16 * saved + gradients + 6 * one
    assert interleaved.ranks[0].activations == 11 * 8 * saved + gradients + 13 * one
    assert interleaved.time.bubble == pytest.approx(plain.time.bubble / 2)


def test_samples_over_the_token_budget_are_microbatches_of_their_own():
    large, small = plan().work, plan("train.tokens_per_microbatch=4096").work
    assert (large.microbatches, large.microbatch_tokens) == (128, 9216)  # two samples of 4,352 tokens in each
    assert (small.microbatches, small.microbatch_tokens) == (256, 9216)


def test_interleaved_microbatches_come_in_rounds_of_one_for_every_stage():
    few = ("rollout.prompts_per_step=4", "rollout.samples_per_prompt=6", "train.minibatches=4")  # three per replica
    assert (plan(*few).work.microbatches, plan(*few).work.most_microbatches) == (2, 3)
    interleaved = plan(*few, "parallel.vpp=2")
    assert (interleaved.work.microbatches, interleaved.work.most_microbatches) == (4, 4)
    assert interleaved.time.bubble == 3 / (2 * 4)


def test_optimizer_state_is_what_the_types_and_the_replicas_say() -> None:
    shared, own = plan(), plan("train.distributed_optimizer=false", "train.overlap_param_gather=false")
    for rank, whole in zip(shared.ranks, own.ranks, strict=True):
        assert (rank.parameters, rank.gradients) == (2 * rank.elements, 4 * rank.elements)
        assert whole.optimizer == 12 * whole.elements
        assert rank.optimizer == pytest.approx(whole.optimizer / 2, abs=12)  # two replicas
    assert {rank.optimizer for rank in plan("train.optimizer_offload=true").ranks} == {0}
    assert plan("train.grads_dtype=bfloat16").ranks[0].gradients == 2 * shared.ranks[0].elements
    in_full = plan("model.dtype=float32").ranks[0]
    assert in_full.parameters == 4 * in_full.elements
    assert in_full.optimizer == pytest.approx(8 * in_full.elements / 2, abs=12)


def test_context_parallel_ranks_share_optimizer_state_too() -> None:
    without, with_cp = plan(), plan("parallel.cp=2", "parallel.pp=2")
    assert with_cp.ranks[0].elements > 1.9 * without.ranks[0].elements
    assert with_cp.ranks[0].optimizer == pytest.approx(12 * with_cp.ranks[0].elements / 4, abs=12)


def test_a_reference_model_is_a_second_set_of_weights() -> None:
    assert plan().ranks[0].reference == 0
    assert plan("objective.kl_coef=0.01").ranks[0].reference == plan().ranks[0].parameters


def test_a_reference_in_fp8_has_no_copy_for_a_backward_pass():
    fp8 = ("objective.kl_coef=0.01", "fp8.recipe=blockwise")
    rank, held = plan(*fp8).ranks[0], plan(*fp8, "fp8.param=true").ranks[0]
    matrices = (rank.parameters - 2 * rank.elements) // 2
    assert matrices > 0.9 * (rank.elements - 151_936 // 4 * 5120)
    assert rank.reference == 2 * rank.elements + matrices
    assert held.reference == held.parameters == 2 * held.elements


def test_what_leaves_for_the_rollout_is_counted_in_training_alone_and_its_way_in_time():
    stays, leaves = plan(), plan("train.offload_for_rollout=true")
    for one, other in zip(stays.ranks, leaves.ranks, strict=True):
        assert other.offloaded == one.gradients + one.optimizer and one.offloaded == 0
        away = {phase: one.phases[phase] - other.phases[phase] for phase in one.phases}
        assert away == {"train": 0, "sync": other.offloaded, "generate": other.offloaded}
    moved = max(rank.optimizer for rank in leaves.ranks)
    assert leaves.time.sync - stays.time.sync == pytest.approx(2 * moved / leaves.gpu.host_rate)
    assert plan("train.offload_for_rollout=true", "train.optimizer_offload=true").time.sync == stays.time.sync


def test_fp8_copies_of_weights_leave_for_the_rollout_unless_they_are_the_weights():
    fp8 = ("train.offload_for_rollout=true", "objective.kl_coef=0.01", "fp8.recipe=blockwise")
    rank, held = plan(*fp8).ranks[0], plan(*fp8, "fp8.param=true").ranks[0]
    copies = rank.parameters + rank.reference - 2 * 2 * rank.elements
    assert rank.offloaded == rank.gradients + rank.optimizer + copies and copies > 0
    assert held.offloaded == held.gradients + held.optimizer


def test_weights_held_in_fp8_are_sent_from_a_copy_in_bf16():
    rank, held = plan("fp8.recipe=blockwise").ranks[0], plan("fp8.recipe=blockwise", "fp8.param=true").ranks[0]
    assert held.export - rank.export == rank.parameters - 2 * rank.elements > 0


def test_the_embedded_engines_cache_is_that_of_its_largest_batch():
    config = load_config(QWEN_32B.with_name("qwen3_8b_8gpu.yaml"), ["rollout.backend=embedded", "rollout.batch_samples=16"])
    planned = make_plan(config, 8)
    rank = planned.ranks[0]
    assert rank.embedded == planned.server.weights
    assert rank.cache == 16 * 9216 * 2 * 36 * 8 * 128 * 2  # samples, tokens, keys and values, layers, heads, width, bytes
    assert rank.phases["generate"] == rank.resident + rank.cache
    assert rank.phases["train"] == rank.resident + rank.activations + rank.head
    large = load_config(QWEN_32B.with_name("qwen3_8b_8gpu.yaml"), ["rollout.backend=embedded"])
    assert "rollout.batch_samples=32" in [suggestion.setting for suggestion in suggestions(large, make_plan(large, 8))]


def test_a_server_caches_a_latent_model_s_latents_on_every_gpu_and_the_embedded_engine_its_keys_and_values() -> None:
    path = QWEN_32B.with_name("glm4.7_flash_16gpu.yaml")
    together = ["sglang.dp_attention=1", "sglang.arguments=[]"]
    of_four, of_two = (make_plan(load_config(path, [*together, f"sglang.tp={n}", f"sglang.ep={n}"]), 16).server for n in (4, 2))
    assert of_four.token == of_two.token == 47 * (512 + 64) * 2
    copies = 47 * 20 * (192 + 256) * 512  # of the up-projections, for attention to the latents
    for server, tp in ((of_four, 4), (of_two, 2)):
        assert server.weights == 2 * (server.parameters + copies // tp)
        assert server.graphs == (2 * (512 if tp == 4 else 256) + 1536) * 2**20
    embedded = make_plan(load_config(path, ["rollout.backend=embedded", "train.offload_for_rollout=false"]), 16).server
    assert (embedded.token, embedded.weights) == (47 * 20 * (256 + 256) * 2, 2 * embedded.parameters)


def test_a_server_with_attention_in_parallel_has_a_cache_on_every_gpu_and_all_of_attention() -> None:
    path = QWEN_32B.with_name("glm4.7_flash_16gpu.yaml")
    split, parallel = (make_plan(load_config(path, ["sglang.arguments=[]", f"sglang.dp_attention={n}"]), 16) for n in (1, 4))
    one, four = split.server, parallel.server
    # Of each of 47 layers: projections up from latents, and the output's; those down to latents are whole in either case.
    attention = 47 * 20 * (768 * (192 + 64) + 512 * (192 + 256) + 256 * 2048)
    copies = 47 * 20 * (192 + 256) * 512
    assert four.parameters - one.parameters == (attention + 154880 * 2048) * 3 // 4  # and the input embedding
    assert four.weights - one.weights == 2 * (four.parameters - one.parameters + copies * 3 // 4)
    experts = 46 * 64 * 3 * 2048 * 1536 // 4
    fp8 = make_plan(load_config(path, ["sglang.fp8=true"]), 16).server
    assert (four.experts, one.experts, fp8.experts) == (2 * experts, 2 * experts, experts + 4 * experts // 128**2)
    assert four.token == one.token and one.cache_tokens == (one.pool - one.weights) // one.token
    assert four.cache_tokens == 4 * ((four.pool - four.weights) // four.token) > 3 * one.cache_tokens
    assert parallel.cache_samples == 4 * ((four.pool - four.weights) // four.token // parallel.work.longest)
    # As SGLang estimates: more than 300 sequences of each of the four ranks.
    assert four.graphs - one.graphs == 512 * 4 * 9 * 2**20 // 2
    assert "4 servers of TP4 with attention of DP4, on the ranks' GPUs" in render(parallel)


def test_heads_that_fewer_gpus_share_take_more_of_their_cache() -> None:
    shared = plan("sglang.dp_attention=2").server
    assert (shared.token, shared.caches) == (2 * 64 * 4 * 128 * 2, 2)  # four of eight heads on each of two GPUs


def test_room_for_gathered_batches_is_left_by_sglang_alone() -> None:
    given, chosen = (
        plan(
            "sglang.dp_attention=2",
            f"sglang.mem_fraction={share}",
            "sglang.placement=dedicated",
            "sglang.servers=1",
            "sglang.sync=broadcast",
            gpus=64,
        ).server
        for share in ("0.85", "null")
    )
    assert given.pool == int(0.85 * 80 * GIB) and given.pool - chosen.pool == 2 * 512 * 9 * 2**20 // 2
    small = SglangConfig(dp_attention=3, tp=6, arguments=("--cuda-graph-max-bs", "16"))
    assert graph_bytes(small, 80) == (2 * 16 + 3 * 3 * 16 + 8 * 58) * 2**20


def test_a_layers_saved_bytes_are_its_tensors() -> None:
    arch = read_architecture(MODELS / "Qwen3-8B")
    tokens, hidden, q, kv, mlp = 100, 4096, 32 * 128, 8 * 128, 12288
    # bf16: each norm's input and output; q and k before their norms; q, k, v; attention's output; gate, up, their product.
    tensors = 4 * hidden + (q + kv) + (q + 2 * kv) + q + 3 * mlp
    numbers = 2 + 32 + (32 + 8)  # fp32: for two norms, attention's heads, and the q and k norms' heads
    expected = 2 * tokens * tensors + 4 * tokens * numbers
    assert saved_by_layer(arch, 0, Split(tokens, 1, False, 2), 1) == expected
    assert saved_by_layer(arch, 0, Split(tokens, 2, True, 2), 2) == expected // 2


def in_fp8(recipe: str, *, tp: int = 1) -> int:
    return saved_by_layer(read_architecture(MODELS / "Qwen3-8B"), 0, Split(128, tp, tp > 1, 2, recipe), tp)


def test_in_fp8_a_layer_keeps_one_quantised_copy_of_what_matrix_products_alone_need() -> None:
    tokens, hidden, q, kv, mlp = 128, 4096, 32 * 128, 8 * 128, 12288
    # In bf16 as before: inputs of the norms, the q and k norms, attention and the gate, and attention's output.
    own = 2 * tokens * (2 * hidden + (q + kv) + (q + 2 * kv) + q + 2 * mlp) + 4 * tokens * (2 + 32 + 40)
    inputs = tokens * (2 * hidden + mlp)  # inputs of attention's and the MLP's first product, and of the MLP's last
    assert in_fp8("tensorwise") == own + inputs
    assert in_fp8("blockwise") == own + inputs + 4 * inputs // 128  # fp32 scales
    assert in_fp8("mxfp8") == own + inputs + inputs // 32
    assert in_fp8("delayed") == own + inputs + tokens * q  # attention's output a second time
    assert in_fp8("tensorwise", tp=2) == (own + inputs) // 2
    assert in_fp8("none") == own + 2 * inputs


def test_in_fp8_the_router_keeps_the_norm_of_experts_as_it_is() -> None:
    arch = read_architecture(MODELS / "Qwen3-30B-A3B")
    assert arch.experts is not None
    plain, fp8 = (saved_by_layer(arch, 0, Split(128, 1, False, 2, recipe), 1) for recipe in ("none", "tensorwise"))
    routed = int(128 * arch.experts.per_token * EXPERT_IMBALANCE)
    assert plain - fp8 == 128 * arch.hidden_size + routed * (arch.hidden_size + arch.experts.intermediate_size)


@pytest.mark.parametrize(("name", "q_rank"), [("GLM-4.7-Flash", 768), ("DeepSeek-V3", 1536), ("DeepSeek-V3", None)])
def test_in_fp8_latent_attention_keeps_the_input_of_both_down_projections(name: str, q_rank: int | None) -> None:
    arch = read_architecture(MODELS / name)
    assert arch.latent is not None
    arch = replace(arch, latent=replace(arch.latent, q_rank=q_rank))
    saved = {recipe: saved_by_layer(arch, 0, Split(512, 4, True, 2, recipe), 1) for recipe in ("none", "tensorwise", "delayed")}
    product, norm, latents = 512 * arch.intermediate_size // 4, 128 * arch.hidden_size, 128 * ((q_rank or 0) + 512)
    # The MLP's input and product, the normed latents, and the first norm's output: whole once, or quantised twice.
    assert saved["none"] - saved["tensorwise"] == 2 * (product + 2 * norm + latents) - (product + 3 * norm + latents)
    assert saved["delayed"] - saved["tensorwise"] == 512 * arch.heads // 4 * arch.value_dim


def test_in_fp8_a_shared_expert_keeps_its_product_and_with_delayed_scales_a_copy_of_its_input() -> None:
    arch = read_architecture(MODELS / "GLM-4.5-Air")
    assert arch.experts is not None
    without = replace(arch, experts=replace(arch.experts, shared_size=0))

    def added(recipe: str) -> int:
        more, less = (saved_by_layer(one, 1, Split(512, 4, True, 2, recipe), 1) for one in (arch, without))
        return more - less

    product, norm = 512 * 1408 // 4, 512 // 4 * 4096
    assert added("none") == 2 * 3 * product
    assert added("tensorwise") == 2 * 2 * product + product
    assert added("delayed") == 2 * 2 * product + product + norm


def test_layers_that_stay_in_bf16_are_counted_so() -> None:
    config = QWEN_32B.with_name("qwen3_32b_64gpu_async_fp8.yaml")
    every, inner = (make_plan(load_config(config, [f"fp8.first_last_layers_bf16={value}"]), 64) for value in ("false", "true"))
    split = Split(every.work.microbatch_tokens, 4, True, 2)
    whole, cut = (saved_by_layer(every.arch, 0, replace(split, fp8=recipe), 4) for recipe in ("none", "blockwise"))
    layer = 2 * 5120 * 8192 + 2 * 5120 * 1024 + 3 * 5120 * 25600  # q and output, k and v, MLP
    copies = [a.parameters - b.parameters for a, b in zip(every.ranks[::8], inner.ranks[::8], strict=True)]
    assert copies == [2 * layer // 4, 0, 0, 2 * layer // 4]
    differences = [b.activations - a.activations for a, b in zip(every.ranks[::8], inner.ranks[::8], strict=True)]
    assert differences == [4 * (whole - cut), 0, 0, whole - cut]  # as many passes in flight


def test_graphs_of_colocated_servers_stay_in_every_phase() -> None:
    assert graph_bytes(SglangConfig(), 80) == (2 * 256 + 8 * 58) * 2**20  # sequences, and token counts up to 8192
    assert graph_bytes(SglangConfig(tp=4), 80) == graph_bytes(SglangConfig(tp=8), 140) == (2 * 512 + 8 * 58) * 2**20
    assert graph_bytes(SglangConfig(), 48) == (2 * 32 + 8 * 50) * 2**20
    assert graph_bytes(SglangConfig(arguments=("--disable-cuda-graph",)), 80) == 0
    for asked in (("--cuda-graph-max-bs", "16"), ("--cuda-graph-max-bs-decode=16",)):
        assert graph_bytes(SglangConfig(arguments=asked), 80) == (2 * 16 + 8 * 58) * 2**20
    with_graphs, without = plan(), plan("sglang.arguments=[--disable-cuda-graph]")
    for rank, other in zip(with_graphs.ranks, without.ranks, strict=True):
        assert rank.graphs == graph_bytes(with_graphs.config.sglang, 80)
        assert {rank.phases[name] - other.phases[name] for name in rank.phases} == {rank.graphs}
    apart = plan("sglang.placement=dedicated", "sglang.servers=1", "sglang.sync=broadcast", gpus=64)
    assert {rank.graphs for rank in apart.ranks} == {0}


@pytest.mark.skipif(not SGLANG, reason="no .venv-sglang: `bash tools/setup_env.sh --sglang` makes it")
def test_prefill_is_captured_for_as_many_numbers_of_tokens_as_in_sglang() -> None:
    parts = ast.parse(SGLANG[0].read_text()).body  # importing the module needs more than this function does
    (sizes,) = (part for part in parts if getattr(part, "name", "") == "generate_prefill_cuda_graph_batch_sizes")
    found: dict[str, Callable[[int], list[int]]] = {}
    exec(compile(ast.Module([sizes], []), SGLANG[0], "exec"), found)
    for most in (2048, 4096, 8192, 16384):
        assert _prefill_sizes(most) == found[sizes.name](most)


def test_recomputation_leaves_layer_inputs_and_one_layer() -> None:
    arch = read_architecture(MODELS / "Qwen3-8B")
    layout, split = TrainingLayout(tp=2, pp=2, dp=1), Split(1000, 2, True, 2)
    saved = saved_by_layer(arch, 0, split, 2)
    one = 500 * 4096 * 2  # tokens are split over TP
    # Two microbatches of 18 layers are in flight; the recomputed layer's saved tensors include its input. Four hidden states
    # are handed on. At the gate: gradients of its halves, split over TP, and of the layer's output, whole and split.
    beside = 1000 * (2 * 12288 // 2 + 4096 + 4096 // 2) * 2 + 4 * one
    assert stage_activations(arch, layout, 0, split, 8, Recomputation(layers=None)) == (2 * 18 - 1) * one + saved + beside
    assert stage_activations(arch, layout, 0, split, 8, Recomputation()) == 2 * 18 * saved + beside


def test_only_the_last_stage_has_the_head_and_servers_are_counted_where_they_share_the_gpus() -> None:
    shared = plan()
    assert [rank.head > 0 for rank in shared.ranks] == [False] * 24 + [True] * 8
    assert {rank.server for rank in shared.ranks} == {40 * GIB}
    apart = plan("sglang.placement=dedicated", "sglang.servers=1", "sglang.sync=broadcast", gpus=64)
    assert {rank.server for rank in apart.ranks} == {0}
    assert apart.cluster.ranks == 32


def test_a_head_without_an_fp32_buffer_sums_its_gradient_beside_it():
    full, half = plan(), plan("train.grads_dtype=bfloat16")
    vocab = 151_936 // 4 + 32  # padded to 128 rows per rank
    rows, norm, chunk = 9216 * 5120, 9216 // 4 * 5120 * 2, 1024 * vocab * (2 * 4 + 2)
    assert full.ranks[-1].head == 2 * norm + rows * (2 + 4) + chunk
    assert half.ranks[-1].head == full.ranks[-1].head + vocab * 5120 * 4
    assert half.ranks[0].head == full.ranks[0].head == 0


def test_a_colocated_server_is_counted_on_the_gpus_that_it_has() -> None:
    config = load_config(QWEN_32B.with_name("qwen3_8b_8gpu.yaml"), ["sglang.servers=3", "sglang.tp=2"])
    pools = [rank.server for rank in make_plan(config, 16).ranks]
    assert pools == [32 * GIB] * 6 + [0] * 10
    assert [rank.server > 0 for rank in plan("sglang.servers=1").ranks] == ([True] * 4 + [False] * 4) * 4


def test_the_cache_is_what_the_servers_weights_leave() -> None:
    server = plan().server
    arch = read_architecture(MODELS / "Qwen3-32B")
    assert server.token == 2 * 64 * 2 * 128 * 2  # keys and values, layers, heads of a GPU, width, bytes
    assert server.cache_tokens == (40 * GIB - server.weights) // server.token
    assert server.weights == pytest.approx(2 * plan().parameters / 4, rel=2e-3)
    fp8 = plan("sglang.fp8=true").server
    embeddings = 2 * arch.vocab_size * arch.hidden_size / 4
    assert fp8.weights == pytest.approx(server.weights / 2 + embeddings, rel=1e-2)


def test_what_does_not_fit_is_told_with_settings_that_help_and_each_does() -> None:
    config = load_config(QWEN_32B, [])
    tight = make_plan(config, 32, gpu_memory=48.0)
    assert not tight.fits
    advice = suggestions(config, tight, gpu_memory=48.0)
    assert advice
    for suggestion in advice:
        changed = make_plan(load_config(QWEN_32B, suggestion.setting.split()), 32, gpu_memory=48.0)
        assert changed.tightest.peak == suggestion.peak
        assert changed.tightest.peak < tight.tightest.peak
        assert changed.fits == suggestion.fits


def test_the_optimizers_step_holds_a_copy_of_bfloat16_gradients_which_counts_where_activations_are_smaller() -> None:
    full, half = plan().ranks[0], plan("train.grads_dtype=bfloat16").ranks[0]
    assert full.step == 0 and half.step == 4 * half.optimizer // 12
    bare = replace(half, activations=0, head=0)
    assert bare.phases["train"] - replace(bare, step=0).phases["train"] == half.step < half.activations
    assert plan("train.grads_dtype=bfloat16", "train.optimizer_offload=true").ranks[0].step == 0


def test_a_float32_models_offloaded_optimizer_has_weights_of_its_own() -> None:
    """Megatron moves its views of the model's weights to the CPU, and copies of them back."""
    plain, offloaded = (plan("model.dtype=float32", *more).ranks[0] for more in ((), ("train.offload_for_rollout=true",)))
    assert (plain.optimizer, offloaded.optimizer) == (8 * plain.elements // 2, 12 * plain.elements // 2)


def test_servers_whose_weights_fill_the_pool_do_not_fit() -> None:
    full = plan("sglang.mem_fraction=0.15")
    assert full.server.cache_tokens == 0
    assert not full.fits
