"""Shard to shard on real gloo ranks: what arrives equals the checkpoint, and every byte is sent once."""

from __future__ import annotations

from math import prod

import pytest
import torch

from etr_megatron.weights import ServerLayout, TrainingLayout, read_architecture
from etr_megatron.weights.layout import shards_of
from etr_megatron.weights.quantize import SCALE_SUFFIX, quantize_blocks
from tests.hf_models import FAMILIES
from tests.transport_jobs import shards_from

LAYOUTS = {
    "tp2_to_tp1": (TrainingLayout(tp=2), ServerLayout()),
    "tp2_to_tp2": (TrainingLayout(tp=2), ServerLayout(tp=2)),
    "pp2_to_tp2": (TrainingLayout(pp=2), ServerLayout(tp=2)),
}


def needed_bytes(model: str, placement, itemsize: int) -> int:
    """Bytes that all destination ranks need, from the layout only."""
    arch = read_architecture(model)
    ranks = range(placement.world)
    return itemsize * sum(prod(p.size) for rank in ranks for _, shard in shards_of(placement, arch, rank) for p in shard.pieces)


def check(found: list[dict], model: str, source, destination, *, start: int | None = None, dtype=torch.float32) -> None:
    start = source.world if start is None else start
    for rank in range(destination.world):
        shards = found[start + rank]["shards"]
        wanted = shards_from(model, destination, rank, dtype)
        assert shards.keys() == wanted.keys()
        assert all(torch.equal(shards[name], wanted[name]) for name in wanted)
        assert found[start + rank]["version"] == 5


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_to_server_equals_the_checkpoint_and_sends_the_least(gangs, hf_models, family, layouts):
    source, destination = LAYOUTS[layouts]
    model = hf_models[family]
    gang = gangs(source.world + destination.world)
    found = gang.run("tests.transport_jobs:sharded", model=model, source=source, destination=destination)
    check(found, model, source, destination)
    assert sum(one["bytes"] for one in found) == needed_bytes(model, destination, 4)


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (TrainingLayout(tp=2, pp=2), ServerLayout(tp=2)),
        (TrainingLayout(tp=2, dp=2), ServerLayout(servers=2)),
        (TrainingLayout(dp=2), ServerLayout(tp=4)),  # two key/value heads on four ranks
    ],
)
def test_many_ranks_to_servers_in_small_buckets(gangs, hf_models, source, destination):
    model, job = hf_models["qwen2"], "tests.transport_jobs:sharded"
    layouts = dict(source=source, destination=destination)
    found = gangs(6).run(job, model=model, **layouts, tiny_messages=True, dtype=torch.bfloat16)
    check(found, model, source, destination, dtype=torch.bfloat16)
    assert sum(one["bytes"] for one in found) == needed_bytes(model, destination, 2)


@pytest.mark.parametrize(
    ("source", "destination"),
    [(TrainingLayout(tp=2), TrainingLayout(pp=2)), (TrainingLayout(pp=2), TrainingLayout(tp=2))],
)
def test_training_to_training_within_the_same_processes(gangs, hf_models, source, destination):
    model = hf_models["qwen3_tied"]
    found = gangs(2).run(
        "tests.transport_jobs:sharded", model=model, source=source, destination=destination, destination_start=0, syncs=3
    )
    for one in found:
        one["version"] -= 2
    check(found, model, source, destination, start=0)
    assert 0 < sum(one["bytes"] for one in found) < needed_bytes(model, destination, 4)


@pytest.mark.parametrize(
    ("family", "overrides", "destination"),
    [
        ("qwen2", ["parallel.tp=2"], ServerLayout(servers=2)),
        ("qwen3", ["parallel.tp=2"], ServerLayout(tp=2)),
        ("qwen3_tied", ["parallel.pp=2"], ServerLayout(tp=2)),
        ("qwen3_moe", ["parallel.tp=1", "parallel.ep=2"], ServerLayout(tp=2)),
        ("qwen3_moe_dense", ["parallel.tp=2", "parallel.ep=2", "parallel.etp=1"], ServerLayout(tp=2, ep=2)),
        ("glm4_moe", ["parallel.tp=2", "parallel.ep=2", "parallel.etp=1"], ServerLayout(tp=2, ep=2)),
        ("qwen2", ["parallel.tp=1", "parallel.pp=2", "parallel.first_stage_layers=1"], ServerLayout(tp=2)),
        ("llama", ["parallel.tp=1", "parallel.pp=2", "parallel.vpp=2"], ServerLayout(tp=2)),
        ("llama", ["parallel.tp=2", "parallel.pp=2"], ServerLayout(tp=2, servers=2)),
    ],
)
def test_a_policys_parameters_arrive_at_servers_in_its_processes(gangs, hf_models, family, overrides, destination):
    model = hf_models[family]
    found = gangs(destination.world).run(
        "tests.transport_jobs:from_policy", model=model, overrides=overrides, destination=destination
    )
    check(found, model, TrainingLayout(), destination, start=0)


@pytest.mark.parametrize("tiny_messages", [False, True])
@pytest.mark.parametrize("destination", [ServerLayout(), ServerLayout(tp=2)])
def test_what_travels_as_fp8_equals_the_checkpoint_quantised_and_cut(gangs, hf_models, destination, tiny_messages):
    """Blocks of 8, which divide heads of 16 and the halves of 48 and 80."""
    model, block = hf_models["qwen3"], 8
    job, layouts = "tests.transport_jobs:sharded", dict(source=TrainingLayout(tp=2), destination=destination)
    options = dict(tiny_messages=tiny_messages, fp8_block=block, dtype=torch.bfloat16)
    found = gangs(2 + destination.world).run(job, model=model, **layouts, **options)
    sent = 0
    for rank in range(destination.world):
        shards = found[2 + rank]["shards"]
        wanted = shards_from(model, destination, rank, torch.bfloat16)
        for weight, _ in shards_of(destination, read_architecture(model), rank):
            name = weight.megatron
            if not weight.fp8:
                assert torch.equal(shards[name], wanted[name])
                sent += 2 * (wanted[name].numel() if weight.split != "vocab" else (wanted[name] != 0).any(1).sum().item() * 48)
                continue
            values, scales = quantize_blocks(wanted[name], block)  # split at blocks, so splitting and quantising commute
            assert torch.equal(shards[name], values.view(torch.uint8))
            assert torch.equal(shards[name + SCALE_SUFFIX], scales)
            sent += values.numel() + 4 * scales.numel()
    assert sum(one["bytes"] for one in found) == sent
