"""Families with latent attention: what a config.json may say, published or written by transformers, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from etr_megatron.convert import Ranks, to_hf, to_megatron, verify
from etr_megatron.errors import UserError
from etr_megatron.rollout.embedded import _replica
from etr_megatron.weights import Experts, LatentAttention, check_checkpoint, read_architecture, weights_of
from etr_megatron.weights.quantize import quantize_blocks
from tests.hf_models import rewrite_config_as_published, write_model
from tests.test_convert import assert_same_bits, tensors_of
from tests.test_convert_fp8 import dequantized
from tests.test_glm4_moe import with_config

LATENT = ("deepseek_v3", "glm4_moe_lite")
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)

DEEPSEEK_V3 = dict(
    architectures=["DeepseekV3ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    auto_map={
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    aux_loss_alpha=0.001,
    bos_token_id=0,
    eos_token_id=1,
    ep_size=1,
    first_k_dense_replace=3,
    hidden_act="silu",
    hidden_size=7168,
    initializer_range=0.02,
    intermediate_size=18432,
    kv_lora_rank=512,
    max_position_embeddings=163840,
    model_type="deepseek_v3",
    moe_intermediate_size=2048,
    moe_layer_freq=1,
    n_group=8,
    n_routed_experts=256,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_attention_heads=128,
    num_experts_per_tok=8,
    num_hidden_layers=61,
    num_key_value_heads=128,
    num_nextn_predict_layers=1,
    pretraining_tp=1,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    quantization_config=dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]),
    rms_norm_eps=1e-06,
    rope_scaling=dict(
        beta_fast=32,
        beta_slow=1,
        factor=40,
        mscale=1.0,
        mscale_all_dim=1.0,
        original_max_position_embeddings=4096,
        type="yarn",
    ),
    rope_theta=10000,
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    seq_aux=True,
    tie_word_embeddings=False,
    topk_group=4,
    topk_method="noaux_tc",
    torch_dtype="bfloat16",
    transformers_version="4.33.1",
    use_cache=True,
    v_head_dim=128,
    vocab_size=129280,
)
# Moonlight-16B-A3B: the same model type without a latent of the queries, groups, YaRN and layers that draft
MOONLIGHT = {
    **{name: value for name, value in DEEPSEEK_V3.items() if name not in ("quantization_config", "rope_scaling")},
    **dict(q_lora_rank=None, n_group=1, topk_group=1, num_experts_per_tok=6, n_routed_experts=64, n_shared_experts=2),
    **dict(hidden_size=2048, num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=27, first_k_dense_replace=1),
    **dict(rope_theta=50000.0, routed_scaling_factor=2.446, num_nextn_predict_layers=0),
}
GLM_4_7_FLASH = dict(
    architectures=["Glm4MoeLiteForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    dtype="bfloat16",
    eos_token_id=[154820, 154827, 154829],
    first_k_dense_replace=1,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=10240,
    kv_lora_rank=512,
    max_position_embeddings=202752,
    model_type="glm4_moe_lite",
    moe_intermediate_size=1536,
    n_group=1,
    n_routed_experts=64,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_attention_heads=20,
    num_experts_per_tok=4,
    num_hidden_layers=47,
    num_key_value_heads=20,
    num_nextn_predict_layers=1,
    pad_token_id=154820,
    partial_rotary_factor=1.0,
    q_lora_rank=768,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=1000000,
    routed_scaling_factor=1.8,
    tie_word_embeddings=False,
    topk_group=1,
    topk_method="noaux_tc",
    transformers_version="5.0.0rc0",
    v_head_dim=256,
    vocab_size=154880,
)


def written(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_published_deepseek_v3_is_read_with_all_its_fields(tmp_path):
    found = read_architecture(written(tmp_path / "model", DEEPSEEK_V3))
    assert found.latent == LatentAttention(kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, value_dim=128)
    assert (found.head_dim, found.value_dim, found.kv_heads, found.mtp_layers) == (192, 128, 128, 1)
    assert found.experts == Experts(
        count=256,
        per_token=8,
        intermediate_size=2048,
        normalized=True,
        dense_layers=frozenset({0, 1, 2}),
        shared_size=2048,
        score_function="sigmoid",
        expert_bias=True,
        scaling_factor=2.5,
        groups=8,
        groups_per_token=4,
    )
    assert found.rope == dict(
        **dict(rope_type="yarn", rope_theta=10000, factor=40, original_max_position_embeddings=4096),
        **dict(beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
    )
    shapes = {name: shape for weight in weights_of(found) for name, shape in zip(weight.hf, weight.shapes, strict=True)}
    attention = {name.split(".self_attn.")[1]: shape for name, shape in shapes.items() if "layers.60.self_attn" in name}
    assert attention == {
        "q_a_proj.weight": (1536, 7168),
        "q_a_layernorm.weight": (1536,),
        "q_b_proj.weight": (24576, 1536),
        "kv_a_proj_with_mqa.weight": (576, 7168),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (32768, 512),
        "o_proj.weight": (7168, 16384),
    }
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 671_026_419_200


def test_the_same_model_type_without_groups_and_a_latent_of_queries_is_read(tmp_path):
    found = read_architecture(written(tmp_path / "model", MOONLIGHT))
    assert found.latent is not None and found.latent.q_rank is None and found.experts is not None
    assert (found.experts.groups, found.experts.groups_per_token, found.experts.shared_size) == (1, 1, 4096)
    assert found.rope == {"rope_type": "default", "rope_theta": 50000.0} and found.mtp_layers == 0


def test_a_published_glm_4_7_flash_is_read_with_all_its_fields(tmp_path):
    found = read_architecture(written(tmp_path / "model", GLM_4_7_FLASH))
    assert found.latent == LatentAttention(kv_rank=512, q_rank=768, nope_dim=192, rope_dim=64, value_dim=256)
    assert (found.norm_eps, found.mtp_layers, found.max_positions) == (1e-5, 1, 202752)
    assert found.experts is not None and found.experts.dense_layers == frozenset({0})
    assert (found.experts.count, found.experts.per_token, found.experts.scaling_factor) == (64, 4, 1.8)
    assert found.rope == {"rope_type": "default", "rope_theta": 1000000}
    total = sum(torch.Size(shape).numel() for weight in weights_of(found) for shape in weight.shapes)
    assert 29e9 < total < 31e9


@pytest.mark.parametrize("family", LATENT)
def test_the_published_form_is_the_same_model_for_us_and_for_transformers(hf_models, tmp_path, family):
    more = {name: DEEPSEEK_V3[name] for name in ("auto_map", "aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux")}
    folder = with_config(hf_models[family], tmp_path / "published", more)
    rewrite_config_as_published(folder)
    config = json.loads((folder / "config.json").read_text())
    assert not config.keys() & {"rope_parameters", "mlp_layer_types", "head_dim", "rope_interleave"}
    assert config.keys() >= {"rope_theta", "first_k_dense_replace", "moe_layer_freq", "topk_method"}
    assert check_checkpoint(folder) == check_checkpoint(hf_models[family])
    theirs = [AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in (folder, hf_models[family])]
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        logits = [model(tokens).logits for model in theirs]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"architectures": ["DeepseekV2ForCausalLM"]},
            "architectures is ['DeepseekV2ForCausalLM']; supported are DeepseekV3For",
        ),
        ({"architectures": ["DeepseekV32ForCausalLM"]}, "architectures is ['DeepseekV32ForCausalLM']; supported are"),
        ({"model_type": "kimi_k2"}, 'model_type is "kimi_k2"; only "deepseek_v3" is supported for the deepseek_v3 family'),
        ({"scoring_func": "softmax"}, 'scoring_func is "softmax"; only "sigmoid" is supported'),
        ({"topk_method": "group_limited_greedy"}, 'topk_method is "group_limited_greedy"; only "noaux_tc" is supported'),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2; only 1 is supported"),
        ({"norm_topk_prob": False}, "norm_topk_prob is false; only true is supported"),
        ({"attention_bias": True}, "attention_bias is true; only false is supported"),
        ({"index_topk": 2048}, "index_topk is 2048; only null is supported for the deepseek_v3 family"),
        ({"rope_interleave": False}, "rope_interleave is false; only true is supported"),
        ({"rope_interleave": None}, "rope_interleave is null; only true is supported"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; only 4, the number of heads, is supported"),
        ({"head_dim": 20}, "head_dim is 20; only 8, as qk_rope_head_dim, is supported"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, but a rotary embedding turns pairs of dimensions"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim must be a positive integer, not 0"),
        ({"kv_lora_rank": None}, "kv_lora_rank must be a positive integer, not null"),
        ({"q_lora_rank": 0}, "q_lora_rank must be a positive integer, not 0"),
        ({"v_head_dim": "14"}, 'v_head_dim must be a positive integer, not "14"'),
        ({"rope_parameters": YARN | {"mscale": 0.5}}, "mscale is 0.5 and mscale_all_dim 1.0; only equal ones are supported"),
        ({"rope_parameters": {k: v for k, v in YARN.items() if k != "mscale_all_dim"}}, "field 'mscale_all_dim' is missing"),
        ({"rope_parameters": YARN | {"mscale": 0}}, "mscale must be a positive number, not 0"),
        (
            {"rope_parameters": YARN | {"attention_factor": 2.0}},
            "attention_factor is 2.0 for rope_type yarn; yarn is supported",
        ),
        ({"rope_parameters": LLAMA3}, "rope_type 'llama3' is not supported with latent attention; supported are default and"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1 is supported"),
        ({"n_group": 5}, "n_group=5 with topk_group=2 cannot give 4 of 12 experts to a token"),
        ({"topk_group": 5}, "n_group=4 with topk_group=5 cannot give 4 of 12 experts to a token"),
        ({"topk_group": 1}, "n_group=4 with topk_group=1 cannot give 4 of 12 experts to a token"),
        ({"n_group": None}, "n_group=8 with topk_group=2 cannot give 4 of 12 experts to a token"),  # transformers' default
        ({"topk_group": 3}, "groups are supported only if a token has two experts in each that it may choose from"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1, which leaves the router without a gradient"),
        ({"n_shared_experts": None, "first_k_dense_replace": 4}, "first_k_dense_replace is 4, which leaves none of the 4"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be 0 or a positive integer, not -1"),
    ],
)
def test_what_is_not_supported_of_deepseek_v3_is_refused_by_name(hf_models, tmp_path, change, sentence):
    refused(with_config(hf_models["deepseek_v3"], tmp_path / "changed", change), sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model_type": "glm4_moe"},
            'model_type is "glm4_moe"; only "glm4_moe_lite" is supported for the glm4_moe_lite family',
        ),
        ({"n_group": 2}, "n_group is 2; only 1 is supported"),
        ({"topk_group": 2}, "topk_group is 2; only 1 is supported"),
        (
            {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
            'mlp_layer_types is ["dense", "sparse", "dense", "sparse"]; only dense layers followed by sparse ones, 4 in all',
        ),
        ({"mlp_layer_types": ["dense", "sparse"]}, "only dense layers followed by sparse ones, 4 in all, are supported"),
        ({"mlp_layer_types": "dense"}, 'mlp_layer_types is "dense"; only dense layers followed by sparse ones'),
        ({"mlp_layer_types": ["dense"] * 4}, "first_k_dense_replace is 4, which leaves none of the 4 layers with experts"),
        ({"first_k_dense_replace": 2}, "first_k_dense_replace is 2, but 1 in mlp_layer_types; correct the wrong one"),
        (
            {"first_k_dense_replace": 2, "mlp_layer_types": None},
            "first_k_dense_replace is 2, but 1 for transformers without mlp_layer_types; correct the wrong one",
        ),
        ({"first_k_dense_replace": True}, "first_k_dense_replace must be 0 or a positive integer, not true"),
    ],
)
def test_what_is_not_supported_of_glm_4_7_flash_is_refused_by_name(hf_models, tmp_path, change, sentence):
    refused(with_config(hf_models["glm4_moe_lite"], tmp_path / "changed", change), sentence)


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        read_architecture(folder)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", LATENT)
def test_absent_fields_are_what_transformers_takes(tmp_path, family):
    kept = (
        "model_type",
        "architectures",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
        "num_hidden_layers",
    )
    kept += ("num_attention_heads", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "q_lora_rank")
    kept += ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    name = "Glm4MoeLiteForCausalLM" if family == "glm4_moe_lite" else "DeepseekV3ForCausalLM"
    config = {key: DEEPSEEK_V3[key] for key in kept} | {"model_type": family, "architectures": [name]}
    folder = written(tmp_path / "short", config)
    found, theirs = read_architecture(folder), AutoConfig.from_pretrained(folder)
    assert found.experts is not None
    dense = theirs.mlp_layer_types.count("dense") if family == "glm4_moe_lite" else theirs.first_k_dense_replace
    assert found.experts.dense_layers == frozenset(range(dense))
    assert (found.experts.groups, found.experts.groups_per_token) == (theirs.n_group, theirs.topk_group)
    assert found.experts.shared_size == theirs.n_shared_experts * theirs.moe_intermediate_size
    assert found.experts.scaling_factor == theirs.routed_scaling_factor
    assert theirs.norm_topk_prob and theirs.rope_interleave and not theirs.attention_bias
    assert found.rope == {"rope_type": "default", "rope_theta": theirs.rope_parameters["rope_theta"]}
    without = written(tmp_path / "undecided", {key: value for key, value in config.items() if key != "q_lora_rank"})
    with pytest.raises(UserError, match="field 'q_lora_rank' is missing"):
        read_architecture(without)


def test_norms_of_latents_have_the_eps_of_the_config_that_transformers_does_not_use(gangs, tmp_path):
    model = write_model("glm4_moe_lite", tmp_path / "model", q_lora_rank=22, rms_norm_eps=1e-3)
    assert AutoModelForCausalLM.from_pretrained(model).model.layers[1].self_attn.q_a_layernorm.variance_epsilon == 1e-6
    to_megatron(Path(model), tmp_path / "megatron", Ranks())
    (found,) = gangs(1).run("tests.convert_jobs:verified", hf=model, megatron=str(tmp_path / "megatron"))
    assert found.same and found.logits[0] < 1e-5
    norms = [module for name, module in _replica(model, torch.float32).named_modules() if name.endswith("norm")]
    assert len(norms) == 4 * 4 + 1 and {norm.variance_epsilon for norm in norms} == {1e-3}


DRAFTING = {
    "embed_tokens.weight": (301, 48),
    "enorm.weight": (48,),
    "hnorm.weight": (48,),
    "eh_proj.weight": (48, 96),
    "shared_head.norm.weight": (48,),
    "shared_head.head.weight": (301, 48),
}
"""Tensors of DeepSeek's layer for multi-token prediction that its other layers do not have."""


