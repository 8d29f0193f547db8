"""Plans of weight transfers: everything arrives once and in the right place, replicas share the work, processes agree."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etr_megatron.errors import UserError
from etr_megatron.weights import (
    Architecture,
    Experts,
    ServerLayout,
    TrainingLayout,
    megatron_shard,
    read_shard,
    server_shard,
    weights_of,
)
from etr_megatron.weights.layout import WeightLayout, shards_of
from etr_megatron.weights.reshard import ReshardPlan, make_reshard_plan
from etr_megatron.weights.shards import box


def architecture(**changes) -> Architecture:
    """A small model whose dimensions all differ."""
    sizes = dict(layers=4, hidden_size=6, intermediate_size=16, heads=8, kv_heads=4, head_dim=3, vocab_size=301)
    fixed = dict(family="qwen2", tied_embeddings=False, norm_eps=1e-6, max_positions=64)
    return Architecture(**{**sizes, **fixed, **changes})


@st.composite
def architectures(draw) -> Architecture:
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    family = draw(st.sampled_from(["qwen2", "llama", "qwen3", "qwen3_moe"]))
    layers = draw(st.sampled_from([1, 2, 4]))
    experts = None
    if family == "qwen3_moe":
        dense = draw(st.frozensets(st.integers(0, layers - 1), max_size=layers - 1))
        experts = Experts(count=4, per_token=2, intermediate_size=8, normalized=True, dense_layers=dense)
    return architecture(
        family=family,
        layers=layers,
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 400)),
        tied_embeddings=draw(st.booleans()),
        experts=experts,
    )


def training_layouts(arch: Architecture) -> list[TrainingLayout]:
    """All small training layouts that the model fits into."""
    found = []
    for tp, pp, vpp, dp, ep, etp in product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 3), (1, 2, 4), (None, 1, 2)):
        rows = 3 * (arch.heads + 2 * arch.kv_heads)
        attention = arch.heads % tp == rows % tp == 0 and 0 in (arch.kv_heads % tp, tp % arch.kv_heads)
        divides = arch.layers % (pp * vpp) == tp * dp % ((etp or tp) * ep) == 0
        if attention and divides and tp * pp * dp <= 16:
            found.append(TrainingLayout(tp=tp, pp=pp, vpp=vpp, dp=dp, ep=ep, etp=etp))
            if arch.layers == 4 and (pp, vpp) == (2, 1):
                found.append(replace(found[-1], first_stage_layers=1))
                found.append(replace(found[-1], first_stage_layers=None, last_stage_layers=1))
    return found


def server_layouts(arch: Architecture) -> list[ServerLayout]:
    """All small server layouts that the model fits into."""
    sizes = [
        (tp, ep, servers, dp)
        for tp, ep, servers, dp in product((1, 2, 4, 8), (1, 2, 4), (1, 2, 3), (1, 2, 4))
        if 0 == tp % ep == tp % dp == arch.heads % (tp // dp) and 0 in (arch.kv_heads % (tp // dp), tp // dp % arch.kv_heads)
    ]
    return [ServerLayout(*some) for some in sizes]


@st.composite
def problems(draw, *, servers_as_source: bool) -> tuple[Architecture, WeightLayout, WeightLayout]:
    """A model and two layouts that it fits into; a server as the source is fused, with repeated key and value heads."""
    arch = draw(architectures())
    training, servers = st.sampled_from(training_layouts(arch)), st.sampled_from(server_layouts(arch))
    source = draw(st.one_of(training, servers) if servers_as_source else training)
    return arch, source, draw(st.one_of(servers, training))


def numbered_tensors(arch: Architecture) -> dict[str, torch.Tensor]:
    """Every element of the model has a unique number, from 1."""
    tensors, start = {}, 1
    for weight in weights_of(arch):
        for name, shape in zip(weight.hf, weight.shapes, strict=True):
            tensors[name] = torch.arange(start, start + prod(shape), dtype=torch.int32).view(shape)
            start += prod(shape)
    return tensors


def shards(placement: WeightLayout, arch: Architecture, rank: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        weight.megatron: read_shard(weight, shard, lambda name, begin, size: box(tensors[name], begin, size))
        for weight, shard in shards_of(placement, arch, rank)
    }


def covered(plan: ReshardPlan, destination: int) -> dict[str, torch.Tensor]:
    """How many transfers fill each element of a destination rank's shards."""
    counts = {
        w.megatron: torch.zeros(s.shape, dtype=torch.int32) for w, s in shards_of(plan.destination, plan.arch, destination)
    }
    for (_, rank), transfers in plan.pairs.items():
        for transfer in transfers if rank == destination else ():
            target = box(counts[transfer.weight.megatron], transfer.destination_at, transfer.size)
            assert tuple(target.shape) == transfer.size
            target += 1
    return counts


