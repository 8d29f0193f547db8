"""What arrives depends neither on the transport nor on the source's own dtype."""

from __future__ import annotations

from dataclasses import replace

import torch

from etr_megatron.weights import ServerLayout, TrainingLayout, megatron_shard, server_shard, weights_of
from etr_megatron.weights.quantize import SCALE_SUFFIX, quantize_blocks
from etr_megatron.weights.reshard import make_reshard_plan
from etr_megatron.weights.transport.buckets import buckets_of, copy_local, pack, stage, unpack
from etr_megatron.weights.transport.verify import destination_checksum, source_checksum
from tests.weight_cases import ARCHITECTURES, tensors_of

BLOCK = 8


def test_an_fp32_source_is_quantised_from_its_bf16_values_over_the_wire_and_within_a_process():
    arch = replace(ARCHITECTURES["qwen3"], hidden_size=48, head_dim=16, heads=4, kv_heads=2, intermediate_size=40)
    plan = make_reshard_plan(TrainingLayout(), ServerLayout(), arch, fp8_block=BLOCK)
    tensors = {name: tensor.float() for name, tensor in tensors_of(arch).items()}
    weight = next(weight for weight in weights_of(arch) if weight.split == "row")
    (name,) = weight.hf
    tensors[name] = tensors[name] + 1e-3 * torch.randn(tensors[name].shape)  # not representable in bf16
    assert not torch.equal(tensors[name], tensors[name].bfloat16().float())
    sources = {weight.megatron: tensors[name]}
    values, scales = quantize_blocks(tensors[name].bfloat16(), BLOCK)
    assert not torch.equal(scales, quantize_blocks(tensors[name], BLOCK)[1])
    transfers = [transfer for transfer in plan.pairs[0, 0] if transfer.weight.megatron == weight.megatron]
    assert megatron_shard(weight, arch, 1, 0).shape == server_shard(weight, arch, 1, 0).shape == tuple(values.shape)

    def empty():
        return {weight.megatron: torch.empty_like(values), weight.megatron + SCALE_SUFFIX: torch.empty_like(scales)}

    sent, local = empty(), empty()
    for bucket in buckets_of(plan, transfers, torch.bfloat16, 1 << 20):
        one, other = (stage(plan, bucket, s, torch.device("cpu"), sending=s is sources) for s in (sources, sent))
        flat, received = (torch.empty(side.nbytes, dtype=torch.uint8) for side in (one, other))
        pack(plan, one, flat, sources, torch.bfloat16)
        for message, arrived in zip(one.messages(flat), other.messages(received), strict=True):
            arrived.copy_(message)
        unpack(plan, other, received, sent)
    for transfer in transfers:
        copy_local(plan, transfer, sources, local, torch.bfloat16)
        # Checksums must round in the same way, or a correct sync would count as corrupt.
        wanted = source_checksum(plan, transfer, sources, torch.bfloat16)
        assert wanted == destination_checksum(plan, transfer, local, torch.bfloat16)
        unrounded = source_checksum(plan, transfer, sources, torch.float32)
        assert wanted != unrounded
    for found in (sent, local):
        assert torch.equal(found[weight.megatron].view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(found[weight.megatron + SCALE_SUFFIX], scales)
