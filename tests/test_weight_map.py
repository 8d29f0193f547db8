"""The weight map is complete, its names match those of built models, and a new dense family only needs a table."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from etr_megatron.convert import Ranks, to_hf, to_megatron, verify
from etr_megatron.errors import UserError
from etr_megatron.policy.model import global_name
from etr_megatron.weights import (
    TABLES,
    SafetensorsDir,
    TrainingLayout,
    check_checkpoint,
    join_shards,
    megatron_shard,
    read_architecture,
    read_shard,
    server_shard,
    weights_of,
)
from etr_megatron.weights.map import EMBEDDING, HEAD, hf_name
from tests.hf_models import ALIKE, WITH_EXPERTS, random_sequences
from tests.hf_models import FAMILIES as MODELS
from tests.test_convert import assert_same_bits, tensors_of
from tests.toy_family import register, toy_family, unregister, write_toy
from tests.weight_cases import ARCHITECTURES

LAYOUTS = {
    "tp1": (1, ["parallel.tp=1"], TrainingLayout()),
    "tp2_pp2": (4, ["parallel.tp=2", "parallel.pp=2"], TrainingLayout(tp=2, pp=2)),
    "ep2": (2, ["parallel.tp=1", "parallel.ep=2"], TrainingLayout(dp=2, ep=2)),
    "tp2_ep2_etp1": (
        2,
        ["parallel.tp=2", "parallel.ep=2", "parallel.etp=1"],
        TrainingLayout(tp=2, ep=2, etp=1),
    ),
}


@pytest.mark.parametrize("family", MODELS | ALIKE)
def test_every_tensor_of_a_checkpoint_has_exactly_one_weight(hf_models, family):
    counts = Counter(name for weight in weights_of(read_architecture(hf_models[family])) for name in weight.hf)
    assert set(counts.values()) == {1}
    assert counts.keys() == SafetensorsDir(hf_models[family]).shapes().keys()


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in MODELS for layout in LAYOUTS if family in WITH_EXPERTS or "ep" not in layout],
)
def test_every_parameter_of_a_built_model_has_exactly_one_weight_of_its_shape_and_key(gangs, hf_models, family, layout):
    world, overrides, training = LAYOUTS[layout]
    arch = read_architecture(hf_models[family])
    found = gangs(world).run("tests.policy_jobs:parameters", model=hf_models[family], overrides=overrides)
    wanted: list[dict] = [{} for _ in range(world)]
    for weight in weights_of(arch):
        for placed in training.placed_shards(weight, arch):
            for rank in placed.ranks:
                # The last stage's copy of a tied embedding is named as the head, and stored once.
                copied = weight.split == "vocab" and arch.tied_embeddings and rank >= training.stage_ranks
                name = "output_layer.weight" if copied else weight.megatron
                assert name not in wanted[rank]
                wanted[rank][name] = (placed.shard.shape, weight.stored, weight.stored_at)
    assert found == wanted


def in_layers(name: str, text: str = "", separator: str = ", ") -> str:
    """The name in each of the models' four layers."""
    return separator.join(f"decoder.layers.{layer}.{name}{text}" for layer in range(4))


