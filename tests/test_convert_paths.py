"""Paths that a conversion may not enter, read, create or lock give a one-sentence error, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from etr_megatron.convert import Ranks, hf_files, to_megatron
from etr_megatron.weights import safetensors_dir, torch_dist_metadata
from tests.nursery import ROOT
from tests.test_convert_failures import refusal
from tools.convert_hf import main


@pytest.fixture(scope="module")
def megatron(hf_models, tmp_path_factory):
    out = tmp_path_factory.mktemp("paths") / "megatron"
    to_megatron(Path(hf_models["qwen3"]), out, Ranks())
    return out


def denied(path) -> OSError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_an_output_below_what_holds_no_directories_is_refused_at_once(capsys, hf_models):
    """The system reports that the directory does not exist, as it does if another process has just removed ours."""
    said = refusal(capsys, "to-megatron", "--hf", hf_models["qwen3"], "--out", "/proc/x/y")
    assert said == "error: --out /proc/x/y: /proc/x/y.unfinished cannot be created (No such file or directory)\n"


def test_an_output_with_a_name_that_is_too_long_is_refused(capsys, hf_models, tmp_path):
    said = refusal(capsys, "to-megatron", "--hf", hf_models["qwen3"], "--out", tmp_path / ("a" * 300))
    assert said.startswith(f"error: {tmp_path}/aaa"[:60]) and said.endswith("...: File name too long\n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_unfinished_directory_is_named(capsys, hf_models, tmp_path):
    (tmp_path / "out.unfinished").write_text("mine")
    said = refusal(capsys, "to-megatron", "--hf", hf_models["qwen3"], "--out", tmp_path / "out")
    assert said == f"error: --out {tmp_path}/out: {tmp_path}/out.unfinished cannot be created (File exists)\n"
    assert (tmp_path / "out.unfinished").read_text() == "mine"


@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_an_output_in_a_directory_that_may_not_be_entered_is_refused(
    capsys, hf_models, megatron, tmp_path, monkeypatch, direction
):
    source = {"to-megatron": ("--hf", hf_models["qwen3"]), "to-hf": ("--megatron", megatron)}[direction]
    out, exists = tmp_path / "theirs" / "out", Path.exists

    def refuse(path, **options):
        if path == out:
            raise denied(path)
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", refuse)
    assert refusal(capsys, direction, *source, "--out", out) == f"error: {out}: Permission denied\n"


def test_a_file_that_may_not_be_read_is_said_to_be_that_and_not_to_be_broken(
    capsys, hf_models, megatron, tmp_path, monkeypatch
):
    hf = hf_models["qwen3"]

    def refuse(path, *_):
        raise denied(path)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_dir, "_read_header", refuse)
        said = refusal(capsys, "to-megatron", "--hf", hf, "--out", tmp_path / "out")
        assert said == f"error: {hf}/model.safetensors cannot be read (Permission denied)\n"
    with monkeypatch.context() as patch:
        patch.setattr(torch_dist_metadata, "open", refuse, raising=False)
        said = refusal(capsys, "to-hf", "--megatron", megatron, "--out", tmp_path / "out")
        assert said == f"error: {megatron}/.metadata cannot be read (Permission denied)\n"
    with monkeypatch.context() as patch:
        patch.setattr(hf_files.shutil, "copyfile", refuse)
        said = refusal(capsys, "to-megatron", "--hf", hf, "--out", tmp_path / "out")
        assert said == f"error: {hf}/generation_config.json: Permission denied\n"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_become_as_large_is_one_sentence(hf_models, tmp_path):
    out = tmp_path / "out"
    command = 'ulimit -f 20; exec "$@"'
    # -B: .pyc files would be truncated at the limit and break later imports.
    argv = [
        "bash",
        sys.executable,
        "-B",
        "tools/convert_hf.py",
        "to-megatron",
        "--hf",
        hf_models["qwen3"],
        "--out",
        str(out),
        "--dtype",
        "bf16",
    ]
    found = subprocess.run(["bash", "-c", command, *argv], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert found.returncode == 2 and not list(tmp_path.glob("out*"))
    said = "a file would exceed the largest size allowed here (ulimit -f, or the file system)"
    assert found.stderr.endswith(f"error: {out}: {said}; make room or choose another --out\n")


def test_a_file_system_without_locks_is_only_warned_of(hf_models, tmp_path, monkeypatch, caplog):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("WARNING"):
        assert main(["to-megatron", "--hf", hf_models["qwen3"], "--out", str(tmp_path / "out")]) == 0
    assert f"{tmp_path}/out.unfinished: its file system has no locks" in caplog.text


@pytest.mark.parametrize(
    ("command", "sentences"),
    [
        (
            ("to-megatron", "--hf", "HERE/none", "--out", "HERE/full"),
            ["HERE/none/config.json does not exist: --hf must be", "--out HERE/full already exists"],
        ),
        (
            ("to-hf", "--megatron", "HERE/none", "--out", "HERE/full"),
            ["--megatron HERE/none is not a directory", "--out HERE/full already exists"],
        ),
        (
            ("verify", "--hf", "HERE/full", "--megatron", "HERE/none"),
            ["HERE/full/config.json does not exist", "--megatron HERE/none is not a directory"],
        ),
    ],
)
def test_directories_that_are_mistaken_are_told_together(capsys, tmp_path, command, sentences):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main([part.replace("HERE", str(tmp_path)) for part in command]) == 2
    said = capsys.readouterr().err.removeprefix("error: ").splitlines()
    wanted = [sentence.replace("HERE", str(tmp_path)) for sentence in sentences]
    assert [line[: len(one)] for line, one in zip(said, wanted, strict=True)] == wanted
