"""The weight map is complete, its names are those of built models, and a new dense family is a table."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from etr_megatron.policy.model import global_name
from etr_megatron.weights import (
    FAMILIES,
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
from etr_megatron.weights.map import Row
from tests.hf_models import FAMILIES as MODELS
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


@pytest.mark.parametrize("family", MODELS)
def test_every_tensor_of_a_checkpoint_has_exactly_one_weight(hf_models, family):
    counts = Counter(name for weight in weights_of(read_architecture(hf_models[family])) for name in weight.hf)
    assert set(counts.values()) == {1}
    assert counts.keys() == SafetensorsDir(hf_models[family]).shapes().keys()


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in MODELS for layout in LAYOUTS if "moe" in family or "ep" not in layout],
)
def test_every_parameter_of_a_built_model_has_exactly_one_weight_of_its_shape_and_key(gangs, hf_models, family, layout):
    world, overrides, training = LAYOUTS[layout]
    arch = read_architecture(hf_models[family])
    found = gangs(world).run("tests.policy_jobs:parameters", model=hf_models[family], overrides=overrides)
    wanted: list[dict] = [{} for _ in range(world)]
    for weight in weights_of(arch):
        for holding in training.holdings(weight, arch):
            for rank in holding.ranks:
                # The last stage's copy of a tied embedding is called the head, and stored once.
                copied = weight.split == "vocab" and arch.tied_embeddings and rank >= training.stage_ranks
                name = "output_layer.weight" if copied else weight.megatron
                assert name not in wanted[rank]
                wanted[rank][name] = (holding.shard.shape, weight.stored, weight.stored_at)
    assert found == wanted


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
    # A dense layer's norms are fused into the linear layers behind them; experts lie in grouped ones.
    assert names["decoder.layers.0.input_layernorm.weight"] == "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert names["decoder.layers.0.pre_mlp_layernorm.weight"] == "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    assert names["decoder.layers.1.input_layernorm.weight"] == "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    experts = "decoder.layers.1.mlp.experts"
    assert names[f"{experts}.local_experts.4.linear_fc1.weight"] == f"{experts}.linear_fc1.weight4"
    assert names[f"{experts}.local_experts.4.linear_fc2.weight"] == f"{experts}.linear_fc2.weight4"


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
            linear = weight.hf[0].rpartition(".")[0].endswith("_proj") and weight.hf[0].endswith(".weight")
            assert weight.fp8 == linear, weight.hf


def toy_family() -> tuple[Row, ...]:
    """A dense family that names its tensors in its own way and fuses nothing in the server."""
    hf, megatron = "transformer.h.{layer}.", "decoder.layers.{layer}."

    def row(name: str, split: str, tensors: dict[str, str], te: str = "", fp8: bool = False) -> Row:
        named = tuple((hf + tensor, dims) for tensor, dims in tensors.items())
        return Row(megatron + name, split, named, megatron + te if te else "", fp8=fp8)

    return (
        Row("embedding.word_embeddings.weight", "vocab", (("transformer.wte.weight", "VH"),)),
        row("input_layernorm.weight", "replicated", {"ln_1.weight": "H"}, "self_attention.linear_qkv.layer_norm_weight"),
        row("self_attention.linear_qkv.weight", "qkv", {"q.weight": "QH", "k.weight": "KH", "v.weight": "KH"}, fp8=True),
        row("self_attention.linear_qkv.bias", "qkv", {"q.bias": "Q", "k.bias": "K", "v.bias": "K"}),
        row("self_attention.linear_proj.weight", "row", {"o.weight": "HQ"}, fp8=True),
        row("pre_mlp_layernorm.weight", "replicated", {"ln_2.weight": "H"}, "mlp.linear_fc1.layer_norm_weight"),
        row("mlp.linear_fc1.weight", "gate_up", {"gate.weight": "FH", "up.weight": "FH"}, fp8=True),
        row("mlp.linear_fc2.weight", "row", {"down.weight": "HF"}, fp8=True),
        Row("decoder.final_layernorm.weight", "replicated", (("transformer.ln_f.weight", "H"),)),
        Row("output_layer.weight", "vocab", (("head.weight", "VH"),)),
    )


def test_a_new_dense_family_is_a_table_of_under_40_lines(hf_models, tmp_path, monkeypatch):
    assert len(inspect.getsource(toy_family).splitlines()) < 40
    monkeypatch.setitem(TABLES, "toy", toy_family())
    monkeypatch.setitem(FAMILIES, "ToyForCausalLM", "toy")
    config = json.loads((Path(hf_models["llama"]) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["ToyForCausalLM"]}))
    arch = read_architecture(tmp_path)
    shapes = {name: shape for weight in weights_of(arch) for name, shape in zip(weight.hf, weight.shapes, strict=True)}
    assert len(shapes) == 3 + 12 * arch.layers and all(name.startswith(("transformer.", "head.")) for name in shapes)
    tensors = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, (name, shape) in enumerate(shapes.items())
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert check_checkpoint(tmp_path) == arch
    checkpoint = SafetensorsDir(tmp_path)
    for shard_of in (megatron_shard, server_shard):
        for weight in weights_of(arch):
            shards = [shard_of(weight, arch, 2, rank) for rank in range(2)]
            found = join_shards(weight, [(shard, read_shard(weight, shard, checkpoint.read)) for shard in shards])
            assert all(torch.equal(found[name], tensors[name]) for name in weight.hf)
