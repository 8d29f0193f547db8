"""tools/convert_hf.py: conversion is bit-exact, Megatron reads what it writes, and it reads what a run wrote."""

from __future__ import annotations

import errno
import io
import json
import mmap
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from etr_megatron.convert import Ranks, to_hf, to_megatron, torch_dist_writer
from etr_megatron.convert.hf_files import copy_hf_files
from etr_megatron.errors import UserError
from etr_megatron.weights import (
    SafetensorsDir,
    TorchDistDir,
    read_architecture,
    stored_shapes,
    weights_of,
)
from tests.hf_models import FAMILIES, WITH_EXPERTS
from tools.convert_hf import main


def tensors_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(params=["read", "copied"])
def small(request, monkeypatch):
    """Tensors over 64 KiB are copied from file to file. These models have none that large, so the limit is patched."""
    monkeypatch.setattr(torch_dist_writer, "_SMALL", {"read": 2**30, "copied": 1024}[request.param])


def test_values_that_are_copied_keep_their_place_in_a_page(hf_models, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist_writer, "_SMALL", 1024)
    hf = hf_models["qwen3"]
    to_megatron(Path(hf), tmp_path / "megatron", Ranks())
    source, stored, arch = SafetensorsDir(hf), TorchDistDir(tmp_path / "megatron"), read_architecture(hf)
    places = set()
    for weight in weights_of(arch):
        if weight.split == "row":
            (box,) = stored.boxes(weight, arch)
            (_, found, _), (_, wanted, _) = box.span(), source.span(box.name, box.begin, box.size)
            assert found % mmap.PAGESIZE == wanted % mmap.PAGESIZE, weight.stored
            places.add(wanted % mmap.PAGESIZE)
    assert len(places) > 4


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", [*FAMILIES, "glm4_moe_lite"])
def test_there_and_back_every_bit_is_the_same(hf_models, tmp_path, family):
    hf = Path(hf_models[family])
    to_megatron(hf, tmp_path / "megatron", Ranks())
    to_hf(tmp_path / "megatron", tmp_path / "back", Ranks(), max_file_bytes=60_000)
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(hf))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((hf / name).read_text())
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("kernel", ["cannot", "between file systems", "half", "nothing"])
def test_copying_does_not_need_the_kernel(hf_models, tmp_path, monkeypatch, kernel):
    monkeypatch.setattr(torch_dist_writer, "_SMALL", 1024)
    copy = os.copy_file_range

    def between_file_systems(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    if kernel == "cannot":
        monkeypatch.delattr(os, "copy_file_range")
    elif kernel == "between file systems":
        monkeypatch.setattr(os, "copy_file_range", between_file_systems)
    else:
        least, share = (1, 2) if kernel == "half" else (0, 10**9)
        monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, *rest: copy(a, b, max(least, n // share), *rest))
    if kernel == "nothing":
        with pytest.raises(UserError, match=r"model\.safetensors ends at byte"):
            to_megatron(Path(hf_models["qwen3"]), tmp_path / "megatron", Ranks())
        return
    to_megatron(Path(hf_models["qwen3"]), tmp_path / "megatron", Ranks())
    to_hf(tmp_path / "megatron", tmp_path / "back", Ranks())
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(hf_models["qwen3"]))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_all_bytes_pass_and_how_fast(hf_models, tmp_path, monkeypatch, terminal):
    shown = io.StringIO()
    shown.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", shown)
    to_megatron(Path(hf_models["llama"]), tmp_path / "megatron", Ranks())
    last = shown.getvalue().rpartition("\r")[2]
    assert bool(re.match(r"converting: 100%\|.*\| (\d+k)/\1 \[.*B/s\]$", last)) == terminal == bool(last)


def test_transformers_loads_the_files_and_their_index(hf_models, tmp_path):
    to_megatron(Path(hf_models["qwen2"]), tmp_path / "megatron", Ranks())
    to_hf(tmp_path / "megatron", tmp_path / "back", Ranks(), max_file_bytes=100_000)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    for file in files:
        with safe_open(file, framework="pt") as handle:  # runs the format's own checks
            sizes = {name: handle.get_tensor(name).nbytes for name in handle.keys()}  # noqa: SIM118
        assert sum(sizes.values()) <= 100_000 or len(sizes) == 1
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    wanted = AutoModelForCausalLM.from_pretrained(hf_models["qwen2"])
    assert_same_bits(dict(model.named_parameters()), dict(wanted.named_parameters()))


@pytest.mark.parametrize("family", [*FAMILIES, "glm4_moe_lite"])
def test_names_and_shapes_are_those_that_megatron_writes(gangs, hf_models, tmp_path, family):
    gangs(1).run(
        "tests.convert_jobs:train_and_save", model=hf_models[family], out=str(tmp_path / "run"), overrides=["parallel.tp=1"]
    )
    written = TorchDistDir(tmp_path / "run" / "step_000003")
    assert written.shapes() == stored_shapes(read_architecture(hf_models[family]))
    to_megatron(Path(hf_models[family]), tmp_path / "megatron", Ranks())
    assert TorchDistDir(tmp_path / "megatron").shapes() == written.shapes()


LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.tp=1", "parallel.pp=2"]),
    "tp2pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "ep2": (2, ["parallel.tp=1", "parallel.ep=2"]),
    "pp2vpp2": (2, ["parallel.tp=1", "parallel.pp=2", "parallel.vpp=2"]),
    "pp2uneven": (2, ["parallel.tp=1", "parallel.pp=2", "parallel.first_stage_layers=1"]),
}


def overrides_of(family: str, layout: str) -> list[str]:
    sequence = ["parallel.sequence_parallel=true"] if family in WITH_EXPERTS and layout.startswith("tp2") else []
    return [*LAYOUTS[layout][1], *sequence]


EVERY_FAMILY_AND_LAYOUT_ONCE = [
    ("llama", "tp2"),
    ("qwen2", "pp2"),
    ("qwen3", "tp2pp2"),
    ("qwen3_tied", "pp2"),
    ("qwen3_moe", "ep2"),
    ("qwen3_moe_dense", "tp2pp2"),
    ("glm4_moe", "tp2pp2"),
    ("deepseek_v3", "tp2"),
    ("llama", "pp2vpp2"),
]
MORE = [
    ("qwen3_yarn", "tp2"),
    ("qwen3_moe_dense", "pp2uneven"),
    ("qwen3_moe", "tp2pp2"),
    ("glm4_moe", "ep2"),
    ("deepseek_v3", "ep2"),
    ("deepseek_v3", "tp2pp2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), EVERY_FAMILY_AND_LAYOUT_ONCE)
def test_megatron_loads_what_was_converted(gangs, hf_models, tmp_path, family, layout, monkeypatch):
    monkeypatch.setattr(torch_dist_writer, "_SMALL", 1024)
    (tmp_path / "model").symlink_to(hf_models[family])
    to_megatron(tmp_path / "model", tmp_path / "megatron", Ranks())
    job = {"model": str(tmp_path / "model"), "overrides": overrides_of(family, layout)}
    assert gangs(LAYOUTS[layout][0]).run("tests.convert_jobs:load_by_megatron", **job) == [[]] * LAYOUTS[layout][0]


@pytest.mark.parametrize(("family", "layout"), [*EVERY_FAMILY_AND_LAYOUT_ONCE, *MORE])
def test_a_policy_started_from_the_converted_directory_has_the_same_weights(gangs, hf_models, tmp_path, family, layout):
    to_megatron(Path(hf_models[family]), tmp_path / "megatron", Ranks())
    job = {"model": str(tmp_path / "megatron"), "overrides": overrides_of(family, layout)}
    for found in gangs(LAYOUTS[layout][0]).run("tests.policy_jobs:export", **job):
        assert_same_bits(found, tensors_of(hf_models[family]))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), [*EVERY_FAMILY_AND_LAYOUT_ONCE, *MORE])
def test_a_training_checkpoint_becomes_what_the_policy_exports(gangs, hf_models, tmp_path, family, layout):
    exported = gangs(LAYOUTS[layout][0]).run(
        "tests.convert_jobs:train_and_save",
        model=hf_models[family],
        out=str(tmp_path / "run" / "checkpoints"),
        overrides=overrides_of(family, layout),
    )[0]
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {hf_models[family]}}}")
    to_hf(tmp_path / "run", tmp_path / "back", Ranks())
    assert_same_bits(tensors_of(tmp_path / "back"), exported)
    before = tensors_of(hf_models[family])
    assert any(not torch.equal(exported[name], before[name]) for name in before)


