"""tools/convert_hf.py: logits of every family, and memory use that does not depend on the model's size."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from etr_megatron.convert import Ranks, to_megatron
from etr_megatron.convert.comparison import Verification
from etr_megatron.weights import read_architecture, weights_of
from tests import warm
from tests.hf_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_compares_the_logits_of_every_family_and_sees_another_weight(gangs, hf_models, tmp_path, family):
    hf, spoilt = Path(hf_models[family]), tmp_path / "spoilt"
    to_megatron(hf, tmp_path / "megatron", Ranks())

    def found(model: Path) -> Verification:
        return gangs(1).run("tests.convert_jobs:verified", hf=str(model), megatron=str(tmp_path / "megatron"))[0]

    same = found(hf)
    assert same.same and same.differing == [] and same.logits[0] <= 1e-5
    spoilt.mkdir()
    (spoilt / "config.json").write_text((hf / "config.json").read_text())
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    other = found(spoilt)
    assert other.differing == ["model.norm.weight"] and not other.same and other.logits[0] > 1e-3 * other.logits[1]


def write_wide_model(path: Path, **changes: int) -> int:
    """Write an fp32 Llama of zeros; returns the bytes of its tensors."""
    path.mkdir()
    sizes = dict(vocab_size=1001, hidden_size=768, intermediate_size=2048, num_hidden_layers=7) | changes
    heads = dict(num_attention_heads=12, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True)
    config = LlamaConfig(architectures=["LlamaForCausalLM"], **sizes, **heads, dtype="float32").to_dict()
    (path / "config.json").write_text(json.dumps(config))
    weights = list(weights_of(read_architecture(path)))
    tensors = {name: torch.zeros(shape) for w in weights for name, shape in zip(w.hf, w.shapes, strict=True)}
    save_file(tensors, path / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def grown(*argv: str | Path) -> int:
    """Bytes by which the tool's memory grows, measured in a process of its own."""
    process = warm.start([sys.executable, "-m", "tests.convert_jobs", "memory", *map(str, argv)], {**os.environ})
    said, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    return int(said.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [[], ["--dtype", "bf16"]], ids=["copied", "cast"])
def test_memory_does_not_grow_with_the_model(tmp_path, dtype):
    """178 MB in tensors of at most 6 MB, converted there and back in separate processes."""
    assert write_wide_model(tmp_path / "hf") > 175e6
    there = grown("to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "megatron", *dtype)
    back = grown("to-hf", "--megatron", tmp_path / "megatron", "--out", tmp_path / "back", *dtype)
    assert max(there, back) < 70e6, (there, back)


@pytest.mark.slow
def test_memory_of_fp8_does_not_grow_with_the_model(tmp_path):
    """From 178 MB of fp32 to FP8, and from there to 89 MB of bf16."""
    write_wide_model(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "megatron", Ranks())
    there = grown("to-hf", "--megatron", tmp_path / "megatron", "--out", tmp_path / "fp8", "--fp8-block", "128")
    back = grown("to-megatron", "--hf", tmp_path / "fp8", "--out", tmp_path / "again")
    assert max(there, back) < 70e6, (there, back)


@pytest.mark.slow
def test_a_large_tensor_is_quantised_with_one_copy_of_it_in_memory(tmp_path):
    largest = 4 * 768 * 43008  # 132 MB: gate, up and down
    write_wide_model(tmp_path / "hf", intermediate_size=43008, num_hidden_layers=1)
    to_megatron(tmp_path / "hf", tmp_path / "megatron", Ranks())
    found = grown("to-hf", "--megatron", tmp_path / "megatron", "--out", tmp_path / "fp8", "--fp8-block", "128")
    assert found < 2 * largest, found


def test_two_ranks_read_every_byte_once_and_each_its_share(gangs, tmp_path):
    size = write_wide_model(tmp_path / "hf", num_hidden_layers=2)
    for one in zip(*gangs(2).run("tests.convert_jobs:reads", hf=str(tmp_path / "hf"), out=str(tmp_path / "out")), strict=True):
        assert size <= sum(one) < 1.05 * size and max(one) < 0.7 * size, (one, size)
