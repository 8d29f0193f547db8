"""Blockwise FP8: written from Megatron's values, read back, trained from, compared; transformers reads the same values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

from etr_megatron.convert import Ranks, to_hf, to_megatron, verify
from etr_megatron.errors import UserError
from etr_megatron.rollout.embedded import _replica
from etr_megatron.weights import check_checkpoint, read_architecture, weights_of
from etr_megatron.weights.quantize import quantize_blocks
from tests.hf_models import by_published_names
from tests.test_convert import assert_same_bits, overrides_of, tensors_of


@pytest.mark.parametrize(("family", "routers"), [("qwen3_moe", range(4)), ("deepseek_v3", range(1, 4))])
def test_fp8_export_quantises_what_the_map_says(hf_models, tmp_path, family, routers):
    to_megatron(Path(hf_models[family]), tmp_path / "megatron", Ranks())
    to_hf(tmp_path / "megatron", tmp_path / "fp8", Ranks(), dtype=torch.bfloat16, fp8_block=128)
    original, found = tensors_of(hf_models[family]), tensors_of(tmp_path / "fp8")
    quantised = {name for w in weights_of(read_architecture(hf_models[family])) if w.fp8 for name in w.hf}
    assert any("experts.5.down_proj" in name for name in quantised) and "lm_head.weight" not in quantised
    wanted = {name: tensor.bfloat16() for name, tensor in original.items() if name not in quantised}
    wanted |= {name: tensor for name, tensor in original.items() if name.endswith("e_score_correction_bias")}
    for name in quantised:
        wanted[name], wanted[f"{name}_scale_inv"] = quantize_blocks(original[name].bfloat16(), 128)
    assert_same_bits(found, wanted)
    quantization = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert quantization == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in routers)],
    }


def half_rounded(model: str, folder: Path) -> Path:
    """The fp32 checkpoint, with tensors that are not quantised rounded to bf16 values, which `dtype` then does not change."""
    quantised = {name for w in weights_of(read_architecture(model)) if w.fp8 for name in w.hf}
    tensors = tensors_of(model)
    folder.mkdir()
    (folder / "config.json").write_text((Path(model) / "config.json").read_text())
    kept = {name: tensor if name in quantised else tensor.bfloat16().float() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_values_are_rounded_to_the_type_that_is_asked_for_before_they_are_quantised(hf_models, tmp_path, monkeypatch, dtype):
    """A weight sync of a model in that dtype rounds the same way. `verify` accepts either rounding, but not a mixture."""
    monkeypatch.setattr("etr_megatron.convert.quantiser._PANEL", 16 * 48)  # one row of blocks at a time
    to_megatron(half_rounded(hf_models["qwen3"], tmp_path / "hf"), tmp_path / "megatron", Ranks())
    to_hf(tmp_path / "megatron", tmp_path / "fp8", Ranks(), dtype=dtype, fp8_block=16)
    original, found = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "fp8")
    quantised = [name.removesuffix("_scale_inv") for name in found if name.endswith("_scale_inv")]
    other = torch.bfloat16 if dtype is None else torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    for name in quantised:
        values, scales = quantize_blocks(original[name].to(dtype or torch.float32), 16)
        assert torch.equal(found[name].view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(found[f"{name}_scale_inv"], scales)
        assert not torch.equal(scales, quantize_blocks(original[name].to(other), 16)[1])
    result = verify(tmp_path / "fp8", tmp_path / "megatron", Ranks(), logits=False)
    assert result.same and sorted(result.rounded) == sorted(quantised)
    name = "model.layers.2.mlp.up_proj.weight"
    mixture = quantize_blocks(torch.cat([original[name][:16].to(other), original[name][16:].to(dtype or torch.float32)]), 16)
    found[name], found[f"{name}_scale_inv"] = mixture
    save_file(found, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    assert verify(tmp_path / "fp8", tmp_path / "megatron", Ranks(), logits=False).differing == [name]


@pytest.fixture
def fp8(hf_models, tmp_path):
    """An FP8 checkpoint in blocks of 16: transformers requires blocks that divide the tensors."""
    to_megatron(Path(hf_models["qwen3"]), tmp_path / "megatron", Ranks(), torch.bfloat16)
    to_hf(tmp_path / "megatron", tmp_path / "fp8", Ranks(), fp8_block=16)
    return tmp_path / "fp8"


def dequantized(folder: Path, block: int = 16) -> dict[str, torch.Tensor]:
    """What the files represent by the format's definition: each block's values times its scale."""
    tensors, found = tensors_of(folder), {}
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name}_scale_inv")
        if scales is not None:
            full = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[: tensor.shape[0], : tensor.shape[1]]
            found[name] = (tensor.float() * full).bfloat16()
        elif not name.endswith("_scale_inv"):
            found[name] = tensor
    return found


def test_fp8_is_read_back_and_written_again_bit_for_bit(fp8, tmp_path, monkeypatch):
    monkeypatch.setattr("etr_megatron.convert.hf_to_megatron.CHUNK_BYTES", 5000)  # chunks begin inside blocks
    monkeypatch.setattr("etr_megatron.convert.quantiser._PANEL", 16 * 48)  # one or two rows of blocks at a time
    monkeypatch.setattr("etr_megatron.weights.fp8_dir._PANEL", 7 * 48)  # rows begin inside blocks
    to_megatron(fp8, tmp_path / "again", Ranks())
    to_hf(tmp_path / "again", tmp_path / "bf16", Ranks())
    assert_same_bits(tensors_of(tmp_path / "bf16"), dequantized(fp8))
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    to_hf(tmp_path / "again", tmp_path / "fp8_again", Ranks(), fp8_block=16)
    assert_same_bits(tensors_of(tmp_path / "fp8_again"), tensors_of(fp8))
    assert json.loads((tmp_path / "fp8_again" / "config.json").read_text()) == json.loads((fp8 / "config.json").read_text())


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe_lite"])
def test_transformers_takes_fp8_of_latent_attention_for_what_it_stands_for(hf_models, tmp_path, family):
    """The largest block that divides all dimensions: else it refuses DeepSeek's own FP8 as well, whose 576 rows it does not
    divide into 5 blocks."""
    to_megatron(Path(hf_models[family]), tmp_path / "megatron", Ranks(), torch.bfloat16)
    to_hf(tmp_path / "megatron", tmp_path / "fp8", Ranks(), fp8_block=2)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    found = by_published_names({name: parameter.detach() for name, parameter in model.named_parameters()})
    assert_same_bits(found | biases, dequantized(tmp_path / "fp8", 2))


def test_transformers_takes_the_fp8_checkpoint_for_what_it_stands_for(fp8):
    config = AutoConfig.from_pretrained(fp8)
    assert config.quantization_config["quant_method"] == "fp8"
    model = AutoModelForCausalLM.from_pretrained(
        fp8, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    wanted = dequantized(fp8)
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].detach(), wanted[name]) for name in wanted)
    replica = _replica(fp8, torch.float32)  # gets its weights from the policy, in the training dtype
    assert {name: (p.shape, p.dtype) for name, p in replica.named_parameters()} == {
        name: (tensor.shape, torch.float32) for name, tensor in wanted.items()
    }


@pytest.mark.parametrize(("family", "layout"), [("qwen2", "tp2"), ("qwen3_moe", "ep2"), ("deepseek_v3", "tp2")])
def test_training_from_fp8_starts_as_from_what_it_stands_for(gangs, hf_models, tmp_path, family, layout):
    """Bit-exact, even where shards cut through blocks: 15 divides no dimension."""
    to_megatron(Path(hf_models[family]), tmp_path / "megatron", Ranks())
    to_hf(tmp_path / "megatron", tmp_path / "fp8", Ranks(), dtype=torch.bfloat16, fp8_block=15)
    overrides = overrides_of(family, layout)
    wanted = {name: tensor.float() for name, tensor in dequantized(tmp_path / "fp8", 15).items()}
    for found in gangs(2).run("tests.policy_jobs:export", model=str(tmp_path / "fp8"), overrides=overrides):
        assert_same_bits(found, wanted)
    assert check_checkpoint(tmp_path / "fp8") == check_checkpoint(hf_models[family])


@pytest.mark.parametrize("spoil", ["scales missing", "scales of another shape", "another method"])
def test_fp8_that_cannot_be_read_is_refused_by_name(fp8, tmp_path, spoil):
    tensors, name = tensors_of(fp8), "model.layers.1.mlp.up_proj.weight_scale_inv"
    if spoil == "scales missing":
        del tensors[name]
    elif spoil == "scales of another shape":
        tensors[name] = tensors[name].repeat(2, 1)
    else:
        config = json.loads((fp8 / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "awq"}
        (fp8 / "config.json").write_text(json.dumps(config))
    save_file(tensors, fp8 / "model.safetensors")
    messages = {
        "scales missing": r"layers\.1\.mlp\.up_proj\.weight is FP8 and its .*_scale_inv is missing",
        "scales of another shape": r"_scale_inv is of shape \[10, 3\], not \[5, 3\]",
        "another method": "quantised with quant_method awq and weight_block_size None cannot be read",
    }
    with pytest.raises(UserError, match=messages[spoil]):
        to_megatron(fp8, tmp_path / "out", Ranks())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_tied", "deepseek_v3"])
def test_verify_takes_fp8_for_what_it_was_made_of_and_for_what_it_stands_for(gangs, hf_models, tmp_path, family):
    """Bit-equal where possible, else equal once quantised. Logits agree. A single differing scale is reported."""
    to_megatron(Path(hf_models[family]), tmp_path / "plain", Ranks())
    to_hf(tmp_path / "plain", tmp_path / "fp8", Ranks(), fp8_block=16)
    to_megatron(tmp_path / "fp8", tmp_path / "read", Ranks())
    counts = [sum(len(w.hf) for w in weights_of(read_architecture(hf_models[family])) if w.fp8 or whole) for whole in (0, 1)]

    def found(megatron: str):
        return gangs(1).run("tests.convert_jobs:verified", hf=str(tmp_path / "fp8"), megatron=str(tmp_path / megatron))[0]

    exported, read = found("plain"), found("read")
    assert exported.same and (len(exported.rounded), exported.tensors) == tuple(counts)
    assert read.same and read.rounded == []
    for one in (exported, read):
        assert one.logits[0] <= 1e-5 * max(1.0, one.logits[1])
    tensors, name = tensors_of(tmp_path / "fp8"), "model.layers.3.self_attn.o_proj.weight"
    tensors[f"{name}_scale_inv"][2, 3] *= 2
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    assert found("plain").differing == found("read").differing == [name]