@given(problems(servers_as_source=True), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_element_arrives_exactly_once_and_is_what_the_destination_reads(problem, in_place):
    arch, source, destination = problem
    tensors = numbered_tensors(arch)
    plan = make_reshard_plan(source, destination, arch, destination_start=0 if in_place else None)
    held = [shards(source, arch, rank, tensors) for rank in range(source.world)]
    for rank in range(destination.world):
        wanted = shards(destination, arch, rank, tensors)
        found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
        for (sender, receiver), transfers in plan.pairs.items():
            for t in transfers if receiver == rank else ():
                taken = box(held[sender][t.weight.megatron], t.source_at, t.size)
                assert tuple(taken.shape) == t.size
                box(found[t.weight.megatron], t.destination_at, t.size).copy_(taken)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        for name, count in covered(plan, rank).items():
            assert torch.equal(count, (wanted[name] > 0).int())


def sent_by_replicas(plan: ReshardPlan, itemsize: int) -> dict[tuple[int, ...], dict[int, int]]:
    """Ranks that hold the same shards -> bytes of those shards that each of them sends to other processes."""
    replicas = {}
    for weight in weights_of(plan.arch):
        for placed in plan.source.placed_shards(weight, plan.arch):
            for rank in placed.ranks:
                replicas[weight.megatron, rank] = placed.ranks
    sent: dict[tuple[int, ...], dict[int, int]] = {}
    for (source, destination), transfers in plan.pairs.items():
        for transfer in transfers if not plan.is_local(source, destination) else ():
            ranks = replicas[transfer.weight.megatron, source]
            sent.setdefault(ranks, dict.fromkeys(ranks, 0))[source] += plan.bytes(transfer, itemsize)
    return sent


@given(problems(servers_as_source=False))
@settings(max_examples=40, deadline=None)
def test_no_replica_sends_more_than_1_1_times_the_mean(problem):
    arch, source, destination = problem
    plan = make_reshard_plan(source, destination, arch)
    largest_row = 2 * max(shape[-1] for weight in weights_of(arch) for shape in weight.shapes if len(shape) == 2)
    for ranks, loads in sent_by_replicas(plan, 2).items():
        mean = sum(loads.values()) / len(ranks)
        # A row is the smallest unit that another rank can send instead.
        assert max(loads.values()) <= max(1.1 * mean, mean + largest_row)


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (TrainingLayout(tp=2, dp=4), ServerLayout(tp=2)),
        (TrainingLayout(dp=8), ServerLayout(tp=4, servers=3)),
        (TrainingLayout(tp=2, pp=2, dp=3), ServerLayout()),
        (TrainingLayout(tp=4, pp=2, dp=2), ServerLayout(tp=4, servers=5)),
    ],
)
def test_replicas_of_a_real_size_are_within_1_1_of_the_mean_without_allowance(source, destination):
    arch = architecture(hidden_size=64, head_dim=16, intermediate_size=160, vocab_size=3001, family="llama")
    for loads in sent_by_replicas(make_reshard_plan(source, destination, arch), 2).values():
        assert max(loads.values()) <= 1.1 * sum(loads.values()) / len(loads)


REAL = dict(family="qwen3", hidden_size=4096, heads=32, kv_heads=8, head_dim=128, intermediate_size=12288, vocab_size=151936)


@pytest.mark.parametrize("fp8_block", [None, 128])
@pytest.mark.parametrize(
    ("source", "destination", "start"),
    [
        (TrainingLayout(tp=4, dp=8), ServerLayout(tp=4, servers=3), None),
        (TrainingLayout(tp=2, pp=2, dp=4), ServerLayout(tp=8), None),
        (TrainingLayout(tp=2, dp=4), ServerLayout(tp=4, servers=2), 0),
        (TrainingLayout(tp=4, pp=2, dp=4), ServerLayout(tp=2, servers=16), 0),
    ],
)
def test_replicas_of_a_large_model_are_within_1_1_of_the_mean_in_blocks_and_in_place(source, destination, start, fp8_block):
    """What a process already holds is not counted."""
    arch = architecture(**REAL, layers=8)
    plan = make_reshard_plan(source, destination, arch, destination_start=start, fp8_block=fp8_block)
    loads = list(sent_by_replicas(plan, 2).values())
    assert loads
    for sent in loads:
        assert max(sent.values()) <= 1.1 * sum(sent.values()) / len(sent)


def test_an_embedding_larger_than_a_replicas_share_is_cut():
    arch = architecture(layers=1, vocab_size=4000, tied_embeddings=True)
    plan = make_reshard_plan(TrainingLayout(dp=4), ServerLayout(), arch)
    rows = [t.size[0] for pair in plan.pairs.values() for t in pair if t.weight.split == "vocab"]
    assert sum(rows) == 4000 and len(rows) >= 4


def test_a_destination_gets_its_share_from_few_of_many_replicas():
    """Two servers, two replicas: each server takes nearly everything from one of them."""
    plan = make_reshard_plan(TrainingLayout(dp=2), ServerLayout(servers=2), architecture())
    total = {pair: sum(plan.bytes(t, 2) for t in transfers) for pair, transfers in plan.pairs.items()}
    largest = sorted(total.values(), reverse=True)
    assert sum(largest[:2]) >= 0.95 * sum(largest)


