"""Memory that the planner counts for backward passes, against what Megatron's layers and schedules keep on CPU.

Norms and rotary embedding are stand-ins that save what Transformer Engine's do (`tests/activation_jobs.py`).
"""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import DeepseekV3ForCausalLM, Glm4MoeForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from etr_megatron.config import load_config
from etr_megatron.planner import activations
from etr_megatron.planner.activations import (
    Split,
    beside_recomputed_attention,
    gradients_of_layer,
    head_bytes,
    layer_input,
    passes_in_flight,
    saved_by_layer,
    stage_activations,
)
from etr_megatron.planner.recompute import Recomputation
from etr_megatron.vocab_parallel import VocabShard
from etr_megatron.vocab_parallel.head_chunks import HeadConfig
from etr_megatron.vocab_parallel.loss import single_pass_bytes
from etr_megatron.weights import Architecture, TrainingLayout, padded_vocab_size, read_architecture
from tests.activation_jobs import LayerPass
from tests.gang import Gangs
from tests.hf_models import VOCAB, write_model

JOBS = "tests.activation_jobs"
TP1, TP2, SP = "parallel.tp=1", "parallel.tp=2", "parallel.sequence_parallel=true"
FP32 = "train.moe_router_fp32=true"
TOKENS = 128


def samples(count: int, tokens: int = TOKENS) -> list[tuple[list[int], list[int]]]:
    """Samples of equal length with a prompt of one token, so all other tokens are loss rows."""
    chosen = random.Random(3)
    return [([7], [chosen.randrange(VOCAB) for _ in range(tokens - 1)]) for _ in range(count)]


def frequencies(arch: Architecture, tokens: int = TOKENS) -> int:
    """Bytes of the rotary embedding's angles, which a model chunk computes once for all its layers and passes. With latent
    attention a layer saves their cosines and sines instead."""
    return 0 if arch.latent else int(4 * tokens * arch.head_dim * arch.rotary_fraction)


def with_routed(arch: Architecture, split: Split, etp: int, found: LayerPass) -> mock._patch:
    """Patch the planner to use the tokens that a rank's experts really received, not the imbalance that it assumes."""
    even = split.whole * arch.experts.per_token * etp if arch.experts is not None else 1
    return mock.patch.object(activations, "EXPERT_IMBALANCE", Fraction(found.routed, even))


LAYERS = {
    "qwen3": ("qwen3", 1, [TP1], 1),
    "qwen3_tp2": ("qwen3", 2, [TP2], 2),
    "qwen3_tp2_sp": ("qwen3", 2, [TP2, SP], 2),
    "llama": ("llama", 1, [TP1], 1),
    "llama_tp2_sp": ("llama", 2, [TP2, SP], 2),
    "qwen2_with_biases": ("qwen2", 1, [TP1], 1),
    "qwen3_shared_heads": ("one_kv_head", 2, [TP2, SP], 2),
    "experts": ("qwen3_moe", 1, [TP1], 1),
    "experts_tp2_sp_ep2": ("qwen3_moe", 2, [TP2, SP, "parallel.ep=2", "parallel.etp=1"], 1),
    "experts_tp2_sp_router_fp32": ("qwen3_moe", 2, [TP2, SP, FP32], 2),
    # Layers with and without experts; the experts' weights are not normalised.
    "some_experts": ("qwen3_moe_dense", 1, [TP1], 1),
    # Shared experts, sigmoids, a part of each head turned.
    "shared_experts": ("glm4_moe", 1, [TP1], 1),
    "shared_experts_tp2_sp_ep2": ("glm4_moe", 2, [TP2, SP, "parallel.ep=2", "parallel.etp=1"], 1),
    # Values narrower than keys; a dense layer, and experts in groups.
    "latents": ("deepseek_v3", 1, [TP1], 1),
    "latents_tp2_sp": ("deepseek_v3", 2, [TP2, SP], 2),
    "latents_tp2_sp_ep2": ("deepseek_v3", 2, [TP2, SP, "parallel.ep=2", "parallel.etp=1"], 1),
    "latents_of_keys_alone": ("glm4_moe_lite", 2, [TP2, SP], 2),
}