def test_two_processes_write_what_one_writes(gangs, hf_models, tmp_path):
    for ranks, name in ((1, "one"), (2, "two")):
        gangs(ranks).run(
            "tests.convert_jobs:convert",
            hf=hf_models["qwen3"],
            megatron=str(tmp_path / name),
            back=str(tmp_path / f"{name}_back"),
        )
    assert {file.name for file in (tmp_path / "two").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    sizes = [file.stat().st_size for file in (tmp_path / "two").glob("*.distcp")]
    assert max(sizes) < 1.5 * min(sizes)
    files = sorted((tmp_path / "one_back").glob("*"))
    assert [file.name for file in files] == sorted(file.name for file in (tmp_path / "two_back").glob("*"))
    assert all(file.read_bytes() == (tmp_path / "two_back" / file.name).read_bytes() for file in files)
    assert_same_bits(tensors_of(tmp_path / "two_back"), tensors_of(hf_models["qwen3"]))


def test_an_error_of_one_process_reaches_all(gangs, hf_models, tmp_path):
    (tmp_path / "model").symlink_to(hf_models["qwen3"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    found = gangs(2).run("tests.convert_jobs:refused", out=str(tmp_path / "out"))
    assert len(set(found)) == 1 and found[0].startswith("UserError: --out") and "already exists" in found[0]


def test_a_full_disk_of_one_process_is_a_full_disk_for_all(gangs):
    assert gangs(2).run("tests.convert_jobs:full_on_rank_1") == [errno.ENOSPC, errno.ENOSPC]


def test_large_tensors_are_stored_in_chunks_of_rows(hf_models, tmp_path, monkeypatch):
    monkeypatch.setattr("etr_megatron.convert.hf_to_megatron.CHUNK_BYTES", 5000)  # 26 rows of 48 values
    to_megatron(Path(hf_models["qwen2"]), tmp_path / "megatron", Ranks())
    chunks = TorchDistDir(tmp_path / "megatron")._chunks["embedding.word_embeddings.weight"]
    assert [chunk.offset[0] for chunk in chunks] == list(range(0, 384, 26))
    to_hf(tmp_path / "megatron", tmp_path / "back", Ranks())
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(hf_models["qwen2"]))


@pytest.mark.parametrize("dense", [True, False])
def test_a_chunk_that_is_not_dense_in_the_file_is_read_as_well(hf_models, tmp_path, monkeypatch, dense):
    """Transposed tensors are read in another way, through torch.load."""
    from etr_megatron.convert import hf_to_megatron as module

    plain = module._read_rows

    def transposed(*args):
        tensor = plain(*args)
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.shape[-1] > 1 and tensor.dim() > 2 else tensor

    monkeypatch.setattr(module, "_read_rows", plain if dense else transposed)
    to_megatron(Path(hf_models["qwen3"]), tmp_path / "megatron", Ranks())
    loads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: loads.append(1) or load(*args, **options))
    to_hf(tmp_path / "megatron", tmp_path / "back", Ranks())
    assert bool(loads) != dense
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(hf_models["qwen3"]))


