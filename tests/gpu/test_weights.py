"""FP8 blocks against Transformer Engine's own, and weight transports with tensors on the device."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_device import recipes_left_out
from etr_megatron.weights import SafetensorsDir, ServerLayout, make_reshard_plan, quantize_blocks, read_architecture, read_shard
from etr_megatron.weights.layout import shards_of
from etr_megatron.weights.quantize import SCALE_SUFFIX, scale_shape
from etr_megatron.weights.transport import ShardedTransport, Wire
from tests.gpu.conftest import DEVICE
from tests.gpu.policies import FP8_BLOCK, build, write_model

LEFT_OUT = recipes_left_out(DEVICE)
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("shape", [(384, 640), (1280, 256), (4096, 12288)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_are_those_of_transformer_engine(device, shape, dtype):
    if "blockwise" in LEFT_OUT:
        pytest.skip(LEFT_OUT["blockwise"])
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4)).mul_(0.02)
    weight[:128, :128] *= 1000  # blocks of very different sizes
    weight = weight.to(dtype).to(device)
    quantizer = Float8BlockQuantizer(
        tex.DType.kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=2, force_pow_2_scales=False
    )
    theirs = quantizer(weight)
    codes, scales = quantize_blocks(weight, 128)
    rows, columns = scale_shape(shape, 128)
    # Theirs are padded in memory and exist for whole blocks only.
    assert torch.equal(scales, theirs._rowwise_scale_inv[:rows, :columns])
    assert torch.equal(codes.view(torch.uint8), theirs._rowwise_data.view(torch.uint8))


@pytest.mark.parametrize("shape", [(384, 640), (131, 200)])
def test_blocks_are_the_same_on_every_device(device, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4)).mul_(0.02).bfloat16()
    weight[:128, :128] = 0
    codes, scales = quantize_blocks(weight, 128)
    found_codes, found_scales = quantize_blocks(weight.to(device), 128)
    assert torch.equal(found_codes.cpu().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found_scales.cpu(), scales)


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize("fp8_block", [None, FP8_BLOCK], ids=["bf16", "fp8"])
def test_a_server_in_the_same_process_gets_the_policys_weights(world, device, tmp_path, fp8_block, family):
    """Everything except the messages: NCCL has no group with two processes on one GPU."""
    from etr_megatron.policy.model import own_parameters

    model = write_model(tmp_path / "model", family)
    policy, arch, checkpoint = build(model), read_architecture(model), SafetensorsDir(model)
    sources = {weight.megatron: parameter for weight, parameter in own_parameters(policy.chunks).values()}
    plan = make_reshard_plan(policy.layout.training, ServerLayout(), arch, itemsize=2, fp8_block=fp8_block, destination_start=0)
    wanted, destinations = {}, {}
    for weight, shard in shards_of(plan.destination, arch, 0):
        full, name = read_shard(weight, shard, checkpoint.read).to(weight.type_in(torch.bfloat16)), weight.megatron
        if plan.block_of(weight) is not None:
            wanted[name], wanted[name + SCALE_SUFFIX] = quantize_blocks(full, fp8_block)
        else:
            wanted[name] = full
    for name, tensor in wanted.items():
        # No weight is 77, so values that stay unwritten show.
        destinations[name] = torch.full(tensor.shape, 77.0, device=device).to(tensor.dtype)
    transport = ShardedTransport(plan, Wire.in_world(backend=world, timeout_s=60), dtype=torch.bfloat16, checksums=True)
    for version in (3, 4):
        transport.sync(version, sources, destinations)
    assert transport.complete == 4
    assert any(tensor.dtype == FP8 for tensor in destinations.values()) == (fp8_block is not None)
    for name, tensor in wanted.items():
        assert torch.equal(destinations[name].cpu().view(torch.uint8), tensor.view(torch.uint8)), name
    transport.close()


def test_messages_of_a_round_that_a_process_sends_itself_arrive(world, device):
    """The messages of two ranks in one launch, as far as one GPU can send them."""
    if world == "gloo":
        pytest.skip("gloo has no messages to the same process")
    wire = Wire.in_world(backend=world, timeout_s=60)
    sent = [torch.randint(0, 256, (size,), device=device, dtype=torch.uint8) for size in (7, 1 << 16)]
    received = [torch.zeros_like(tensor) for tensor in sent]
    wire.wait(wire.exchange([(tensor, 0) for tensor in sent], [(tensor, 0) for tensor in received]))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(sent, received, strict=True))
    assert wire.bytes_sent == 7 + (1 << 16)
    wire.close()
