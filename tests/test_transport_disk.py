"""Weights through a directory: complete or absent, and loadable by other tools."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore

from etr_megatron.weights import TrainingLayout, read_architecture
from etr_megatron.weights.quantize import quantize_blocks
from etr_megatron.weights.transport import DiskWriter, SyncError, Wire, version_directory
from tests.transport_jobs import shards_from


def files_of(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def check(folder, model: str) -> None:
    """The directory holds the model's tensors and nothing else."""
    wanted, tensors = load_file(f"{model}/model.safetensors"), files_of(folder)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("family", "source"),
    [
        ("qwen3_tied", TrainingLayout(tp=2)),
        ("qwen3_tied", TrainingLayout(pp=2)),
        ("qwen3_tied", TrainingLayout(dp=2)),
        ("qwen3_moe", TrainingLayout(dp=2, ep=2)),
        ("qwen3_moe_dense", TrainingLayout(tp=2, ep=2, etp=1)),
        ("glm4_moe", TrainingLayout(tp=2, ep=2, etp=1)),
    ],
)
def test_what_ranks_write_is_the_checkpoint(gangs, hf_models, tmp_path, family, source):
    model = hf_models[family]
    found = gangs(2).run(
        "tests.transport_jobs:write_to_disk",
        directory=str(tmp_path),
        model=model,
        source=source,
        versions=[3],
        file_bytes=60_000,
    )
    assert found == [3, 3]
    folder = version_directory(tmp_path, 3)
    check(folder, model)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == files_of(folder).keys()
    tensors = load_file(f"{model}/model.safetensors").values()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert len(set(index["weight_map"].values())) > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_000003"]


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


def test_fp8_on_disk_has_published_names(gangs, hf_models, tmp_path):
    model, block = hf_models["qwen3"], 8
    arguments = dict(directory=str(tmp_path), model=model, source=TrainingLayout(tp=2), versions=[1], fp8_block=block)
    gangs(2).run("tests.transport_jobs:write_to_disk", **arguments, dtype=torch.bfloat16)
    tensors = files_of(version_directory(tmp_path, 1))
    wanted = load_file(f"{model}/model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    values, scales = quantize_blocks(wanted[name].bfloat16(), block)
    assert torch.equal(tensors[name].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(tensors[name + "_scale_inv"], scales)
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


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


def one_writer(directory, model: str) -> DiskWriter:
    wire = Wire(HashStore(), 0, 1, timeout_s=5)
    return DiskWriter(directory, TrainingLayout(), read_architecture(model), wire, dtype=torch.float32)


def test_the_versions_published_last_stay_when_a_run_goes_back(hf_models, tmp_path):
    model = hf_models["llama"]
    writer, shards = one_writer(tmp_path, model), shards_from(model, TrainingLayout(), 0)
    for version, kept in ((7, [7]), (8, [7, 8]), (3, [3, 8]), (4, [3, 4])):
        writer.sync(version, shards)
        assert sorted(path.name for path in tmp_path.iterdir()) == [version_directory("", v).name for v in kept]


def test_a_version_that_was_put_aside_when_the_writer_was_killed_comes_back(hf_models, tmp_path):
    model = hf_models["llama"]
    shards = shards_from(model, TrainingLayout(), 0)
    one_writer(tmp_path, model).sync(8, shards)
    version_directory(tmp_path, 8).rename(tmp_path / ".version_000008.replaced")
    (tmp_path / ".version_000008.unfinished").mkdir()
    one_writer(tmp_path, model).sync(9, shards)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_000008", "version_000009"]
    check(version_directory(tmp_path, 8), model)


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
    check(version_directory(tmp_path, 8), model)


def test_a_rank_that_fails_while_rank_0_publishes_takes_nothing_away_from_it(gangs, hf_models, tmp_path):
    arguments = dict(directory=str(tmp_path), model=hf_models["llama"], source=TrainingLayout(tp=2))
    for error in gangs(2).run("tests.transport_jobs:fail_while_it_is_published", **arguments):
        assert "version 2 did not complete: rank 1 failed: OSError: rank 1 has had enough" in error and "rank 0 f" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["version_000001"]


def test_versions_of_an_earlier_run_go(gangs, hf_models, tmp_path):
    model = hf_models["llama"]
    write = dict(directory=str(tmp_path), model=model, source=TrainingLayout(tp=2))
    gangs(2).run("tests.transport_jobs:write_to_disk", **write, versions=[3, 40], run="first")
    gangs(2).run("tests.transport_jobs:write_to_disk", **write, versions=[3, 4], run="second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_000003", "version_000004"]
