"""Every weight in every layout, without processes: which rank holds what, and HF -> shards -> HF bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from etr_megatron.platform import prepare_megatron
from etr_megatron.weights import (
    Architecture,
    ServerLayout,
    TrainingLayout,
    Weight,
    join_shards,
    megatron_shard,
    read_shard,
    server_shard,
    weights_of,
)
from tests.weight_cases import ARCHITECTURES, megatron_parameter, read_from, server_parameter, tensors_of

LAYOUTS = [
    *(TrainingLayout(tp=tp, pp=pp, ep=ep, dp=2, vpp=1) for tp, pp, ep in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2))),
    TrainingLayout(tp=2, pp=2, dp=1, ep=2, etp=1),
    TrainingLayout(tp=4, pp=2, dp=1, ep=2, etp=2),
    TrainingLayout(tp=4, pp=1, dp=1, ep=1, etp=1),
    TrainingLayout(tp=1, pp=2, dp=6, ep=3),
    TrainingLayout(tp=2, pp=1, dp=4, ep=2, etp=4),
]
TENSORS = {name: tensors_of(arch) for name, arch in ARCHITECTURES.items()}


def name_of(layout: TrainingLayout) -> str:
    name = f"tp{layout.tp}-pp{layout.pp}-dp{layout.dp}-ep{layout.ep}"
    return name if layout.etp is None else f"{name}-etp{layout.etp}"


def ranks_by_megatron(layout: TrainingLayout) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Per rank (stage, tensor-parallel rank) and (expert-parallel, expert-tensor-parallel rank), by Megatron's generator."""
    prepare_megatron()
    from megatron.core.parallel_state import RankGenerator

    experts_dp = layout.world // (layout.expert_tp * layout.ep * layout.pp)
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=1, order=order)
    expert = RankGenerator(tp=layout.expert_tp, ep=layout.ep, dp=experts_dp, pp=layout.pp, cp=1, order=order)

    def place(generator: RankGenerator, token: str, rank: int) -> int:
        return next(group.index(rank) for group in generator.get_ranks(token) if rank in group)

    everyone = range(layout.world)
    return (
        [(place(dense, "pp", rank), place(dense, "tp", rank)) for rank in everyone],
        [(place(expert, "ep", rank), place(expert, "tp", rank)) for rank in everyone],
    )


def wanted_parameter(
    weight: Weight,
    arch: Architecture,
    tensors: dict[str, torch.Tensor],
    layout: TrainingLayout,
    dense: tuple[int, int],
    expert: tuple[int, int],
) -> torch.Tensor | None:
    """What a rank with these coordinates holds of a weight; None if nothing."""
    stage, tp_rank = dense
    if weight.layer is not None:
        held = weight.layer * layout.pp // arch.layers == stage
    elif weight.megatron == "embedding.word_embeddings.weight":
        held = stage == 0 or (arch.tied_embeddings and stage == layout.pp - 1)
    else:
        held = stage == layout.pp - 1
    hf = [tensors[name] for name in weight.hf]
    if weight.expert is None:
        return megatron_parameter(weight, arch, hf, layout.tp, tp_rank) if held else None
    ep_rank, etp_rank = expert
    held = held and weight.expert * layout.ep // arch.experts.count == ep_rank
    return megatron_parameter(weight, arch, hf, layout.expert_tp, etp_rank) if held else None


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_rank_holds_what_megatron_puts_there_and_the_shards_make_the_checkpoint_again(name, layout):
    arch, tensors = ARCHITECTURES[name], TENSORS[name]
    dense, expert = ranks_by_megatron(layout)
    rebuilt = {}
    for weight in weights_of(arch):
        shards = {}
        placed_shards = layout.placed_shards(weight, arch)
        for placed in placed_shards:
            part = read_shard(weight, placed.shard, read_from(tensors))
            assert list(placed.ranks) == sorted(placed.ranks)
            for rank in placed.ranks:
                assert rank not in shards
                shards[rank] = part
        for rank in range(layout.world):
            wanted = wanted_parameter(weight, arch, tensors, layout, dense[rank], expert[rank])
            assert (wanted is not None) == (rank in shards), (weight.megatron, rank)
            assert wanted is None or torch.equal(shards[rank], wanted), (weight.megatron, rank)
        rebuilt.update(join_shards(weight, [(placed.shard, shards[placed.ranks[0]]) for placed in placed_shards]))
    assert rebuilt.keys() == tensors.keys()
    assert all(torch.equal(rebuilt[name], tensors[name]) for name in tensors)