FC2, BIAS = "mlp.linear_fc2.weight", "mlp.linear_fc2.bias"
SPOILED = {
    "row dropped": (
        lambda row: (),
        f"RuntimeError: parameters without a row in the weight map: {in_layers(FC2)}",
    ),
    "row added": (
        lambda row: (row, replace(row, megatron=f"decoder.layers.{{layer}}.{BIAS}", split="replicated")),
        f"RuntimeError: rows without a parameter on this rank: {in_layers(BIAS)}",
    ),
    "row renamed": (
        lambda row: (replace(row, megatron=f"decoder.layers.{{layer}}.{BIAS}"),),
        f"RuntimeError: parameters without a row in the weight map: {in_layers(FC2)}; "
        f"rows without a parameter on this rank: {in_layers(BIAS)}",
    ),
    "other dimensions": (
        lambda row: (replace(row, hf=((row.hf[0][0], "HQ"),)),),
        f"ValueError: {in_layers(FC2, ' has shape (48, 80), but (48, 64) in the weight map', '; ')}",
    ),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_table_that_is_not_the_models_is_refused_by_the_names_of_its_parameters(gangs, hf_models, spoiled):
    change, message = SPOILED[spoiled]
    rows = tuple(new for row in TABLES["qwen3"] for new in (change(row) if row.megatron.endswith(FC2) else (row,)))
    job = dict(model=hf_models["qwen3"], family="qwen3")
    assert gangs(1).run("tests.policy_jobs:table_error", **job, rows=rows) == [message]
    assert gangs(1).run("tests.policy_jobs:table_error", **job, rows=TABLES["qwen3"]) == [""]


def test_names_of_transformer_engines_layers():
    names = {weight.megatron: weight.te for weight in weights_of(ARCHITECTURES["qwen3_moe_dense"])}
    assert {name for name, te in names.items() if te == name} >= {
        "embedding.word_embeddings.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.router.weight",
        "decoder.final_layernorm.weight",
    }
    # A dense layer's norms are fused into the linear layers after them; experts are in grouped ones.
    assert names["decoder.layers.0.input_layernorm.weight"] == "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert names["decoder.layers.0.pre_mlp_layernorm.weight"] == "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    assert names["decoder.layers.1.input_layernorm.weight"] == "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    experts = "decoder.layers.1.mlp.experts"
    assert names[f"{experts}.local_experts.4.linear_fc1.weight"] == f"{experts}.linear_fc1.weight4"
    assert names[f"{experts}.local_experts.4.linear_fc2.weight"] == f"{experts}.linear_fc2.weight4"


def test_names_of_transformer_engines_latent_attention():
    """The latents' norms are fused into the projections up, the norm before attention is not."""
    attention, other = "decoder.layers.1.self_attention", {}
    for family in ("deepseek_v3", "glm4_moe_lite"):
        names = {weight.megatron: weight.te for weight in weights_of(ARCHITECTURES[family]) if weight.layer == 1}
        other[family] = {name: te for name, te in names.items() if te != name and "experts" not in name}
        assert names["decoder.layers.1.input_layernorm.weight"] == "decoder.layers.1.input_layernorm.weight"
    of_keys = {f"{attention}.kv_layernorm.weight": f"{attention}.linear_kv_up_proj.layer_norm_weight"}
    of_queries = {f"{attention}.q_layernorm.weight": f"{attention}.linear_q_up_proj.layer_norm_weight"}
    assert other == {"deepseek_v3": of_queries | of_keys, "glm4_moe_lite": of_keys}


@pytest.mark.parametrize(
    ("local", "whole"),
    [
        ("decoder.layers.1.mlp.experts.linear_fc1.weight2", "decoder.layers.5.mlp.experts.linear_fc1.weight11"),
        ("decoder.layers.0.mlp.experts.linear_fc2.weight10", "decoder.layers.4.mlp.experts.linear_fc2.weight19"),
        (
            "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight",
            "decoder.layers.5.mlp.experts.local_experts.11.linear_fc1.weight",
        ),
        ("decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.5.mlp.linear_fc1.weight"),
        ("decoder.layers.3.mlp.router.weight", "decoder.layers.7.mlp.router.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
    ],
)
def test_layers_and_experts_of_a_rank_are_counted_over_the_whole_model(local, whole):
    assert global_name(local, first_layer=4, first_expert=9) == whole


def test_what_is_quantised_is_every_linear_layer_but_head_and_router():
    for arch in ARCHITECTURES.values():
        for weight in weights_of(arch):
            linear = weight.hf[0].rpartition(".")[0].endswith(("_proj", "_with_mqa")) and weight.hf[0].endswith(".weight")
            assert weight.fp8 == linear, weight.hf


@pytest.fixture
def toy(hf_models, tmp_path):
    register()
    (tmp_path / "toy").mkdir()
    write_toy(hf_models["qwen2"], tmp_path / "toy")
    yield tmp_path / "toy"
    unregister()


def test_a_new_dense_family_is_a_table_of_under_40_lines(toy):
    assert len(inspect.getsource(toy_family).splitlines()) < 40
    arch = check_checkpoint(toy)
    assert arch.qkv_bias and not arch.qk_norm and arch.experts is None
    checkpoint, tensors = SafetensorsDir(toy), load_file(toy / "model.safetensors")
    assert len(tensors) == 2 + 12 * arch.layers and all(name.startswith("transformer.") for name in tensors)
    for shard_of in (megatron_shard, server_shard):
        for weight in weights_of(arch):
            shards = [shard_of(weight, arch, 2, rank) for rank in range(2)]
            found = join_shards(weight, [(shard, read_shard(weight, shard, checkpoint.read)) for shard in shards])
            assert all(torch.equal(found[name], tensors[name]) for name in weight.hf)


def test_the_new_family_is_converted_there_and_back_bit_for_bit(toy, tmp_path):
    to_megatron(toy, tmp_path / "megatron", Ranks())
    to_hf(tmp_path / "megatron", tmp_path / "back", Ranks(), max_file_bytes=60_000)
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(toy))
    assert verify(tmp_path / "back", tmp_path / "megatron", Ranks(), logits=False).same


def test_fp8_of_the_new_family_leaves_out_its_head_by_its_name(toy, tmp_path):
    to_megatron(toy, tmp_path / "megatron", Ranks())
    to_hf(tmp_path / "megatron", tmp_path / "fp8", Ranks(), fp8_block=16)
    quantization = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert quantization["modules_to_not_convert"] == ["head"]
    found = verify(tmp_path / "fp8", tmp_path / "megatron", Ranks(), logits=False)
    assert found.same and len(found.rounded) == 7 * 4


def test_a_tied_head_of_the_new_family_may_be_stored_twice_with_the_same_values_alone(toy):
    tensors = load_file(toy / "model.safetensors")
    head = tensors["transformer.wte.weight"].clone()
    save_file(tensors | {"head.weight": head}, toy / "model.safetensors")
    check_checkpoint(toy, values=True)
    save_file(tensors | {"head.weight": head + 1}, toy / "model.safetensors")
    with pytest.raises(UserError, match=r"but head\.weight holds other values than transformer\.wte\.weight; set tie"):
        check_checkpoint(toy, values=True)


def test_differences_of_a_megatron_checkpoint_of_the_new_family_are_named_by_its_own_tensors(toy, tmp_path):
    to_megatron(toy, tmp_path / "megatron", Ranks())
    config = json.loads((tmp_path / "megatron" / "config.json").read_text())
    (tmp_path / "megatron" / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(UserError, match=r"linear_fc1\.weight \(gate\.weight over up\.weight, of 4 layers\) has shape"):
        check_checkpoint(tmp_path / "megatron")


def test_every_table_names_an_embedding_and_a_head():
    for family, rows in TABLES.items():
        assert Counter(row.megatron for row in rows if row.megatron in (EMBEDDING, HEAD)) == {EMBEDDING: 1, HEAD: 1}, family
    assert (hf_name("llama", EMBEDDING), hf_name("llama", HEAD)) == ("model.embed_tokens.weight", "lm_head.weight")


def test_megatron_builds_the_new_family_and_it_is_the_model_that_the_tensors_are_of(gangs, hf_models, toy):
    """The table determines biases and norms; nothing else says that the family has them."""
    job, tp2 = "tests.toy_family:run", ["parallel.tp=2"]
    wanted = load_file(toy / "model.safetensors")
    for found in gangs(2).run(job, job="export", model=str(toy), overrides=tp2):
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    sequences = random_sequences()
    ours = gangs(2).run(job, job="logprobs", model=str(toy), sequences=sequences, overrides=tp2)
    theirs = gangs(2).run("tests.policy_jobs:logprobs", model=hf_models["qwen2"], sequences=sequences, overrides=tp2)
    assert ours == theirs
