"""Weights by way of a directory: complete or not there, loadable by others, read by range."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from etr_megatron.errors import UserError
from etr_megatron.weights import ServerLayout, TrainingLayout, read_architecture
from etr_megatron.weights.quantize import quantize_blocks
from etr_megatron.weights.transport import DiskReader, SyncError, version_directory
from tests.test_plan import architecture
from tests.transport_jobs import empty_shards, plan_for, shards_from


def files_of(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def read(directory, model: str, destination: ServerLayout, rank: int, version: int, **options) -> dict[str, torch.Tensor]:
    plan = plan_for(model, TrainingLayout(), destination, torch.float32, fp8_block=options.get("fp8_block"))
    shards = empty_shards(plan, rank, torch.float32)
    reader = DiskReader(directory, destination, read_architecture(model), rank, timeout_s=5, **options)
    reader.sync(version, None, shards)
    assert reader.versions.complete == version
    return shards


@pytest.mark.parametrize("source", [TrainingLayout(tp=2), TrainingLayout(pp=2), TrainingLayout(dp=2)])
def test_what_ranks_write_is_the_checkpoint_and_readers_get_their_shards(gangs, hf_models, tmp_path, source):
    model = hf_models["qwen3_tied"]
    found = gangs(2).run(
        "tests.transport_jobs:write_to_disk",
        directory=str(tmp_path),
        model=model,
        source=source,
        versions=[3],
        file_bytes=60_000,
        checksums=True,
    )
    assert found == [3, 3]
    folder = version_directory(tmp_path, 3)
    wanted = load_file(f"{model}/model.safetensors")
    tensors = files_of(folder)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == wanted.keys()
    assert index["metadata"]["total_size"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert len(set(index["weight_map"].values())) > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_000003"]
    for rank in (0, 1):
        shards = read(tmp_path, model, ServerLayout(tp=2), rank, 3, checksums=True)
        expected = shards_from(model, ServerLayout(tp=2), rank)
        assert all(torch.equal(shards[name], expected[name]) for name in expected)


def test_transformers_loads_the_directory(gangs, hf_models, tmp_path):
    from transformers import AutoModelForCausalLM

    model = hf_models["llama"]
    gangs(2).run(
        "tests.transport_jobs:write_to_disk", directory=str(tmp_path), model=model, source=TrainingLayout(tp=2), versions=[1]
    )
    folder = version_directory(tmp_path, 1)
    shutil.copy(f"{model}/config.json", folder)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, model))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_fp8_on_disk_has_published_names_and_each_reader_its_blocks(gangs, hf_models, tmp_path):
    model, block = hf_models["qwen3"], 8
    arguments = dict(directory=str(tmp_path), model=model, source=TrainingLayout(tp=2), versions=[1], fp8_block=block)
    gangs(2).run("tests.transport_jobs:write_to_disk", **arguments, checksums=True, dtype=torch.bfloat16)
    tensors = files_of(version_directory(tmp_path, 1))
    wanted = load_file(f"{model}/model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    values, scales = quantize_blocks(wanted[name].bfloat16(), block)
    assert torch.equal(tensors[name].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(tensors[name + "_scale_inv"], scales)
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    shards = read(tmp_path, model, ServerLayout(tp=2), 1, 1, fp8_block=block, checksums=True)
    assert torch.equal(shards["decoder.layers.3.mlp.linear_fc2.weight"].view(torch.uint8), values[:, 40:].view(torch.uint8))
    assert torch.equal(shards["decoder.layers.3.mlp.linear_fc2.weight_scale_inv"], scales[:, 5:])


def test_old_versions_go_and_the_last_stay(gangs, hf_models, tmp_path):
    (tmp_path / ".version_000009.unfinished").mkdir()
    (tmp_path / ".version_000009.unfinished" / "rest").write_text("of a killed job")
    arguments = dict(directory=str(tmp_path), model=hf_models["llama"], source=TrainingLayout(tp=2))
    gangs(2).run("tests.transport_jobs:write_to_disk", **arguments, versions=[7, 8, 9, 9])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_000008", "version_000009"]
    assert not (version_directory(tmp_path, 9) / "rest").exists()


def test_a_full_disk_is_named_on_every_rank_and_leaves_nothing(gangs, hf_models, tmp_path):
    found = gangs(2).run(
        "tests.transport_jobs:fail_to_write", directory=str(tmp_path), model=hf_models["llama"], source=TrainingLayout(tp=2)
    )
    for error in found:
        assert "weight sync of version 1 did not complete: rank 1 failed: OSError: [Errno 28] No space left" in error
    assert list(tmp_path.iterdir()) == []


def test_a_reader_waits_for_a_version_until_its_deadline_and_names_it(hf_models, tmp_path):
    reader = DiskReader(tmp_path, ServerLayout(), read_architecture(hf_models["llama"]), 0, timeout_s=0.2)
    with pytest.raises(SyncError, match=r"version 5 of the weights did not appear in .* in 0\.2 s"):
        reader.sync(5, None, {})


def test_a_byte_changed_on_disk_is_named_and_the_version_not_complete(gangs, hf_models, tmp_path):
    model = hf_models["llama"]
    arguments = dict(directory=str(tmp_path), model=model, source=TrainingLayout(tp=2), versions=[1], checksums=True)
    gangs(2).run("tests.transport_jobs:write_to_disk", **arguments)
    folder = version_directory(tmp_path, 1)
    name = "model.layers.2.self_attn.o_proj.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + header])[name]["data_offsets"][0]
    data[8 + header + begin + 100] ^= 1
    file.write_bytes(data)
    arch = read_architecture(model)
    reader = DiskReader(tmp_path, ServerLayout(), arch, 0, timeout_s=1, checksums=True)
    shards = shards_from(model, ServerLayout(), 0)
    with pytest.raises(SyncError, match=rf"version 1 .* did not complete: {name} differs from what was written"):
        reader.sync(1, None, shards)
    assert reader.versions.complete is None


def test_a_reader_that_would_cut_fp8_blocks_is_refused(tmp_path):
    with pytest.raises(UserError, match="whole FP8 blocks of 128"):
        DiskReader(tmp_path, ServerLayout(tp=2), architecture(), 0, fp8_block=128)