def test_an_interleaved_schedule_deals_chunks_of_layers_out_in_turn():
    arch, layout = ARCHITECTURES["qwen3"], TrainingLayout(pp=2, vpp=2)
    assert [layout.chunk_of(layer, arch) for layer in range(4)] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    stages = {weight.layer: layout.stages_of(weight, arch) for weight in weights_of(arch) if weight.layer is not None}
    assert stages == {0: (0,), 1: (1,), 2: (0,), 3: (1,)}


def layer_offset(layout: TrainingLayout, layers: int, stage: int, chunk: int) -> int:
    """First layer of a model chunk, by Megatron's own function."""
    prepare_megatron()
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        pipeline_dtype=torch.float32,
    )
    return get_transformer_layer_offset(config, chunk if layout.vpp > 1 else None, stage)


@pytest.mark.parametrize(("pp", "vpp", "layers"), [(2, 1, 8), (2, 2, 8), (2, 4, 8), (4, 2, 8), (4, 3, 24)])
def test_each_model_chunk_has_the_layers_that_megatron_gives_it(pp, vpp, layers):
    arch, layout = replace(ARCHITECTURES["qwen3"], layers=layers), TrainingLayout(pp=pp, vpp=vpp)
    wanted = {}
    for stage, chunk, local in itertools.product(range(pp), range(vpp), range(layers // (pp * vpp))):
        wanted[layer_offset(layout, layers, stage, chunk) + local] = (stage, chunk, local)
    assert {layer: layout.chunk_of(layer, arch) for layer in range(layers)} == wanted
    for weight in weights_of(arch):
        if weight.layer is not None:
            assert layout.stages_of(weight, arch) == (wanted[weight.layer][0],)


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3_moe"])
def test_interleaved_stages_give_the_checkpoint_back_bit_for_bit(name):
    arch, tensors = ARCHITECTURES[name], TENSORS[name]
    layout, rebuilt = TrainingLayout(tp=2, pp=2, vpp=2, dp=2, ep=2), {}
    for weight in weights_of(arch):
        found = layout.placed_shards(weight, arch)
        if weight.layer is not None:
            stages = {rank // layout.stage_ranks for placed in found for rank in placed.ranks}
            assert stages == {weight.layer % 2}  # four chunks of one layer each, alternating between stages
        shards = [(placed.shard, read_shard(weight, placed.shard, read_from(tensors))) for placed in found]
        rebuilt.update(join_shards(weight, shards))
    assert rebuilt.keys() == tensors.keys() and all(torch.equal(rebuilt[name], tensors[name]) for name in tensors)


def test_a_column_split_is_a_run_of_rows_on_both_sides():
    arch, name = ARCHITECTURES["deepseek_v3"], "model.layers.0.self_attn.kv_b_proj.weight"
    weight, whole = next(weight for weight in weights_of(arch) if name in weight.hf), TENSORS["deepseek_v3"][name]
    for cut in (megatron_shard, server_shard):
        for tp, rank in ((1, 0), (2, 1), (8, 3)):
            found = read_shard(weight, cut(weight, arch, tp, rank), read_from({name: whole}))
            assert torch.equal(found, whole[rank * 176 // tp : (rank + 1) * 176 // tp])
        with pytest.raises(ValueError, match=r"kv_b_proj\.weight has 176 rows .* of 3 does not divide"):
            cut(weight, arch, 3, 0)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (TrainingLayout(tp=12), "8 query groups cannot be split over tensor parallelism of 12"),
        (TrainingLayout(tp=64), "linear_qkv.weight has 96 rows to split, which tensor parallelism of 64 does not divide"),
        (TrainingLayout(pp=3), "4 layers do not divide into 3 stages of 1 chunks"),
        (TrainingLayout(dp=4, ep=4), "6 experts cannot be split over expert parallelism of 4"),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_refused(layout, message):
    arch = ARCHITECTURES["qwen3_moe"]
    with pytest.raises(ValueError, match=message):
        for weight in weights_of(arch):
            layout.placed_shards(weight, arch)


def test_a_layout_that_does_not_fit_itself_is_refused():
    with pytest.raises(ValueError, match="do not divide the 4 ranks of a stage"):
        TrainingLayout(tp=2, dp=2, ep=4)
    with pytest.raises(ValueError, match="below 1"):
        TrainingLayout(pp=0)
    with pytest.raises(ValueError, match="EP 3 does not divide the server's TP 4"):
        ServerLayout(tp=4, ep=3)
    with pytest.raises(ValueError, match="attention DP 4 does not divide the server's TP 6"):
        ServerLayout(tp=6, attention_dp=4)


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_servers_shard_is_what_its_layers_load(name, tp):
    arch, tensors = ARCHITECTURES[name], TENSORS[name]
    for weight in weights_of(arch):
        if tp == 16 and ".mlp." in weight.server and weight.split != "replicated":
            continue  # intermediate sizes of 40 and 56
        for rank in range(tp):
            shard = server_shard(weight, arch, tp, rank)
            found = read_shard(weight, shard, read_from(tensors))
            wanted = server_parameter(weight, arch, [tensors[name] for name in weight.hf], tp, rank)
            assert torch.equal(found, wanted), (weight.server, rank)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_groups_of_a_servers_ranks_each_hold_all_of_attention_and_split_the_rest(name):
    """By the parameter's name, as SGLang's models pass the groups' rank and size to attention and the input embedding."""
    arch, tensors = ARCHITECTURES[name], TENSORS[name]
    layout, seen = ServerLayout(tp=4, attention_dp=2, servers=2), set()
    for weight in weights_of(arch):
        holders = {rank: placed.shard for placed in layout.placed_shards(weight, arch) for rank in placed.ranks}
        hf, of_group = [tensors[name] for name in weight.hf], ".self_attn." in weight.server or "embed" in weight.server
        assert sorted(holders) == list(range(8))
        for rank, shard in holders.items():
            wanted = server_parameter(weight, arch, hf, *((2, rank % 2) if of_group else (4, rank % 4)))
            assert torch.equal(read_shard(weight, shard, read_from(tensors)), wanted), (weight.server, rank)
        seen.add((of_group, weight.split))
    assert {(True, "vocab"), (True, "row"), (False, "vocab"), (False, "row"), (False, "gate_up")} <= seen


def test_a_servers_ranks_hold_their_experts():
    arch, tensors = ARCHITECTURES["qwen3_moe"], TENSORS["qwen3_moe"]
    layout = ServerLayout(tp=4, ep=2, servers=2)
    for weight in weights_of(arch):
        holders = {rank: placed.shard for placed in layout.placed_shards(weight, arch) for rank in placed.ranks}
        hf = [tensors[name] for name in weight.hf]
        for rank in range(8):
            inside = rank % 4
            if weight.expert is not None and weight.expert // 3 != inside // 2:  # 3 experts per pair of ranks
                assert rank not in holders
                continue
            ways, part = (4, inside) if weight.expert is None else (2, inside % 2)
            found = read_shard(weight, holders[rank], read_from(tensors))
            assert torch.equal(found, server_parameter(weight, arch, hf, ways, part)), (weight.server, rank)


def test_a_cut_through_a_head_or_a_column_is_refused_by_name():
    arch = ARCHITECTURES["qwen3"]
    by_name = {weight.megatron: weight for weight in weights_of(arch)}
    with pytest.raises(ValueError, match="8 key/value heads cannot be spread over tensor parallelism of 12"):
        server_shard(by_name["decoder.layers.0.self_attention.linear_qkv.weight"], arch, 12, 0)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight has 40 rows .* of 16 does not divide"):
        megatron_shard(by_name["decoder.layers.1.mlp.linear_fc1.weight"], arch, 16, 0)