def bytes_sent(plan: ReshardPlan) -> int:
    """Bytes between processes, in bf16."""
    remote = (transfers for pair, transfers in plan.pairs.items() if not plan.is_local(*pair))
    return sum(plan.bytes(transfer, 2) for transfers in remote for transfer in transfers)


def test_in_place_what_a_process_holds_is_not_sent():
    arch = architecture()
    plan = make_reshard_plan(TrainingLayout(tp=2, dp=2), TrainingLayout(tp=2, pp=2), arch, destination_start=0)
    assert plan.processes == 4
    assert bytes_sent(plan) == 0
    apart = make_reshard_plan(TrainingLayout(tp=2, dp=2), TrainingLayout(tp=2, pp=2), arch)
    assert apart.processes == 8
    elements = sum(prod(p.size) for rank in range(4) for _, s in shards_of(apart.destination, arch, rank) for p in s.pieces)
    assert bytes_sent(apart) == 2 * elements


def test_equal_cuts_make_one_box_of_a_shard():
    """Query groups that lie in the same order on both sides are not copied piece by piece."""
    plan = make_reshard_plan(TrainingLayout(tp=2), TrainingLayout(tp=2, pp=2), architecture())
    for pair in plan.pairs.values():
        names = [t.weight.megatron for t in pair if t.weight.split == "qkv"]
        assert len(set(names)) == len(names) > 0


def printed_plan() -> str:
    plan = make_reshard_plan(TrainingLayout(tp=2, pp=2, dp=3), ServerLayout(tp=4, servers=2), architecture())
    return str([(pair, [(t.weight.megatron, *t[3:]) for t in ts]) for pair, ts in plan.pairs.items()])


def test_the_plan_is_the_same_in_every_process(gangs):
    """String hashes differ between processes."""
    assert set(gangs(2).run("tests.test_reshard_plan:printed_plan")) == {printed_plan()}


def test_fp8_boxes_are_whole_blocks_and_cost_a_byte_an_element_and_scales():
    arch = architecture(hidden_size=256, intermediate_size=1024, head_dim=128, family="llama")
    plan = make_reshard_plan(TrainingLayout(tp=2, dp=2), ServerLayout(tp=4, servers=2), arch, fp8_block=128)
    seen = 0
    for transfers in plan.pairs.values():
        for t in transfers:
            if t.weight.fp8:
                assert not any(i % 128 for i in (*t.destination_at, *t.source_at, *t.size))
                blocks = prod(t.size) // 128**2
                assert plan.bytes(t, 2) == prod(t.size) + 4 * blocks
                seen += blocks
            else:
                assert plan.bytes(t, 2) == 2 * prod(t.size)
    per_layer = 1024 * 256 + 2 * 512 * 256 + 256 * 1024 + 3 * 1024 * 256
    assert seen == 2 * 4 * per_layer // 128**2


@pytest.mark.parametrize(
    ("changes", "destination", "message"),
    [
        (dict(head_dim=64), 1, r"self_attn\.k_proj\.weight: rows 0 to 64"),
        (dict(intermediate_size=640), 4, r"mlp\.gate_proj\.weight: rows 0 to 160"),
        (dict(head_dim=96, heads=4), 2, r"self_attn\.q_proj\.weight: rows 0 to 96"),
        (dict(head_dim=128, heads=4, intermediate_size=1088), 1, r"mlp\.up_proj\.weight: rows 0 to 1088"),
    ],
)
def test_cuts_through_fp8_blocks_are_refused_by_name(changes, destination, message):
    """In the last case the up matrix follows a gate that does not end at a block boundary."""
    sizes = dict(hidden_size=256, intermediate_size=1024, head_dim=128, family="llama")
    with pytest.raises(UserError, match=message + " of a shard are not whole FP8 blocks of 128"):
        make_reshard_plan(TrainingLayout(), ServerLayout(tp=destination), architecture(**{**sizes, **changes}), fp8_block=128)


def test_a_source_that_lacks_a_part_is_refused():
    class Half(TrainingLayout):
        def placed_shards(self, weight, arch):
            return super().placed_shards(weight, arch)[:1]

    with pytest.raises(ValueError, match=r"embed_tokens\.weight: the source does not hold rows"):
        make_reshard_plan(Half(tp=2), ServerLayout(), architecture())


def test_the_holdings_of_layers_that_are_cut_alike_are_worked_out_once_and_right():
    """Shards are cached by what they depend on; another vocabulary or number of heads is another cut."""
    for changes in (dict(), dict(vocab_size=40), dict(kv_heads=2), dict(kv_heads=8), dict(layers=2)):
        arch = architecture(**changes)
        for weight in weights_of(arch):
            for layout, cut in ((TrainingLayout(tp=2), megatron_shard), (ServerLayout(tp=2), server_shard)):
                found = {rank: h.shard for h in layout.placed_shards(weight, arch) for rank in h.ranks}
                assert found == {rank: cut(weight, arch, 2, rank) for rank in (0, 1)}