def test_dtype_is_converted_and_written_into_the_config(hf_models, tmp_path):
    wanted = {name: tensor.bfloat16() for name, tensor in tensors_of(hf_models["qwen3"]).items()}
    to_megatron(Path(hf_models["qwen3"]), tmp_path / "bf16", Ranks(), torch.bfloat16)
    assert {TorchDistDir(tmp_path / "bf16").dtype(name) for name in TorchDistDir(tmp_path / "bf16").shapes()} == {
        torch.bfloat16
    }
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    to_hf(tmp_path / "bf16", tmp_path / "same", Ranks())
    assert_same_bits(tensors_of(tmp_path / "same"), wanted)
    to_hf(tmp_path / "bf16", tmp_path / "fp32", Ranks(), dtype=torch.float32)
    assert_same_bits(tensors_of(tmp_path / "fp32"), {name: tensor.float() for name, tensor in wanted.items()})
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("said", "written"), [(["torch_dtype", "dtype"], ["dtype", "torch_dtype"]), (["torch_dtype"],) * 2, ([], ["torch_dtype"])]
)
def test_every_statement_of_the_type_in_the_config_is_the_new_one(tmp_path, said, written):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text(json.dumps(dict.fromkeys(said, "float32")))
    copy_hf_files(source, target, {torch.bfloat16})
    assert json.loads((target / "config.json").read_text()) == dict.fromkeys(written, "bfloat16")
    copy_hf_files(source, target, {torch.bfloat16, torch.float32})
    assert json.loads((target / "config.json").read_text()) == dict.fromkeys(said, "float32")


