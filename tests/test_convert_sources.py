"""Checkpoints as users have them: links into a hub cache, leftovers, other dtypes. Round trips are bit-exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from etr_megatron.convert import Ranks, to_hf, to_megatron, verify
from etr_megatron.convert.safetensors_writer import SafetensorsWriter, TensorToWrite
from etr_megatron.errors import UserError
from etr_megatron.weights.quantize import quantize_blocks
from tests.test_convert import assert_same_bits, tensors_of

INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def hf(hf_models, tmp_path):
    return Path(shutil.copytree(hf_models["llama"], tmp_path / "hf"))


def there_and_back(hf: Path) -> dict[str, torch.Tensor]:
    """The tensors after a round trip; `verify` must find the same model."""
    megatron, back = hf.parent / "megatron", hf.parent / "back"
    to_megatron(hf, megatron, Ranks())
    to_hf(megatron, back, Ranks())
    assert verify(hf, megatron, Ranks(), logits=False).same
    return tensors_of(back)


def test_links_into_a_cache_are_followed_and_files_come_out(hf, tmp_path):
    """In the hub's cache, the checkpoint's file names are links to files named by their hashes."""
    blobs, tensors, snapshot = tmp_path / "blobs", tensors_of(hf), tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    shutil.copyfile(hf / "config.json", blobs / "5ae1")
    (snapshot / "config.json").symlink_to("../blobs/5ae1")
    names, index = sorted(tensors), {}
    for number in (0, 1):
        some = names[number::2]
        save_file({name: tensors[name] for name in some}, blobs / f"9f{number}c")
        file = f"model-0000{number + 1}-of-00002.safetensors"
        (snapshot / file).symlink_to(f"../blobs/9f{number}c")
        index.update(dict.fromkeys(some, file))
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert_same_bits(there_and_back(snapshot), tensors)
    assert not any(file.is_symlink() for folder in ("megatron", "back") for file in (tmp_path / folder).iterdir())


def test_rotary_frequencies_that_old_checkpoints_hold_are_left_out_and_nothing_else_is(hf):
    """They can be derived from config.json."""
    tensors = tensors_of(hf)
    more = {INV_FREQ.format(layer): torch.ones(8) for layer in range(4)}
    save_file(tensors | more, hf / "model.safetensors")
    assert_same_bits(there_and_back(hf), tensors)
    save_file(tensors | {"model.layers.0.self_attn.k_scale": torch.ones(1)}, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"1 tensor is unknown to the llama family with 4 layers \(.*k_scale\)"):
        to_megatron(hf, hf.parent / "refused", Ranks())


@pytest.mark.parametrize(
    "type_of",
    [lambda name: torch.float16, lambda name: torch.float32 if "norm" in name else torch.bfloat16],
    ids=["fp16", "bf16 with norms in fp32"],
)
def test_types_stay_as_they_are(hf, type_of):
    tensors = {name: tensor.to(type_of(name)) for name, tensor in tensors_of(hf).items()}
    save_file(tensors, hf / "model.safetensors")
    assert_same_bits(there_and_back(hf), tensors)


@pytest.mark.parametrize("scale_type", [torch.bfloat16, torch.float32])
def test_fp8_of_some_layers_with_scales_of_either_type_is_what_it_stands_for(hf, scale_type):
    """Qwen's own FP8 checkpoints have scales in bf16; a head may be FP8 as well."""
    tensors, block = tensors_of(hf), 16
    stored, wanted = {}, {}
    for name, tensor in tensors.items():
        stored[name] = wanted[name] = tensor.bfloat16()
        if ("proj.weight" in name and ".layers.2." not in name) or name == "lm_head.weight":
            values, scales = quantize_blocks(tensor.bfloat16(), block)
            scales = scales.to(scale_type)
            stored[name], stored[name + "_scale_inv"] = values, scales
            full = scales.float().repeat_interleave(block, 0).repeat_interleave(block, 1)
            wanted[name] = (values.float() * full[: tensor.shape[0], : tensor.shape[1]]).bfloat16()
    save_file(stored, hf / "model.safetensors")
    config = json.loads((hf / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (hf / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    found = there_and_back(hf)
    assert_same_bits(found, wanted)
    assert any(not torch.equal(found[name], tensors[name].bfloat16()) for name in tensors)


def test_verify_compares_bits_and_not_numbers(hf):
    """A NaN equals itself, 0 and -0 differ."""
    tensors, name = tensors_of(hf), "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5], tensors[name][4, 6] = float("nan"), 0.0
    save_file(tensors, hf / "model.safetensors")
    assert_same_bits(there_and_back(hf), tensors)
    tensors[name][4, 6] = -0.0
    save_file(tensors, hf / "model.safetensors")
    assert verify(hf, hf.parent / "megatron", Ranks(), logits=False).differing == [name]


def test_headers_and_tensors_in_written_files_are_aligned(tmp_path):
    """As the safetensors library does: readers map a file into memory and view the values in place."""
    tensors = {
        "x": torch.arange(15.0).view(3, 5).to(torch.float8_e4m3fn),
        "x_scale_inv": torch.tensor([[0.5]]),
        "odd": torch.tensor([1.0, 2.0, 3.0]).bfloat16(),
        "last": torch.tensor([4.0]),
    }
    listed = [TensorToWrite(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(tmp_path, listed, 10**6)
    writer.create()
    for name, tensor in tensors.items():
        writer.write(name, (0,) * tensor.dim(), tensor)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert all(header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0 for name, tensor in tensors.items())
    assert_same_bits(tensors_of(tmp_path), tensors)