@pytest.fixture(scope="module")
def models(hf_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shared") / "qwen3"
    return hf_models | {"one_kv_head": write_model("qwen3", folder, num_key_value_heads=1)}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_keeps_to_the_byte_what_is_counted(gangs: Gangs, models: dict[str, str], case: str) -> None:
    family, world, overrides, etp = LAYERS[case]
    arch, tp = read_architecture(models[family]), 2 if TP2 in overrides else 1
    replicas = world // tp
    split = Split(TOKENS, tp, SP in overrides, 2, router_fp32=FP32 in overrides)
    job = dict(model=models[family], sequences=samples(replicas), overrides=overrides, updates=1)
    for reply in gangs(world).run(f"{JOBS}:kept", **job):
        passes = reply["passes"]
        assert [one.layer for one in passes] == list(range(arch.layers))
        passes[0].saved -= frequencies(arch)
        for one in passes:
            with with_routed(arch, split, etp, one):
                assert saved_by_layer(arch, one.layer, split, etp) == one.saved
        assert reply["left"] == {"layers": frequencies(arch), "outputs": 0}


@pytest.mark.parametrize("case", ["qwen3", "qwen3_tp2_sp", "qwen3_shared_heads", "latents_tp2_sp"])
def test_a_layer_whose_attention_is_recomputed_keeps_the_whole_output_of_its_projection_or_latents_copy_of_v(
    gangs: Gangs, models: dict[str, str], case: str
) -> None:
    family, world, overrides, etp = LAYERS[case]
    arch, split = read_architecture(models[family]), Split(TOKENS, world, SP in overrides, 2)
    beside = beside_recomputed_attention(arch, split)
    settings = [*overrides, "train.recompute=selective"]
    job = dict(model=models[family], sequences=samples(1), overrides=settings, updates=1)
    for reply in gangs(world).run(f"{JOBS}:kept", **job):
        of_mask = 4  # the kind of the mask, which is on the CPU even with a GPU
        for one in reply["passes"][1:]:
            with with_routed(arch, split, etp, one):
                assert one.saved - of_mask == saved_by_layer(arch, one.layer, split, etp) + beside
    hows = Recomputation(attention=True), Recomputation()
    recomputed, plain = (stage_activations(arch, TrainingLayout(tp=world), 0, split, 1, how) for how in hows)
    assert recomputed - plain == arch.layers * beside
    assert (beside > 0) == (arch.latent is None)


def test_the_stand_ins_train_as_the_policys_own_layers_do(gangs: Gangs, hf_models: dict[str, str]) -> None:
    job = {"model": hf_models["qwen3_moe"], "sequences": samples(2), "overrides": [TP1]}
    (norms,) = gangs(1).run(f"{JOBS}:gradient_norms", **job)
    assert norms[0] == pytest.approx(norms[1], rel=0.02) and norms[0] > 0


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model("qwen3", tmp_path_factory.mktemp("deep") / "qwen3", layers=8)


SCHEDULES = {
    "pp2": (2, 1, 4),
    "pp2_vpp2": (2, 2, 6),
    "pp4": (4, 1, 6),
    "pp4_few_microbatches": (4, 1, 2),
    "pp4_vpp2": (4, 2, 8),
    "pp4_vpp2_all_forward_first": (4, 2, 4),
}
FOUR = {name for name, (stages, *_) in SCHEDULES.items() if stages == 4}


NONE, FULL = "train.recompute=none", "train.recompute=full"
BLOCK = "train.megatron={recompute_granularity: full, recompute_method: block, recompute_num_layers: 1}"


@pytest.mark.parametrize(
    ("schedule", "recompute"),
    [
        pytest.param(name, recompute, marks=[pytest.mark.slow] * (name in FOUR), id=f"{name}-{how}")
        for how, recompute, schedules in (
            ("none", NONE, SCHEDULES),
            ("full", FULL, ["pp2"]),
            ("block", BLOCK, ["pp2", "pp4_vpp2"]),
        )
        for name in schedules
    ],
)
def test_a_stage_holds_the_passes_that_are_counted(gangs: Gangs, deep: str, schedule: str, recompute: str) -> None:
    pp, vpp, microbatches = SCHEDULES[schedule]
    overrides = [TP1, f"parallel.pp={pp}", f"parallel.vpp={vpp}", recompute]
    replies = gangs(pp).run(f"{JOBS}:kept", model=deep, sequences=samples(microbatches), overrides=overrides)
    arch, layout, split = read_architecture(deep), TrainingLayout(pp=pp, vpp=vpp), Split(TOKENS, 1, False, 2)
    layers, one, saved = arch.layers // pp // vpp, layer_input(arch, split), saved_by_layer(arch, 0, split, 1)
    for stage, reply in enumerate(replies):
        held, passes = reply["peak"]["layers"] - vpp * frequencies(arch), passes_in_flight(layout, stage, microbatches)
        expected = passes * layers * saved
        if recompute != NONE:
            kept = one + (layers - 1) * saved if recompute == BLOCK else layers * one
            # A layer is recomputed when what follows it in the chunk is freed.
            expected = passes * kept + (max(0, (2 - layers) * saved - one) if recompute == BLOCK else saved - one)
        ahead = held - expected  # inputs of passes that have not begun, or whose backward pass has just ended
        assert ahead in (0, one, 2 * one)
        how = Recomputation.of(load_config(None, [recompute]).train)
        planned = stage_activations(arch, layout, stage, split, microbatches, how)
        planned -= gradients_of_layer(arch, 0, split, 1)
        assert planned - 2 * one <= held + reply["peak"]["outputs"] <= planned
        assert reply["left"]["outputs"] == 0


def of_sizes(path: Path, sizes: tuple[int, int, int, int], **more: int) -> str:
    """Write a one-layer model. sizes: hidden, MLP, query heads, key and value heads."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    common = dict(vocab_size=VOCAB, num_hidden_layers=1, tie_word_embeddings=False, max_position_embeddings=2048)
    kind = Glm4MoeForCausalLM if "n_routed_experts" in more else Qwen3MoeForCausalLM if more else Qwen3ForCausalLM
    if "kv_lora_rank" in more:
        kind = DeepseekV3ForCausalLM
    else:
        common["head_dim"] = 16
    torch.manual_seed(1)
    kind(kind.config_class(**common, **dict(zip(names, sizes, strict=True)), **more)).save_pretrained(path)
    return str(path)


SHAPES = {
    "qwen3_8b": ((128, 384, 8, 2), {}),
    "qwen3_32b": ((128, 640, 12, 2), {}),
    "qwen3_30b_a3b": ((128, 384, 16, 2), dict(num_experts=32, num_experts_per_tok=8, moe_intermediate_size=48)),
    "glm4.5_air": (
        (128, 344, 24, 2),
        dict(
            n_routed_experts=32,
            num_experts_per_tok=8,
            moe_intermediate_size=44,
            n_shared_experts=1,
            first_k_dense_replace=0,
            attention_bias=True,
        ),
    ),
    "deepseek_v3": (
        (128, 330, 18, 18),
        dict(
            q_lora_rank=28,
            kv_lora_rank=10,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=32,
            num_experts_per_tok=8,
            moe_intermediate_size=36,
            n_group=8,
            topk_group=4,
            first_k_dense_replace=0,
        ),
    ),
    "glm4.7_flash": (
        (128, 640, 20, 20),
        dict(
            q_lora_rank=48,
            kv_lora_rank=32,
            qk_nope_head_dim=12,
            qk_rope_head_dim=4,
            v_head_dim=16,
            n_routed_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=96,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
        ),
    ),
}
"""Widths in roughly the proportions of those models."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "overrides"),
    [
        ("qwen3_8b", [TP1]),
        ("qwen3_32b", [TP1]),
        ("qwen3_32b", [TP2, SP]),
        ("qwen3_30b_a3b", [TP1]),
        ("qwen3_30b_a3b", [TP2, SP]),
        ("qwen3_30b_a3b", [TP2, SP, FP32]),
        ("glm4.5_air", [TP1]),
        ("deepseek_v3", [TP1]),
        ("deepseek_v3", [TP2, SP]),
        ("glm4.7_flash", [TP1]),
    ],
)
def test_a_layers_gradients_are_as_large_as_is_counted(gangs: Gangs, tmp_path: Path, shape: str, overrides: list[str]) -> None:
    sizes, more = SHAPES[shape]
    model, tp = of_sizes(tmp_path, sizes, **more), 2 if TP2 in overrides else 1
    arch = read_architecture(model)
    job = dict(model=model, batches=[samples(1, tokens) for tokens in (512, 256)], overrides=overrides)
    long, short = gangs(tp).run(f"{JOBS}:around_backward", **job)[0]
    # The difference of token counts, so that gradients of weights cancel.
    split = Split(512 - 256, tp, tp > 1, 2, router_fp32=FP32 in overrides)
    with mock.patch.object(activations, "EXPERT_IMBALANCE", 1):
        saved, counted = saved_by_layer(arch, 0, split, tp), gradients_of_layer(arch, 0, split, tp)
    measured = long - short - (saved - layer_input(arch, split))  # the input existed before
    measured -= 2 * 4 * (512 - 256)  # rows' log-probs and entropies, kept until values are read after the last pass
    # With experts 0.58 and 1.14 times `saved`, where ETP gathers in fp32 2.18 times; without 0.53 times with TP.
    if counted > saved // 2:
        assert measured == pytest.approx(counted, rel=0.06 if more else 0.001)
    else:
        least = 0.28 if arch.latent else 0.41
        assert least * saved < measured < (least + 0.04) * saved


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose hidden states are larger than everything else per row."""
    return of_sizes(tmp_path_factory.mktemp("wide"), (1024, 64, 4, 2))


@pytest.mark.parametrize(
    ("world", "overrides", "tokens", "grads"),
    [
        (1, [TP1], 1024, "float32"),
        (1, [TP1], 256, "bfloat16"),
        (2, [TP2], 256, "float32"),
        (2, [TP2, SP], 256, "bfloat16"),
    ],
)
def test_the_head_holds_what_is_counted(
    gangs: Gangs, wide: str, world: int, overrides: list[str], tokens: int, grads: str
) -> None:
    rows = 64
    settings = [*overrides, f"train.head_chunk_rows={rows}", f"train.grads_dtype={grads}"]
    found = gangs(world).run(f"{JOBS}:around_head", model=wide, sequences=samples(1, tokens), overrides=settings)[0]
    arch, split = read_architecture(wide), Split(tokens, world, SP in overrides, 2)
    size, hidden = padded_vocab_size(VOCAB, world) // world, arch.hidden_size
    shard = VocabShard(size, VOCAB)  # rank 0's
    cpu = dict(dtype=torch.bfloat16, device=torch.device("cpu"), chunk_rows=rows)
    chunk = single_pass_bytes(tokens, hidden, shard, **cpu) - 4 * tokens * hidden - 16 * tokens
    with mock.patch.object(activations, "_chunk_bytes", lambda *_: chunk):  # as on CPU: logits and products in parts
        planned = head_bytes(arch, split, rows, own_sum=grads == "bfloat16")
    # The last norm's input existed before. Scalars per row, such as advantages, are not counted.
    assert found == pytest.approx(planned - layer_input(arch, split), abs=128 * tokens)


def test_a_chunk_of_the_head_is_what_the_head_says_itself() -> None:
    gpu = torch.device("cuda")
    with mock.patch("etr_megatron.vocab_parallel.triton_rows.is_available", lambda _device: True):
        own = single_pass_bytes(4096, 64, VocabShard(512, 512), dtype=torch.bfloat16, device=gpu)
    assert activations._chunk_bytes(Split(4096, 1, False, 2), 1024, 512) == own - 4 * 4096 * 64 - 16 * 4096
    assert HeadConfig(VocabShard(512, 512, group=object())).buffers_on(gpu) == 2  # type: ignore[arg-type]
    assert activations._chunk_bytes(Split(4096, 2, True, 2), 1024, 512) == own - 4 * 4096 * 64 - 16 * 4096 + 4 * 1024 * 512
