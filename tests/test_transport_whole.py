"""Whole tensors for servers, gathered on rank 0 of real gloo ranks: equal to the checkpoint, and gathered only if necessary."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from etr_megatron.weights import TrainingLayout, read_architecture, weights_of
from etr_megatron.weights.layout import shards_of
from etr_megatron.weights.quantize import SCALE_SUFFIX, quantize_blocks
from etr_megatron.weights.transport.exchange import Memory
from etr_megatron.weights.transport.whole import Gather, weight_groups
from tests.weight_cases import ARCHITECTURES

JOB = "tests.transport_whole_jobs:whole"


def model_elements(model: str) -> int:
    """Elements of all HF tensors."""
    return sum(prod(shape) for weight in weights_of(read_architecture(model)) for shape in weight.shapes)


@pytest.mark.parametrize(
    ("family", "source", "bucket_bytes"),
    [
        ("llama", TrainingLayout(tp=2), 64 << 20),
        ("qwen2", TrainingLayout(pp=2), 50_000),
        ("qwen3_tied", TrainingLayout(tp=2, pp=2), 1),
        ("qwen3", TrainingLayout(dp=2), 100_000),
        ("qwen3_moe", TrainingLayout(dp=2, ep=2), 100_000),
        ("qwen3_moe_dense", TrainingLayout(tp=2, ep=2, etp=1), 50_000),
        ("deepseek_v3", TrainingLayout(tp=2), 1),
    ],
)
def test_what_rank_0_hands_over_equals_the_checkpoint(gangs, hf_models, family, source, bucket_bytes):
    model = hf_models[family]
    found = gangs(source.world).run(JOB, model=model, source=source, bucket_bytes=bucket_bytes)
    wanted = load_file(f"{model}/model.safetensors")
    assert [one["version"] for one in found] == [5] * source.world
    assert found[0]["tensors"].keys() == wanted.keys() and all(one["tensors"] == {} for one in found[1:])
    assert all(torch.equal(found[0]["tensors"][name], wanted[name]) for name in wanted)
    buckets, size = found[0]["names"], 4 * model_elements(model)
    assert sorted(name for names in buckets for name in names) == sorted(wanted)
    if bucket_bytes == 1:
        # A server fuses both projections down to latents, and forgets one that comes without the other.
        together = [names for names in buckets if any("q_a_proj" in name for name in names)]
        assert all([name.split(".")[-2] for name in names] == ["q_a_proj", "kv_a_proj_with_mqa"] for names in together)
        assert len(buckets) == len(list(weights_of(read_architecture(model)))) - len(together)
        assert len(together) == sum("q_a_proj" in name for name in wanted)
    elif bucket_bytes > size:
        assert len(buckets) == 1
    else:  # a bucket ends where the next weight does not fit
        assert size / bucket_bytes <= len(buckets) <= 2 * size / bucket_bytes + 1


def test_only_what_rank_0_lacks_is_sent_to_it_through_buffers_that_are_freed_after_a_sync(gangs, hf_models):
    model, source = hf_models["llama"], TrainingLayout(tp=2)
    found = gangs(2).run(JOB, model=model, source=source, dtype=torch.bfloat16)
    (during, after), _ = (one["memory"] for one in found)
    assert during > 0 and after == 0
    held = sum(prod(p.size) for _, s in shards_of(source, read_architecture(model), 0) for p in s.pieces)
    assert [one["bytes"] for one in found] == [0, 2 * 2 * (model_elements(model) - held)]  # two syncs


def test_fp8_is_quantised_from_whole_tensors_even_where_the_source_cuts_blocks(gangs, hf_models):
    """Blocks of 16 rows; a training rank's half of the intermediate size has 40."""
    model, block = hf_models["llama"], 16
    options = dict(source=TrainingLayout(tp=2), dtype=torch.bfloat16, fp8_block=block, bucket_bytes=40_000)
    tensors = gangs(2).run(JOB, model=model, **options)[0]["tensors"]
    wanted = {name: tensor.bfloat16() for name, tensor in load_file(f"{model}/model.safetensors").items()}
    quantised = {name for weight in weights_of(read_architecture(model)) if weight.fp8 for name in weight.hf}
    assert tensors.keys() == wanted.keys() | {name + SCALE_SUFFIX for name in quantised}
    for name in wanted:
        if name in quantised:
            values, scales = quantize_blocks(wanted[name], block)
            assert torch.equal(tensors[name], values.view(torch.uint8))
            assert torch.equal(tensors[name + SCALE_SUFFIX], scales)
        else:
            assert torch.equal(tensors[name], wanted[name])


def bytes_of_buffers(source: TrainingLayout, limit: int, monkeypatch) -> int:
    """Bytes of the buffers that rank 0 fills in a sync. Nothing travels."""
    monkeypatch.setattr("etr_megatron.weights.transport.exchange.MIN_BUCKET_BYTES", 1)
    monkeypatch.setattr("etr_megatron.weights.transport.buckets.ALONE_BYTES", 1)  # no small tensors, which are always copied
    arch, meta = ARCHITECTURES["llama"], torch.device("meta")
    wire = SimpleNamespace(rank=0, device=meta, exchange=lambda *_: [], wait=lambda _: None)
    groups, memory = weight_groups(weights_of(arch), torch.float32, None, limit), Memory(meta)
    options = dict(dtype=torch.float32, bucket_bytes=limit)
    gather = Gather(source, arch, lambda weight: 0, [[group] for group in groups], wire, memory, **options)
    shards = {weight.megatron: torch.empty(shard.shape, device=meta) for weight, shard in shards_of(source, arch, 0)}
    for number, group in enumerate(groups):
        gather.run(number, shards, (group, torch.empty(group.nbytes, dtype=torch.uint8, device=meta)))
    return sum(buffer.nbytes for buffer in memory._buffers.values())


def test_buffers_for_all_peers_together_are_at_most_two_buckets(monkeypatch):
    """Rank 0 receives other buckets from the ranks of the other stage, and shares of each from all replicas."""
    assert 0 < bytes_of_buffers(TrainingLayout(tp=4, pp=4, dp=2), 30_000, monkeypatch) <= 2 * 30_000


def test_what_is_received_in_place_needs_no_buffer(monkeypatch):
    assert bytes_of_buffers(TrainingLayout(pp=2), 30_000, monkeypatch) == 0