def add_draft(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write the tensors, and after the last layer one for multi-token prediction."""
    draft = {name.replace("layers.3.", "layers.4."): tensor.clone() for name, tensor in tensors.items() if "layers.3." in name}
    draft |= {f"model.layers.4.{name}": torch.ones(shape) for name, shape in DRAFTING.items()}
    save_file(tensors | draft, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", LATENT)
def test_layers_that_draft_are_left_out_if_the_config_says_how_many_there_are(hf_models, tmp_path, family):
    folder = with_config(hf_models[family], tmp_path / "model", {"num_nextn_predict_layers": 1})
    tensors = load_file(folder / "model.safetensors")
    add_draft(tensors, folder / "model.safetensors")
    to_megatron(folder, tmp_path / "megatron", Ranks())
    to_hf(tmp_path / "megatron", tmp_path / "back", Ranks())
    assert_same_bits(tensors_of(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert verify(folder, tmp_path / "megatron", Ranks(), logits=False).same
    shutil.copy(tmp_path / "back" / "config.json", folder)
    with pytest.raises(UserError, match=rf"unknown to the {family} family with 4 layers .* set num_nextn_predict_layers to"):
        check_checkpoint(folder)


@pytest.mark.parametrize("family", LATENT)
def test_fp8_as_deepseek_publishes_it_is_read_and_written_again_bit_for_bit(hf_models, tmp_path, family):
    """All linear layers but router and head are FP8, those of the layer that drafts too. As 576 rows by 128, the rows of the
    projection to the latent of keys and values, here 34, are not whole blocks."""
    quantization = DEEPSEEK_V3["quantization_config"] | {"weight_block_size": [16, 16]}
    folder = with_config(
        hf_models[family], tmp_path / "model", {"quantization_config": quantization, "num_nextn_predict_layers": 1}
    )
    rewrite_config_as_published(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(tensor.bfloat16(), 16)
        else:
            tensors[name] = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
    assert tensors["model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (3, 3)
    save_file(tensors, folder / "model.safetensors")
    wanted = dequantized(folder)
    add_draft(tensors, folder / "model.safetensors")
    to_megatron(folder, tmp_path / "megatron", Ranks())
    to_hf(tmp_path / "megatron", tmp_path / "bf16", Ranks())
    assert_same_bits(tensors_of(tmp_path / "bf16"), wanted)
    to_hf(tmp_path / "megatron", tmp_path / "fp8", Ranks(), fp8_block=16)
    assert_same_bits(tensors_of(tmp_path / "fp8"), tensors)
    for one in (folder, tmp_path / "fp8"):
        assert verify(one, tmp_path / "megatron", Ranks(), logits=False).same
