"""Weights through a directory: complete or absent, loadable by other tools, read by range."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import HashStore

from etr_megatron.errors import UserError
from etr_megatron.weights import ServerLayout, TrainingLayout, read_architecture
from etr_megatron.weights.quantize import quantize_blocks
from etr_megatron.weights.transport import DiskReader, DiskWriter, SyncError, Wire, version_directory
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


@pytest.mark.parametrize(
    ("family", "source"),
    [
        ("qwen3_tied", TrainingLayout(tp=2)),
        ("qwen3_tied", TrainingLayout(pp=2)),
        ("qwen3_tied", TrainingLayout(dp=2)),
        ("qwen3_moe", TrainingLayout(dp=2, ep=2)),
        ("qwen3_moe_dense", TrainingLayout(tp=2, ep=2, etp=1)),
    ],
)
def test_what_ranks_write_is_the_checkpoint_and_readers_get_their_shards(gangs, hf_models, tmp_path, family, source):
    model = hf_models[family]
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


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("file", [1, -1])
def test_a_file_that_cannot_be_saved_is_named_on_every_rank_and_nothing_is_left(gangs, hf_models, tmp_path, file, culprit):
    """Files are saved while the next one is gathered, except the last."""
    arguments = dict(directory=str(tmp_path), model=hf_models["llama"], source=TrainingLayout(tp=2))
    found = gangs(2).run("tests.transport_jobs:fail_to_write", **arguments, file=file, culprit=culprit)
    name = rf"model-rank0000{culprit}-\d+\.safetensors"
    for error, files in found:
        assert files > 2
        assert re.search(rf"1 did not complete: rank {culprit} failed: OSError: .*{name} .*File too large", error), error
    assert list(tmp_path.iterdir()) == []


def one_writer(directory, model: str, **options) -> DiskWriter:
    wire = Wire(HashStore(), 0, 1, timeout_s=5)
    return DiskWriter(directory, TrainingLayout(), read_architecture(model), wire, dtype=torch.float32, **options)


def test_the_versions_published_last_stay_when_a_run_goes_back(hf_models, tmp_path):
    model = hf_models["llama"]
    writer, shards = one_writer(tmp_path, model), shards_from(model, TrainingLayout(), 0)
    for version, kept in ((7, [7]), (8, [7, 8]), (3, [3, 8]), (4, [3, 4])):
        writer.sync(version, shards)
        assert sorted(path.name for path in tmp_path.iterdir()) == [version_directory("", v).name for v in kept]
    one_writer(tmp_path, model, keep=1).sync(2, shards)
    assert [path.name for path in tmp_path.iterdir()] == ["version_000002"]


def test_a_version_that_was_put_aside_when_the_writer_was_killed_comes_back(hf_models, tmp_path):
    model = hf_models["llama"]
    shards = shards_from(model, TrainingLayout(), 0)
    one_writer(tmp_path, model).sync(8, shards)
    version_directory(tmp_path, 8).rename(tmp_path / ".version_000008.replaced")
    (tmp_path / ".version_000008.unfinished").mkdir()
    one_writer(tmp_path, model).sync(9, shards)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_000008", "version_000009"]
    found, wanted = read(tmp_path, model, ServerLayout(), 0, 8), shards_from(model, ServerLayout(), 0)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_version_that_could_not_be_replaced_is_still_there(hf_models, tmp_path, monkeypatch):
    model = hf_models["llama"]
    shards = shards_from(model, TrainingLayout(), 0)
    one_writer(tmp_path, model).sync(8, shards)
    rename = os.rename

    def refuse_the_new_one(old, new):
        if new == version_directory(tmp_path, 8) and str(old).endswith(".unfinished"):
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse_the_new_one)
    with pytest.raises(SyncError, match=r"version 8 did not complete: rank 0 failed: OSError: .*Input/output error"):
        one_writer(tmp_path, model).sync(8, {name: tensor + 1 for name, tensor in shards.items()})
    assert [path.name for path in tmp_path.iterdir()] == ["version_000008"]
    found, wanted = read(tmp_path, model, ServerLayout(), 0, 8), shards_from(model, ServerLayout(), 0)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_rank_that_fails_while_rank_0_publishes_takes_nothing_away_from_it(gangs, hf_models, tmp_path):
    arguments = dict(directory=str(tmp_path), model=hf_models["llama"], source=TrainingLayout(tp=2))
    for error in gangs(2).run("tests.transport_jobs:fail_while_it_is_published", **arguments):
        assert "version 2 did not complete: rank 1 failed: OSError: rank 1 has had enough" in error and "rank 0 f" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["version_000001"]


def test_versions_of_an_earlier_run_are_not_taken_and_go(gangs, hf_models, tmp_path):
    model = hf_models["llama"]
    write = dict(directory=str(tmp_path), model=model, source=TrainingLayout(tp=2))
    gangs(2).run("tests.transport_jobs:write_to_disk", **write, versions=[3, 40], run="first")
    reader = DiskReader(tmp_path, ServerLayout(), read_architecture(model), 0, run="second", timeout_s=0.2)
    with pytest.raises(SyncError, match=r"version 3 .* did not appear .* the files there belong to run 'first', not 'second'"):
        reader.sync(3, None, shards_from(model, ServerLayout(), 0))
    gangs(2).run("tests.transport_jobs:write_to_disk", **write, versions=[3, 4], run="second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_000003", "version_000004"]
    reader.sync(3, None, shards_from(model, ServerLayout(), 0))
    assert reader.versions.complete == 3


def test_a_writer_that_would_keep_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is 0, but must be at least 1"):
        DiskWriter(tmp_path, TrainingLayout(), architecture(), None, keep=0)


@pytest.mark.parametrize("spoil", ["missing", "transposed", "of another type", "shard of another type"])
def test_a_reader_names_what_does_not_fit_before_it_writes_anything(gangs, hf_models, tmp_path, spoil):
    model = hf_models["qwen3"]
    arguments = dict(directory=str(tmp_path), model=model, source=TrainingLayout(), versions=[1, 2])
    gangs(1).run("tests.transport_jobs:write_to_disk", **arguments)
    reader = DiskReader(tmp_path, ServerLayout(), read_architecture(model), 0, timeout_s=1)
    shards = shards_from(model, ServerLayout(), 0)
    reader.sync(1, None, shards)
    file = next(version_directory(tmp_path, 2).glob("*.safetensors"))
    tensors, names = load_file(file), [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (1, 2)]
    index = json.loads((file.parent / "model.safetensors.index.json").read_text())
    for name in names:
        if spoil == "missing":
            del tensors[name], index["weight_map"][name]
        elif spoil == "transposed":
            tensors[name] = tensors[name].t().contiguous()
        elif spoil == "of another type":
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file)
    (file.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    messages = {
        "missing": r"o_proj\.weight is missing",
        "transposed": r"o_proj\.weight has shape \[64, 48\], not \[48, 64\]",
        "of another type": r"o_proj\.weight is torch\.float8_e4m3fn, which is quantised",
        "shard of another type": r"linear_proj\.weight is torch\.float8_e4m3fn, but must be a type that is not quantised",
    }
    if spoil == "shard of another type":
        for layer in (1, 2):
            name = f"decoder.layers.{layer}.self_attention.linear_proj.weight"
            shards[name] = shards[name].to(torch.float8_e4m3fn)
    before = {name: tensor.float() for name, tensor in shards.items()}
    message = messages[spoil]
    with pytest.raises(SyncError, match=rf"version 2 .* did not complete: .*layers\.1\..*{message}; .*layers\.2\..*{message}$"):
        reader.sync(2, None, shards)
    assert reader.versions.complete == 1
    assert all(torch.equal(shards[name].float(), before[name]) for name in shards)


def test_a_quantised_reader_of_other_blocks_or_of_plain_values_is_refused(gangs, hf_models, tmp_path):
    model = hf_models["qwen3"]
    arguments = dict(directory=str(tmp_path), model=model, source=TrainingLayout(), dtype=torch.bfloat16)
    gangs(1).run("tests.transport_jobs:write_to_disk", **arguments, versions=[1], fp8_block=16)
    gangs(1).run("tests.transport_jobs:write_to_disk", **arguments, versions=[2])
    for version, message in (
        (1, r"layers\.0\.self_attn\.q_proj\.weight_scale_inv has shape \[4, 3\], not \[8, 6\]; .*and 18 more"),
        (2, r"q_proj\.weight is torch\.bfloat16, which is not quantised; .*q_proj\.weight_scale_inv is missing"),
    ):
        with pytest.raises(SyncError, match=message):
            read(tmp_path, model, ServerLayout(), 0, version, fp8_block=8)


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
