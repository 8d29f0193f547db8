"""What tools/convert_hf.py refuses, with one sentence and exit code 2, and what it leaves behind when stopped."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from etr_megatron.convert import Ranks, output, to_hf, to_megatron, torch_dist_writer
from etr_megatron.errors import UserError
from etr_megatron.weights import SafetensorsDir
from tests import warm
from tests.nursery import ROOT
from tools.convert_hf import main


def refusal(capsys, *argv: str | Path) -> str:
    """The error sentence, which must be the only output."""
    assert main([str(part) for part in argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "the following arguments are required: command"),
        (["convert"], "invalid choice: 'convert'"),
        (["to-megatron", "--hf", "x"], "the following arguments are required: --out"),
        (["to-hf", "--megatron", "x", "--out", "y", "--dtype", "fp64"], "argument --dtype: invalid choice: 'fp64'"),
        (["to-hf", "--megatron", "x", "--out", "y", "--max-shard-gb", "0"], "--max-shard-gb 0.0: must be between 0.001 and"),
        (["to-hf", "--megatron", "x", "--out", "y"], "--megatron x is not a directory"),
        (["to-megatron", "--hf", "x", "--out", "y"], "x/config.json does not exist: --hf must be"),
        (["verify", "--hf", "x", "--megatron", "/"], "x/config.json does not exist: --hf must be"),
    ],
)
def test_a_wrong_command_is_refused(capsys, argv, sentence):
    assert sentence in refusal(capsys, *argv)


def test_an_output_that_exists_is_left_alone(capsys, hf, megatron):
    before = sorted(megatron.iterdir())
    assert "already exists" in refusal(capsys, "to-megatron", "--hf", hf, "--out", megatron)
    assert "already exists" in refusal(capsys, "to-hf", "--megatron", megatron, "--out", hf / "config.json")
    assert sorted(megatron.iterdir()) == before


def test_an_empty_output_directory_is_filled(hf, tmp_path):
    (tmp_path / "out").mkdir()
    to_megatron(hf, tmp_path / "out", Ranks())
    assert (tmp_path / "out" / ".metadata").is_file()


def test_two_conversions_into_one_directory_do_not_mix(capsys, hf, tmp_path):
    with output.output_directory(tmp_path / "out", 0, Ranks()) as partial:
        (partial / "half").touch()
        assert "another conversion is writing" in refusal(capsys, "to-megatron", "--hf", hf, "--out", tmp_path / "out")
        assert (partial / "half").exists()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["half"]


def test_a_config_that_does_not_fit_is_refused_before_anything_is_written(capsys, hf, megatron, tmp_path):
    for folder in (hf, megatron):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    out = tmp_path / "out"
    assert "gate_proj.weight has shape [80, 48] where config.json says [96, 48]" in refusal(
        capsys, "to-megatron", "--hf", hf, "--out", out
    )
    stored = "decoder.layers.mlp.linear_fc1.weight (mlp.gate_proj.weight over mlp.up_proj.weight, of 4 layers)"
    assert f"{stored} has shape [4, 160, 48] where config.json says [4, 192, 48]" in refusal(
        capsys, "to-hf", "--megatron", megatron, "--out", out
    )
    assert not list(tmp_path.glob("out*"))


def test_a_tensor_of_one_layers_experts_is_not_said_to_be_of_several_layers(capsys, hf_models, tmp_path):
    """Layers that differ are stored one by one."""
    to_megatron(Path(hf_models["qwen3_moe_dense"]), tmp_path / "megatron", Ranks())
    file = tmp_path / "megatron" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"moe_intermediate_size": 2 * config["moe_intermediate_size"]}))
    message = refusal(capsys, "to-hf", "--megatron", tmp_path / "megatron", "--out", tmp_path / "out")
    assert "linear_fc1.weight (mlp.experts.0.gate_proj.weight over mlp.experts.0.up_proj.weight) has shape" in message


def test_tensors_that_are_missing_or_unknown_are_named(capsys, hf, megatron, tmp_path, hf_models):
    config = json.loads((megatron / "config.json").read_text())
    (megatron / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    message = refusal(capsys, "to-hf", "--megatron", megatron, "--out", tmp_path / "out")
    assert "1 tensor is unknown to the qwen3 family with 4 layers (output_layer.weight)" in message
    to_megatron(Path(hf_models["qwen3_tied"]), tmp_path / "tied", Ranks())
    message = refusal(capsys, "to-hf", "--megatron", tmp_path / "tied", "--config-from", hf, "--out", tmp_path / "out")
    assert "1 tensor is missing (output_layer.weight)" in message


def test_a_tied_head_may_be_stored_twice_but_not_with_values_of_its_own(capsys, hf_models, tmp_path):
    hf = Path(shutil.copytree(hf_models["qwen3_tied"], tmp_path / "hf"))
    file = hf / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, file)
    to_megatron(hf, tmp_path / "twice", Ranks())
    out = tmp_path / "out"
    for changed in (head + 1e-3 * (torch.arange(len(head)) == len(head) - 1)[:, None], head[:-1].clone()):
        save_file(tensors | {"lm_head.weight": changed}, file)
        for argv in (("to-megatron", "--hf", hf, "--out", out), ("verify", "--hf", hf, "--megatron", tmp_path / "twice")):
            message = refusal(capsys, *argv)
            if changed.shape == head.shape:
                assert "lm_head.weight holds other values than model.embed_tokens.weight; set tie_word_embeddings" in message
            else:
                assert f"lm_head.weight has shape {list(changed.shape)} where config.json says {list(head.shape)}" in message
    assert not list(tmp_path.glob("out*"))


def test_files_that_are_cut_off_or_damaged_are_named(capsys, hf, megatron, tmp_path):
    out = tmp_path / "out"
    with open(hf / "model.safetensors", "rb+") as file:
        file.truncate(200_000)
    assert "model.safetensors is not a complete safetensors file" in refusal(capsys, "to-megatron", "--hf", hf, "--out", out)
    content = (megatron / "__0_0.distcp").read_bytes()
    (megatron / "__0_0.distcp").write_bytes(content[:-1000])
    assert "__0_0.distcp is missing or cut off" in refusal(capsys, "to-hf", "--megatron", megatron, "--out", out)
    (megatron / "__0_0.distcp").write_bytes(content[:300_000] + bytes(100_000) + content[400_000:])
    assert "__0_0.distcp is damaged at byte" in refusal(capsys, "to-hf", "--megatron", megatron, "--out", out)
    metadata = (megatron / ".metadata").read_bytes()
    (megatron / ".metadata").write_bytes(metadata[:500])
    assert ".metadata cannot be read" in refusal(capsys, "to-hf", "--megatron", megatron, "--out", out)
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(hf):
    checkpoint = SafetensorsDir(hf)
    os.truncate(hf / "model.safetensors", 300_000)
    with pytest.raises(UserError, match=r"model\.safetensors ends at byte 300000"):
        for name, shape in checkpoint.shapes().items():
            checkpoint.read(name, (0,) * len(shape), shape)


def test_a_directory_without_a_config_asks_for_one(capsys, megatron, tmp_path, hf):
    (tmp_path / "empty").mkdir()
    message = refusal(capsys, "to-hf", "--megatron", tmp_path / "empty", "--out", tmp_path / "x")
    assert "neither a torch_dist checkpoint" in message
    (megatron / "config.json").unlink()
    assert "--config-from" in refusal(capsys, "to-hf", "--megatron", megatron, "--out", tmp_path / "out")
    assert main(["to-hf", "--megatron", str(megatron), "--config-from", str(hf), "--out", str(tmp_path / "out")]) == 0


def test_a_disk_that_is_too_small_is_refused_first(capsys, hf, tmp_path, monkeypatch):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7))
    message = refusal(capsys, "to-megatron", "--hf", hf, "--out", tmp_path / "out")
    assert "needs 0.02 GB, but its disk has 0.01 GB free" in message
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("left", [0, 5, 20])
@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
@pytest.mark.parametrize("by", ["copying", "writing"])
def test_a_disk_that_fills_up_leaves_nothing_behind(capsys, hf, megatron, tmp_path, monkeypatch, direction, left, by):
    room = [left]

    def limited(write):
        def write_if_there_is_room(*args):
            room[0] -= 1
            if room[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*args)

        return write_if_there_is_room

    argv = ["to-hf", "--megatron", megatron] if direction == "to-hf" else ["to-megatron", "--hf", hf]
    if by == "writing":  # values that are cast are written, others are copied
        argv += ["--dtype", "bf16"]
        monkeypatch.setattr(os, "pwrite", limited(os.pwrite))
        monkeypatch.setattr(torch_dist_writer._Stream, "write", limited(torch_dist_writer._Stream.write))
    else:
        monkeypatch.setattr(torch_dist_writer, "_SMALL", 1024)
        monkeypatch.setattr(os, "copy_file_range", limited(os.copy_file_range))
    assert "no space left on the device" in refusal(capsys, *argv, "--out", tmp_path / "out")
    assert room[0] < 0 and not list(tmp_path.glob("out*"))


def test_a_reader_that_leaves_ends_verify_without_a_word(hf, megatron):
    command = '"$@" | true; exit ${PIPESTATUS[0]}'
    argv = [
        "bash",
        sys.executable,
        "tools/convert_hf.py",
        "verify",
        "--no-logits",
        "--hf",
        str(hf),
        "--megatron",
        str(megatron),
    ]
    found = subprocess.run(["bash", "-c", command, *argv], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert found.returncode == 128 + signal.SIGPIPE and "rror" not in found.stderr


def run_ranks(tmp_path: Path, hook: str, *argv: str | Path, rank: int = 1, before: str = "") -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each of two ranks of the tool, started as torchrun would but without it.

    hook: Python that `rank` runs before the tool. before: Python that both ranks run before that.
    """
    program = f"{before}import os, sys\nfrom tools import convert_hf\nif os.environ['RANK'] == '{rank}':\n    {hook}"
    program += "\nconvert_hf.run_and_exit(convert_hf.main)"
    # With a store as torchrun has it: a port that was only found free may be taken when rank 0 opens it, and rank 1 would wait.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    address |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    command = [sys.executable, "-c", program, *map(str, argv)]
    ranks = []
    for rank in ("0", "1"):
        env = {**os.environ, **address, "RANK": rank, "OMP_NUM_THREADS": "1"}
        env["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / "elastic" / "attempt_0" / rank / "error.json")
        Path(env["TORCHELASTIC_ERROR_FILE"]).parent.mkdir(parents=True)
        ranks.append(warm.start(command, env))
    printed = [ranks[0].communicate(timeout=600)]
    ranks[1].send_signal(signal.SIGCONT)  # if it has stopped itself
    printed.append(ranks[1].communicate(timeout=600))
    return [(rank.returncode, *both) for rank, both in zip(ranks, printed, strict=True)]


def test_ranks_end_with_2_after_a_mistake_and_one_sentence(hf, megatron, tmp_path):
    found = run_ranks(tmp_path, "pass", "to-megatron", "--hf", hf, "--out", megatron)
    assert [code for code, _, _ in found] == [2, 2]
    printed = "".join(err for _, _, err in found)
    assert printed.startswith("error: --out ") and printed.count("\n") == 1 and "already exists" in printed


@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_a_disk_that_is_full_for_one_of_two_ranks_is_one_sentence(hf, megatron, tmp_path, direction):
    source = ["--hf", hf] if direction == "to-megatron" else ["--megatron", megatron]
    hook = "def full(*_): raise OSError(28, 'No space left on device')\n"
    hook += "    from etr_megatron.convert import copying, torch_dist_writer as w\n"
    hook += "    copying.start_writeback = w.start_writeback = full"
    found = run_ranks(tmp_path, hook, direction, *source, "--out", tmp_path / "out")
    printed = "".join(err for _, _, err in found)
    assert [code for code, _, _ in found] == [2, 2], printed
    assert printed.count("error: ") == 1 and "out: no space left on the device" in printed and "Traceback" not in printed
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("direction", ["to-megatron", pytest.param("to-hf", marks=pytest.mark.slow)])
def test_ranks_that_do_not_see_the_same_output_are_refused_before_they_write(hf, megatron, tmp_path, direction):
    source = ["--hf", hf] if direction == "to-megatron" else ["--megatron", megatron]
    (tmp_path / "0" / "elsewhere").mkdir(parents=True)
    both = f"import os, sys\nsys.path.insert(0, os.getcwd())\nos.chdir({str(tmp_path / '0')!r})\n"
    both += "from etr_megatron.convert import output\noutput.SEEN_S = 0.3\n"
    found = run_ranks(tmp_path, "os.chdir('elsewhere')", direction, *source, "--out", "out", before=both)
    printed = "".join(err for _, _, err in found)
    assert [code for code, _, _ in found] == [2, 2], printed
    assert printed.count("error: ") == 1 and "--out out is not the same directory for rank 1 as for rank 0" in printed
    assert [path.name for path in (tmp_path / "0").rglob("*")] == ["elsewhere"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "module", "function"), [(1, "hf_to_megatron", "_prepare"), (0, "torch_dist_writer", "_write_common")]
)
def test_what_fails_on_one_rank_alone_is_heard_by_the_other(hf, tmp_path, rank, module, function):
    hook = "def fail(*_): raise OSError(5, 'Input/output error')\n"
    hook += (
        f"    import etr_megatron.convert.torch_dist_writer\n    sys.modules['etr_megatron.convert.{module}'].{function} = fail"
    )
    found = run_ranks(tmp_path, hook, "to-megatron", "--hf", hf, "--out", tmp_path / "out", rank=rank)
    assert [code for code, _, _ in found] == [1, 1]
    assert f"rank {rank} failed: [Errno 5] Input/output error" in found[1 - rank][2]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_rank_that_only_stops_is_named_by_the_other(hf, tmp_path):
    hook = "from etr_megatron.convert import hf_to_megatron\n"
    hook += "    hf_to_megatron._prepare = lambda *_: os.kill(os.getpid(), 19)"
    both = "import os\nfrom etr_megatron.convert import watch\nwatch.BEAT_S = 0.5\n"
    both += "watch.SILENCE_S = 4.0 if os.environ['RANK'] == '0' else 300.0\n"  # only rank 1 is at fault
    found = run_ranks(tmp_path, hook, "to-megatron", "--hf", hf, "--out", tmp_path / "out", before=both)
    assert found[0][0] == 2 and found[0][2] == "error: rank 1 has given no sign of life for 4 s\n"
    assert found[1][0] != 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_conversion_that_is_stopped_says_so_and_what_is_left(hf, tmp_path, number):
    program = (
        "import runpy, sys, time\nfrom etr_megatron.convert import copying, torch_dist_writer\n"
        "def wait(*_):\n    print('writing', flush=True)\n    time.sleep(600)\n"
        "torch_dist_writer.start_writeback = copying.start_writeback = wait\n"
        "runpy.run_path('tools/convert_hf.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, "to-megatron", "--hf", str(hf), "--out", str(tmp_path / "out")]
    with warm.start(command, {**os.environ}) as tool:
        assert tool.stdout.readline() == "writing\n"
        tool.send_signal(number)
        _, err = tool.communicate(timeout=300)
    assert tool.returncode == 128 + number
    unfinished = tmp_path / "out.unfinished"
    assert err == f"error: stopped by {number.name}; {unfinished} is incomplete, the same command replaces it\n"
    assert unfinished.is_dir() and not (tmp_path / "out").exists()


def test_a_directory_that_is_renamed_before_it_is_locked_is_not_touched(capsys, hf, tmp_path, monkeypatch):
    """Another conversion finishes after ours finds its directory and before ours locks it."""
    partial, out = tmp_path / "out.unfinished", tmp_path / "out"
    partial.mkdir()
    (partial / "weights").write_text("of the other one")
    lock = fcntl.flock

    def finish_first(*args):
        if partial.exists() and not out.exists():
            partial.rename(out)
        return lock(*args)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    assert "already exists" in refusal(capsys, "to-megatron", "--hf", hf, "--out", out)
    assert [path.name for path in out.iterdir()] == ["weights"] and not partial.exists()


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_kill_9_in_the_middle_leaves_no_output_and_the_same_command_finishes(hf, megatron, tmp_path, direction):
    source = ["--hf", hf] if direction == "to-megatron" else ["--megatron", megatron]
    argv = [direction, *map(str, source), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "tests.convert_jobs", "20", *argv]
    killed = warm.start(command, {**os.environ})
    killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and any((tmp_path / "out.unfinished").iterdir())
    assert main(argv) == 0
    assert not (tmp_path / "out.unfinished").exists()
    if direction == "to-megatron":
        to_hf(tmp_path / "out", tmp_path / "back", Ranks())
    back = tmp_path / ("back" if direction == "to-megatron" else "out")
    assert main(["verify", "--no-logits", "--hf", str(back), "--megatron", str(megatron)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "moments"),
    [
        ("to-megatron", ["metadata", "common", "copies", "config", "rename"]),
        ("to-hf", ["values", "copies", "config", "rename"]),
    ],
)
def test_kill_9_before_the_last_step_leaves_nothing_that_passes_for_whole(capsys, hf, megatron, tmp_path, direction, moments):
    source = ["--hf", str(hf)] if direction == "to-megatron" else ["--megatron", str(megatron)]
    command = [sys.executable, "-m", "tests.convert_jobs", "killed-at", ",".join(moments), direction, *source]
    printed, told = warm.start([*command, "--out", str(tmp_path / "out")], {**os.environ}).communicate(timeout=600)
    assert printed == f"{[-signal.SIGKILL] * len(moments)}\n", told
    reader = ["to-hf", "--megatron"] if direction == "to-megatron" else ["to-megatron", "--hf"]
    for moment in moments:
        out, left = tmp_path / f"out_{moment}", tmp_path / f"out_{moment}.unfinished"
        assert not out.exists() and any(left.iterdir())
        if moment != "rename":  # at the rename it is complete
            why = "no .metadata" if moment == "metadata" else "config.json"
            assert why in refusal(capsys, *reader, left, "--out", tmp_path / "read")
        assert main([direction, *source, "--out", str(out)]) == 0 and not left.exists()
        pair = [hf, out] if direction == "to-megatron" else [out, megatron]
        assert main(["verify", "--no-logits", "--hf", str(pair[0]), "--megatron", str(pair[1])]) == 0
        capsys.readouterr()
    assert not list(tmp_path.glob("read*"))


@pytest.mark.slow
def test_the_command_line_under_torchrun_and_alone(hf, tmp_path):
    """As users run it, from another directory: convert with two processes, verify the logits with one."""
    tool, env = str(ROOT / "tools" / "convert_hf.py"), {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tool)
    assert run(*torchrun, "to-megatron", "--hf", "hf", "--out", "two").startswith("two: 0.000 GB of tensors in ")
    assert len(list((tmp_path / "two").glob("*.distcp"))) == 2
    lines = run(tool, "verify", "--hf", "hf", "--megatron", "two").splitlines()
    assert lines[0] == "47 tensors, 0 of them different" and lines[-1] == "the same model"
    assert float(lines[1].split()[3].rstrip(",")) < 1e-5
