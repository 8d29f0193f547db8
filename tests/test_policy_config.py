"""Which layouts and training options are refused, and with which messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from etr_megatron.checks import check_layers, check_stages
from etr_megatron.config import Config, Fp8Config, ModelConfig, ParallelConfig, TrainConfig, load_config, validate
from etr_megatron.errors import UserError
from etr_megatron.policy import optimizer
from etr_megatron.policy.model_config import (
    get_num_layers_to_build,
    get_transformer_layer_offset,
    transformer_config,
)
from etr_megatron.weights import TrainingLayout, read_architecture
from tests.test_policy_fp8 import ONE_RANK


@pytest.mark.parametrize(
    ("parallel", "train", "message"),
    [
        (dict(vpp=2), {}, "model chunks interleave pipeline stages and need pp > 1; set vpp to 1"),
        (dict(vpp=0), {}, "must be at least 1"),
        (dict(cp=0), {}, "must be at least 1"),
        (dict(first_stage_layers=2), {}, "the only pipeline stage has all layers; set first_stage_layers to null"),
        (dict(pp=2, last_stage_layers=0), {}, "must be at least 1, or null for an even share"),
        (dict(cp=3), {}, "world size 4 is not divisible by tp x pp x cp = 1 x 1 x 3 = 3"),
        ({}, dict(overlap_param_gather=True), "set all three"),
        ({}, dict(optimizer_offload=True), "only the distributed optimizer can be offloaded"),
        ({}, dict(moe_aux_loss_coef=-1.0), "must not be negative"),
    ],
)
def test_layouts_and_options_that_cannot_be_are_refused(parallel, train, message):
    config = Config(
        model=ModelConfig(path="somewhere"), parallel=ParallelConfig(**{"tp": 1, **parallel}), train=TrainConfig(**train)
    )
    (problem,) = validate(config, 4)
    assert message in problem


def test_the_optimizer_of_a_float32_model_cannot_be_offloaded():
    """Megatron's offloaded optimizer fails with "can't optimize a non-leaf Tensor"."""
    train = TrainConfig(optimizer_offload=True, distributed_optimizer=True)
    (problem,) = validate(Config(model=ModelConfig(path="somewhere", dtype="float32"), train=train), 1)
    assert "Megatron can offload the optimizer only for bfloat16 weights; set model.dtype to bfloat16 or auto" in problem


@pytest.mark.parametrize(
    ("fp8", "dtype", "train", "message"),
    [
        (Fp8Config(param=True), "auto", {}, "there is no FP8 without a recipe"),
        (Fp8Config(recipe="blockwise"), "float32", {}, "FP8 training needs a bfloat16 model"),
        (Fp8Config(recipe="delayed", first_last_layers_bf16=True), "auto", {}, "delayed scaling applies to all layers"),
        (Fp8Config(recipe="mxfp8", param=True), "auto", dict(distributed_optimizer=True), "not supported with mxfp8"),
        (Fp8Config(recipe="blockwise", param=True), "auto", {}, "only the distributed optimizer updates weights"),
        (
            Fp8Config(recipe="delayed", param=True),
            "auto",
            dict(distributed_optimizer=True, optimizer_offload=True),
            "the offloaded optimizer updates only bfloat16 weights",
        ),
    ],
)
def test_fp8_that_contradicts_itself_is_refused(fp8, dtype, train, message):
    config = Config(model=ModelConfig(path="somewhere", dtype=dtype), fp8=fp8, train=TrainConfig(**train))
    (problem,) = validate(config, 1)
    assert message in problem


def test_an_exchange_that_packed_sequences_do_not_have_is_refused():
    with pytest.raises(UserError, match=r"parallel\.cp_comm"):
        load_config(None, ["parallel.cp_comm=all_gather"])


def test_bfloat16_gradients_are_for_a_bfloat16_model():
    train = TrainConfig(grads_dtype="bfloat16")
    (problem,) = validate(Config(model=ModelConfig(path="somewhere", dtype="float32"), train=train), 1)
    assert "gradients of a float32 model are float32" in problem
    assert validate(Config(model=ModelConfig(path="somewhere", dtype="bfloat16"), train=train), 1) == []


@pytest.mark.parametrize(
    ("layers", "parallel", "sentence"),
    [
        (
            12,
            dict(pp=2, vpp=4),
            "which do not divide into parallel.pp=2 stages of parallel.vpp=4 equal chunks;",
        ),
        (12, dict(pp=4, first_stage_layers=2), "chunks, with parallel.first_stage_layers=2;"),
        (12, dict(pp=2, first_stage_layers=5, last_stage_layers=6), "first_stage_layers=5, with parallel.last_stage_layers=6;"),
        (12, dict(pp=2, first_stage_layers=12), "first_stage_layers=12;"),
    ],
)
def test_layers_that_do_not_divide_into_chunks_or_uneven_stages_are_refused(layers, parallel, sentence):
    with pytest.raises(UserError) as caught:
        check_layers("m", layers, ParallelConfig(tp=1, **parallel))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("parallel", [dict(pp=3, vpp=2), dict(pp=3, first_stage_layers=2), dict(pp=2, last_stage_layers=5)])
def test_layers_that_divide_pass(parallel):
    check_stages("m", 12, ParallelConfig(tp=1, **parallel))


@pytest.mark.parametrize("vpp", [1, 2])
@pytest.mark.parametrize(
    "parallel",
    [
        dict(pp=3),
        dict(pp=3, first_stage_layers=2),
        dict(pp=3, last_stage_layers=2),
        dict(pp=4, first_stage_layers=2, last_stage_layers=2),
        dict(pp=2, first_stage_layers=4),
    ],
)
def test_the_weight_map_and_megatron_put_every_layer_into_the_same_chunk(hf_models, parallel, vpp):
    # Three stages of which one is uneven: two layers in it and four in each of the others.
    layers = 10 if parallel["pp"] == 3 and len(parallel) == 2 else 12
    arch = replace(read_architecture(hf_models["qwen3"]), layers=layers)
    training = TrainingLayout(vpp=vpp, **parallel)
    layout = replace(ONE_RANK, vpp=vpp, world=parallel["pp"], **parallel)
    config = transformer_config(arch, layout, sequence_parallel=False, dtype=torch.float32)
    found = []
    for stage in range(parallel["pp"]):
        for chunk in range(vpp):
            place = (config, chunk if vpp > 1 else None, stage)
            first = get_transformer_layer_offset(*place)
            found += [(first + n, (stage, chunk, n)) for n in range(get_num_layers_to_build(*place))]
    assert sorted(found) == [(layer, training.chunk_of(layer, arch)) for layer in range(arch.layers)]


@pytest.mark.parametrize(("offload", "before", "threads"), [(True, 1, 6), (True, 8, 8), (False, 1, None)])
def test_an_offloaded_optimizer_updates_with_its_ranks_share_of_the_cores(monkeypatch, offload, before, threads):
    given = []
    monkeypatch.setattr(optimizer.platform, "uses_cuda", lambda: True)
    monkeypatch.setattr(optimizer.os, "sched_getaffinity", lambda process: set(range(48)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch, "get_num_threads", lambda: before)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(optimizer, "optimizer_config", lambda config: "settings")
    monkeypatch.setattr(optimizer, "get_megatron_optimizer", lambda settings, chunks, **_: (settings, chunks))
    config = Config(train=TrainConfig(optimizer_offload=offload))
    assert optimizer.build_optimizer(["chunk"], config) == ("settings", ["chunk"])
    assert given == ([threads] if offload else [])