def test_verify_names_the_tensors_that_differ(hf_models, tmp_path, capsys):
    hf = tmp_path / "hf"
    hf.mkdir()
    tensors = tensors_of(hf_models["qwen3"])
    (hf / "config.json").write_text((Path(hf_models["qwen3"]) / "config.json").read_text())
    save_file(tensors, hf / "model.safetensors")
    assert main(["to-megatron", "--hf", str(hf), "--out", str(tmp_path / "megatron")]) == 0
    capsys.readouterr()
    assert main(["verify", "--hf", str(hf), "--megatron", str(tmp_path / "megatron"), "--no-logits"]) == 0
    assert capsys.readouterr().out == "47 tensors, 0 of them different\nthe same model\n"
    tensors["model.layers.2.self_attn.v_proj.weight"].view(torch.int32)[31, 47] ^= 1  # the last bit of one value
    save_file(tensors, hf / "model.safetensors")
    assert main(["verify", "--hf", str(hf), "--megatron", str(tmp_path / "megatron"), "--no-logits"]) == 1
    assert capsys.readouterr().out == (
        "47 tensors, 1 of them different\n  model.layers.2.self_attn.v_proj.weight\nNOT the same model\n"
    )


def test_a_converted_checkpoint_of_two_types_is_refused_without_a_type(hf_models, tmp_path):
    hf = tmp_path / "hf"
    hf.mkdir()
    tensors = tensors_of(hf_models["qwen3"])
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"].bfloat16()
    (hf / "config.json").write_text((Path(hf_models["qwen3"]) / "config.json").read_text())
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(Exception, match=r"layers\.1\.self_attn\.k_proj\.weight is torch\.bfloat16, .*--dtype"):
        to_megatron(hf, tmp_path / "out", Ranks())
    to_megatron(hf, tmp_path / "out", Ranks(), torch.float32)
    to_hf(tmp_path / "out", tmp_path / "back", Ranks())
    assert_same_bits(tensors_of(tmp_path / "back"), {name: tensor.float() for name, tensor in tensors.items()})


def test_boxes_of_a_file_are_those_of_the_tensor(hf_models):
    checkpoint = SafetensorsDir(hf_models["qwen3"])
    wanted = tensors_of(hf_models["qwen3"])
    name = "model.layers.3.self_attn.o_proj.weight"  # [48, 64]
    for rows, columns in [((0, 48), (0, 64)), ((5, 17), (0, 64)), ((0, 48), (63, 64)), ((7, 9), (8, 40)), ((3, 3), (0, 64))]:
        box = (slice(*rows), slice(*columns))
        found = checkpoint.read(name, (rows[0], columns[0]), (rows[1] - rows[0], columns[1] - columns[0]))
        assert torch.equal(found, wanted[name][box])
    assert torch.equal(checkpoint.read("model.norm.weight", (11,), (30,)), wanted["model.norm.weight"][11:41])
