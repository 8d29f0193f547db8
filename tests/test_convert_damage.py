"""Damaged checkpoints, integer weights and failing disks give a one-sentence error that names the file."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from etr_megatron.convert import Ranks, to_hf, torch_dist_writer
from etr_megatron.errors import UserError
from etr_megatron.weights import TorchDistDir, check_checkpoint
from tests.test_convert_failures import refusal

GATE = "model.layers.0.mlp.gate_proj.weight"


def change_header(file: Path, change) -> None:
    """Rewrite the header of a safetensors file; `change` gets it as a dict and modifies it in place."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


@pytest.mark.parametrize(
    "field", [{"shape": [80.0, 48]}, {"shape": ["80", 48]}, {"data_offsets": [0.0, 80 * 48 * 4.0]}], ids=["shape", "text", "at"]
)
def test_a_header_with_other_than_whole_numbers_is_broken(capsys, hf, tmp_path, field):
    change_header(hf / "model.safetensors", lambda header: header[GATE].update(field))
    said = refusal(capsys, "to-megatron", "--hf", hf, "--out", tmp_path / "out")
    assert f"model.safetensors is not a complete safetensors file ({GATE} has a shape or an offset" in said


def test_json_that_is_nested_without_an_end_is_broken(capsys, hf, tmp_path):
    deep = b"[" * 100_000
    config = (hf / "config.json").read_bytes()
    (hf / "config.json").write_bytes(deep)
    assert "config.json cannot be read as JSON" in refusal(capsys, "to-megatron", "--hf", hf, "--out", tmp_path / "out")
    (hf / "config.json").write_bytes(config)
    (hf / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    assert "is not a complete safetensors file" in refusal(capsys, "to-megatron", "--hf", hf, "--out", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_integers_are_no_weights_in_either_format(capsys, hf, megatron, tmp_path, monkeypatch, dtype):
    """A quantised checkpoint whose config.json has lost its quantization_config would be converted to garbage."""
    tensors = load_file(hf / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, hf / "model.safetensors", {"format": "pt"})
    said = refusal(capsys, "to-megatron", "--hf", hf, "--out", tmp_path / "out")
    assert f"{hf}: weights must be floating-point numbers, unlike model.embed_tokens.weight of {dtype}" in said
    with pytest.raises(UserError, match="must be floating-point numbers"):
        check_checkpoint(hf)  # what a job checks
    monkeypatch.setattr(TorchDistDir, "dtype", lambda *_: dtype)
    said = refusal(capsys, "to-hf", "--megatron", megatron, "--out", tmp_path / "out")
    assert f"{megatron}: weights must be floating-point numbers" in said and "and 8 more" in said
    assert not list(tmp_path.glob("out*"))


def test_what_a_clone_without_git_lfs_holds_is_told_apart_from_a_broken_file(capsys, hf, tmp_path):
    (hf / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 900\n")
    said = refusal(capsys, "to-megatron", "--hf", hf, "--out", tmp_path / "out")
    assert "model.safetensors is not a complete safetensors file (it is a Git LFS pointer: git lfs pull fetches" in said


def test_weights_in_torchs_own_format_are_named(capsys, hf, tmp_path):
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    said = refusal(capsys, "to-megatron", "--hf", hf, "--out", tmp_path / "out")
    assert said.startswith(f"error: {hf} holds pytorch_model.bin but no .safetensors file, the only supported format;")


def spoil_metadata(megatron: Path, spoil) -> None:
    with open(megatron / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    spoil(metadata)
    with open(megatron / ".metadata", "wb") as file:
        pickle.dump(metadata, file)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda metadata: [place.__dict__.pop("length") for place in metadata.storage_data.values()],
        lambda metadata: metadata.__dict__.pop("state_dict_metadata"),
        lambda metadata: [entry.__dict__.pop("properties", None) for entry in metadata.state_dict_metadata.values()],
        lambda metadata: [entry.__dict__.update(chunks=None) for entry in metadata.state_dict_metadata.values()],
    ],
    ids=["lengths", "tensors", "types", "chunks"],
)
def test_metadata_without_some_of_its_parts_is_damaged(capsys, megatron, tmp_path, spoil):
    spoil_metadata(megatron, spoil)
    said = refusal(capsys, "to-hf", "--megatron", megatron, "--out", tmp_path / "out")
    assert f"{megatron / '.metadata'} is damaged (" in said


def test_what_torch_says_of_a_damaged_tensor_is_cut_to_its_first_line(capsys, megatron, tmp_path):
    """For a pickle of another kind, torch's message is a page of advice."""
    file = megatron / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"storage", b"stor\nge"))
    assert "is damaged at byte" in refusal(capsys, "to-hf", "--megatron", megatron, "--out", tmp_path / "out")


def test_a_disk_that_fails_while_it_is_read_is_named(capsys, hf, megatron, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    out = tmp_path / "out"
    monkeypatch.setattr(os, "preadv", fail)
    said = refusal(capsys, "to-megatron", "--hf", hf, "--out", out, "--dtype", "bf16")
    assert f"{hf / 'model.safetensors'} cannot be read at byte" in said and said.endswith("(Input/output error)\n")
    said = refusal(capsys, "to-hf", "--megatron", megatron, "--out", out, "--dtype", "bf16")
    assert f"{megatron / '__0_0.distcp'} cannot be read at byte" in said
    monkeypatch.undo()
    monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr(torch_dist_writer, "_SMALL", 1)
    for argv in (("to-megatron", "--hf", hf), ("to-hf", "--megatron", megatron)):
        said = refusal(capsys, *argv, "--out", out)
        assert "cannot be copied to" in said and said.endswith("(Input/output error)\n")
    assert not list(tmp_path.glob("out*"))


def test_a_link_in_what_a_killed_conversion_left_is_removed_and_what_it_leads_to_kept(hf, megatron, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / ".conversion").touch()
    (tmp_path / "out.unfinished" / "link").symlink_to(tmp_path / "mine")
    to_hf(megatron, tmp_path / "out", Ranks())
    assert not (tmp_path / "out" / "link").exists() and (tmp_path / "mine" / "kept").exists()
    assert not (tmp_path / "out" / ".conversion").exists()


def test_a_directory_that_only_has_the_name_of_an_unfinished_one_is_kept(capsys, hf, tmp_path):
    partial = tmp_path / "out.unfinished"
    partial.mkdir()
    (partial / "thesis").write_text("years of work")
    said = refusal(capsys, "to-megatron", "--hf", hf, "--out", tmp_path / "out")
    wanted = f"{partial} exists and was not left by a conversion; remove it or choose another --out"
    assert said == f"error: --out {tmp_path}/out: {wanted}\n"
    assert (partial / "thesis").read_text() == "years of work" and not (tmp_path / "out").exists()
