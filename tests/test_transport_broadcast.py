"""Full tensors to every receiver on real gloo ranks: equal to the checkpoint, and gathered only if necessary."""

from __future__ import annotations

from math import prod

import pytest
import torch

from etr_megatron.errors import UserError
from etr_megatron.weights import ServerLayout, TrainingLayout, read_architecture, weights_of
from etr_megatron.weights.layout import shards_of
from etr_megatron.weights.quantize import quantize_blocks
from etr_megatron.weights.transport import SCALE_SUFFIX
from tests.test_transport_sharded import check
from tests.transport_jobs import shards_from


def model_elements(model: str, *, without: str = "") -> int:
    """Elements of all HF tensors, or of those not split by `without`."""
    weights = weights_of(read_architecture(model))
    return sum(prod(shape) for weight in weights if weight.split != without for shape in weight.shapes)


@pytest.mark.parametrize(
    ("family", "source", "destination", "bucket_bytes"),
    [
        ("llama", TrainingLayout(tp=2), ServerLayout(), 64 << 20),
        ("qwen2", TrainingLayout(pp=2), ServerLayout(tp=2), 50_000),
        ("qwen3_tied", TrainingLayout(tp=2, pp=2), ServerLayout(tp=2), 1),
        ("qwen3", TrainingLayout(dp=2), ServerLayout(servers=2), 100_000),
        ("qwen3_moe", TrainingLayout(dp=2, ep=2), ServerLayout(tp=2, ep=2), 100_000),
        ("qwen3_moe_dense", TrainingLayout(tp=2, ep=2, etp=1), ServerLayout(tp=2), 50_000),
    ],
)
def test_what_receivers_cut_equals_the_checkpoint(gangs, hf_models, family, source, destination, bucket_bytes):
    model, job = hf_models[family], "tests.transport_jobs:broadcast"
    layouts = dict(source=source, destination=destination)
    found = gangs(source.world + destination.world).run(
        job, model=model, **layouts, dtype=torch.float32, bucket_bytes=bucket_bytes
    )
    check(found, model, source, destination)
    names = [name for group in found[0]["groups"] for name in group]
    weights = list(weights_of(read_architecture(model)))
    assert sorted(names) == sorted(name for weight in weights for name in weight.hf)
    size = 4 * model_elements(model)
    if bucket_bytes == 1:
        assert len(found[0]["groups"]) == len(weights)
    elif bucket_bytes > size:
        assert len(found[0]["groups"]) == 1
    else:  # a bucket ends where the next weight does not fit
        assert size / bucket_bytes <= len(found[0]["groups"]) <= 2 * size / bucket_bytes + 1


def test_bytes_are_the_model_per_receiver_and_what_the_root_lacks(gangs, hf_models):
    model = hf_models["llama"]
    layouts = dict(source=TrainingLayout(tp=2), destination=ServerLayout(tp=2))
    found = gangs(4).run("tests.transport_jobs:broadcast", model=model, **layouts, dtype=torch.bfloat16)
    assert found[0]["bytes"] == 2 * 2 * model_elements(model)
    held = sum(prod(p.size) for _, s in shards_of(TrainingLayout(tp=2), read_architecture(model), 0) for p in s.pieces)
    assert found[1]["bytes"] == 2 * (model_elements(model) - held)
    assert found[2]["bytes"] == found[3]["bytes"] == 0


def test_fp8_is_quantised_from_whole_tensors_even_where_the_source_cuts_blocks(gangs, hf_models):
    """Blocks of 16 rows; a training rank's half of the intermediate size has 40."""
    model, block = hf_models["llama"], 16
    found = gangs(3).run(
        "tests.transport_jobs:broadcast",
        model=model,
        source=TrainingLayout(tp=2),
        destination=ServerLayout(),
        dtype=torch.bfloat16,
        fp8_block=block,
        bucket_bytes=40_000,
    )
    wanted = shards_from(model, ServerLayout(), 0, torch.bfloat16)
    shards = found[2]["shards"]
    for weight in weights_of(read_architecture(model)):
        name = weight.megatron
        if weight.fp8:
            values, scales = quantize_blocks(wanted[name], block)
            assert torch.equal(shards[name], values.view(torch.uint8))
            assert torch.equal(shards[name + SCALE_SUFFIX], scales)
        else:
            assert torch.equal(shards[name], wanted[name])
    assert "model.layers.1.mlp.up_proj.weight_scale_inv" in [name for group in found[0]["groups"] for name in group]


def test_a_destination_that_cuts_blocks_is_refused():
    from etr_megatron.weights.transport import BroadcastTransport

    class Wire:
        world, rank = 3, 2

    from tests.test_plan import architecture

    with pytest.raises(UserError, match="whole FP8 blocks of 128"):
        BroadcastTransport(TrainingLayout(tp=2), ServerLayout(), architecture(), Wire(), fp8_block=128)
