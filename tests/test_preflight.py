"""Problems of a job's machines are reported in one table, node by node."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from etr_megatron.config import load_config, resolve
from etr_megatron.planner.parameters import total_parameters
from etr_megatron.preflight import network
from etr_megatron.preflight.__main__ import PAIR_TIMEOUT_S, TIMEOUT_S, _checkpoint_bytes
from etr_megatron.preflight.facts import NodeFacts, _memory_needed, collect
from etr_megatron.preflight.findings import findings, gib, table
from etr_megatron.preflight.network import _pairs, rounds
from etr_megatron.weights import read_architecture
from tests import warm
from tests.gang import Gang

REPO = Path(__file__).resolve().parents[1]
NODE = NodeFacts(
    number=0,
    host="a",
    clock=100.0,
    versions={"python": "3.11.9", "torch": "2.13.0", "transformer-engine": "-"},
    devices=("H100",) * 8,
    run_dir_free=50 << 30,
    shm_free=8 << 30,
    open_files=65536,
    token="t",
    model={"config.json": "abc", "model.safetensors": "def"},
    data={"data.train": "123"},
)


def of(nodes, check):
    """The only finding of a check, as (state, detail)."""
    (found,) = [one for one in findings(nodes, token="t", needed_bytes=40 << 30) if one.check == check]
    return found.state, found.detail


def other(**changes):
    return replace(NODE, number=1, host="b", **changes)


def test_equal_nodes_pass_every_check():
    found = findings([NODE, other(clock=100.02)], token="t", needed_bytes=40 << 30)
    assert {one.state for one in found} == {"ok"}
    assert of([NODE, other()], "devices") == ("ok", "2 nodes of 8 x H100")
    nodes = [replace(NODE, memory_free=9 << 30, memory_needed=8 << 30), other(memory_free=10 << 30)]
    assert of(nodes, "host memory") == ("ok", "at least 9.0 GiB free, the job's copies take 8.0 GiB")


@pytest.mark.parametrize(
    ("changes", "check", "state", "says"),
    [
        (
            {"versions": {**NODE.versions, "torch": "2.12.1"}},
            "versions",
            "FAILED",
            "torch: 2.13.0 on node 0 (a); 2.12.1 on node 1 (b)",
        ),
        ({"devices": ("H100",) * 4}, "devices", "warning", "8 x H100 on node 0 (a); 4 x H100 on node 1 (b)"),
        ({"devices": ()}, "devices", "warning", "8 x H100 on node 0 (a); CPU on node 1 (b)"),
        ({"clock": 97.5}, "clocks", "warning", "node 0 (a) is 2.5 s ahead of node 1 (b)"),
        ({"token": ""}, "run.dir is shared", "FAILED", "node 1 (b) cannot see what rank 0 writes there"),
        ({"run_dir_free": 3 << 30}, "disk", "FAILED", "3.0 GiB free in run.dir, checkpoints take 40.0 GiB on node 1 (b)"),
        ({"model": {}, "model_error": "no config.json"}, "model", "FAILED", "no config.json on node 1 (b)"),
        (
            {"model": {"config.json": "abc", "model.safetensors": "xyz"}},
            *("the same model", "FAILED", "model.safetensors differs: def on node 0 (a); xyz on node 1 (b)"),
        ),
        (
            {"model": {"config.json": "abc"}},
            *("the same model", "FAILED", "model.safetensors differs: def on node 0 (a); missing on node 1 (b)"),
        ),
        ({"data": {}, "data_error": "no rows"}, "data, reward, loss", "FAILED", "no rows on node 1 (b)"),
        ({"data": {}, "data_error": "no rows"}, "the same data", "ok", "data.train"),
        (
            {"data": {"data.train": "124"}},
            *("the same data", "FAILED", "data.train differs: 123 on node 0 (a); 124 on node 1 (b)"),
        ),
        ({"servers_error": "no python"}, "rollout servers", "FAILED", "no python on node 1 (b)"),
        (
            {"memory_free": 3 << 30, "memory_needed": 4 << 30},
            *("host memory", "FAILED", "3.0 GiB free, the job's copies take 4.0 GiB on node 1 (b)"),
        ),
        ({"shm_free": 64 << 20}, "/dev/shm", "warning", "0.1 GiB free on node 1 (b)"),
        ({"open_files": 1024}, "open files", "warning", "1024 on node 1 (b)"),
    ],
)
def test_a_node_that_differs_is_named_with_what_it_has(changes, check, state, says):
    assert of([NODE, other(**changes)], check) == (state, says)


def facts_of(tmp_path, *overrides):
    """The facts of this machine, for a job of two ranks on CPU."""
    config = resolve(load_config(None, [f"run.dir={tmp_path}", "run.platform=cpu", *overrides]), 2, cuda=False)
    (tmp_path / "token").write_text("t")
    return collect(config, 2, clock=0.0, token_file=tmp_path / "token")


def test_weights_that_differ_between_nodes_are_found_though_their_config_is_the_same(tmp_path, hf):
    """The ranks of a run read each weight once for all, so nodes with different weights would train a mixture."""
    (hf / "tokenizer.json").write_text("{}")
    options = (f"model.path={hf}", "parallel.tp=2", "data.max_prompt_tokens=64", "rollout.max_response_tokens=64")
    facts, model = facts_of(tmp_path, *options), hf / "model.safetensors"
    mine = facts.model
    assert not facts.model_error and {"config.json", "model.safetensors"} <= mine.keys()
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    theirs = facts_of(tmp_path, *options).model
    assert {name for name in mine if mine[name] != theirs[name]} == {"model.safetensors"}


@pytest.mark.parametrize(("nodes", "number", "is_told"), [("every", 1, True), ("first", 1, False), ("first", 0, True)])
def test_every_node_that_starts_servers_must_have_their_interpreter(tmp_path, monkeypatch, nodes, number, is_told):
    monkeypatch.setenv("GROUP_RANK", str(number))
    monkeypatch.setenv("RANK", str(8 * number))
    options = ("rollout.backend=sglang", f"sglang.nodes={nodes}", f"sglang.python={tmp_path / 'none'}")
    assert facts_of(tmp_path, *options).servers_error == f"sglang.python={tmp_path / 'none'} is not an executable" * is_told


def test_of_nodes_set_apart_for_servers_only_these_must_have_their_interpreter(tmp_path, monkeypatch):
    options = ("rollout.backend=sglang", "sglang.dedicated_nodes=1", f"sglang.python={tmp_path / 'none'}")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    error = f"sglang.python={tmp_path / 'none'} is not an executable"
    for router, wanted in (((), ["", "", error]), (("sglang.router=cache_aware",), [error, "", error])):
        found = []
        for number in range(3):
            monkeypatch.setenv("GROUP_RANK", str(number))
            found.append(facts_of(tmp_path, *options, *router).servers_error)
        assert found == wanted


def test_a_model_that_the_system_does_not_let_in_is_a_finding_of_its_node(tmp_path, monkeypatch):
    def refuse(config, world_size):
        raise PermissionError(13, "Permission denied", f"{config.model.path}/config.json")

    monkeypatch.setattr("etr_megatron.checks.check_model", refuse)
    found = facts_of(tmp_path, "model.path=/data/model")
    assert (found.model, found.model_error) == ({}, "/data/model/config.json: Permission denied")


def test_problems_that_differ_between_nodes_or_cannot_be_used_on_one_are_found(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "1+1?", "answer": "2"}\n')
    options = (
        f"data.train={file}",
        "data.eval={a: arithmetic, b: owner/set}",
        "rollout.prompts_per_step=1",
        "train.minibatches=1",
    )
    mine = facts_of(tmp_path, *options)
    assert mine.data.keys() == {"data.train"} and not mine.data_error
    file.write_text('{"question": "1+1?", "answer": "3"}\n')
    theirs = facts_of(tmp_path, *options)
    assert theirs.data.keys() == {"data.train"} and theirs.data != mine.data
    file.unlink()
    broken = facts_of(tmp_path, *options, "reward.function=no.such_module:f", "objective.loss=no.such_module:f")
    assert not broken.data
    for part in (f"data.train: there is no file '{file}'", "reward.function is 'no.such_module:f'", "objective.loss"):
        assert part in broken.data_error


def test_tool_schemas_that_differ_between_nodes_are_found(tmp_path):
    file, found = tmp_path / "tools.json", []
    for name in ("one", "two"):
        file.write_text(f'[{{"name": "{name}"}}]')
        found.append(facts_of(tmp_path, f"data.tools={file}").data)
    assert found[0].keys() == found[1].keys() == {"data.tools"} and found[0] != found[1]


def test_a_node_that_is_set_apart_for_servers_needs_no_problems(tmp_path, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    options = ("rollout.backend=sglang", "sglang.dedicated_nodes=1", "data.train=none.jsonl")
    for number, told in ((0, "data.train: there is no file 'none.jsonl'"), (1, "")):
        monkeypatch.setenv("GROUP_RANK", str(number))
        error = facts_of(tmp_path, *options).data_error
        assert error.startswith(told) and bool(error) == bool(told)


def test_a_run_directory_that_may_not_be_looked_at_has_no_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)

    def refuse(path):
        if Path(path) == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return usage

    assert facts_of(tmp_path).run_dir_free > 0
    monkeypatch.setattr(shutil, "disk_usage", refuse)
    assert facts_of(tmp_path).run_dir_free == 0


ADAPTED = 16 * (32 + 16 + 32 + 16)
"""Elements of the matrices of q, k and v, of the output, of gate and up, and of down in `small_model`: powers of two."""
ADAPTED_SIDES = (16 + 16) + 2 * (16 + 8) + (16 + 16) + 3 * (16 + 16)
"""Rows and columns of all its matrices."""
PARAMETERS = ADAPTED + 32 * 16 * 2 + 3 * 16 + 2 * 8
"""All its elements, with the embedding, the head and norms."""


def small_model(path):
    """Describe a Qwen3 of some thousand parameters in `path`."""
    described = json.loads((REPO / "configs" / "models" / "Qwen3-8B" / "config.json").read_text())
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=32)
    (path / "config.json").write_text(json.dumps({**described, **sizes, "num_hidden_layers": 1}))


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], 0),
        (["checkpoint.asynchronous=true"], (2 + 4 + 8) * PARAMETERS * 3 // 12),
        (["checkpoint.asynchronous=true", "model.dtype=float32"], (4 + 8) * PARAMETERS * 3 // 12),
        (["train.distributed_optimizer=true", "train.optimizer_offload=true"], 16 * PARAMETERS * 3 // 12),
        (["lora.rank=4", "lora.offload_base=false", "checkpoint.asynchronous=true"], (4 + 8) * 4 * ADAPTED_SIDES * 3 // 12),
        (["lora.rank=4"], 2 * 3 * ADAPTED),
    ],
)
def test_a_node_needs_memory_for_the_copies_of_its_ranks(tmp_path, monkeypatch, overrides, needed):
    small_model(tmp_path)
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    options = [f"model.path={tmp_path}", "parallel.tp=1", "rollout.prompts_per_step=12", *overrides]
    assert _memory_needed(resolve(load_config(None, options), 12, cuda=True), 12) == needed


def test_checkpoints_that_a_run_has_already_need_no_room_again(tmp_path):
    small_model(tmp_path)

    def needed(*more):
        return _checkpoint_bytes(load_config(None, [f"model.path={tmp_path}", f"run.dir={tmp_path}", *more]))

    one = needed("checkpoint.keep=1") // 2
    assert one == 14 * total_parameters(read_architecture(tmp_path))
    assert needed("checkpoint.keep=2") == 3 * one
    assert needed("checkpoint.keep=1", "checkpoint.keep_best=3") == 5 * one
    assert needed("checkpoint.every=0") == 0
    folder = tmp_path / "run" / "checkpoints" / "step_000025"
    folder.mkdir(parents=True)
    (folder / "a.distcp").write_bytes(bytes(one))
    assert needed("checkpoint.keep=2") == 2 * one
    (folder / "b.distcp").write_bytes(bytes(one))
    assert needed("checkpoint.keep=2") == needed("checkpoint.keep=1") == one  # room for the next one


def test_a_slow_pair_and_a_broken_one_are_named():
    found = _pairs({(0, 1): 10e9, (0, 2): 2e9, (1, 2): 11e9, (0, 3): 9e9, (1, 3): "no route", (2, 3): 10e9})
    assert [(one.check, one.state, one.detail) for one in found] == [
        ("all-reduce of nodes 1 and 3", "FAILED", "no route"),
        ("all-reduce of nodes 0 and 2", "warning", "2.00 GB/s, the median pair has 10.00 GB/s"),
        ("all-reduce between nodes", "ok", "5 pairs, median 10.00 GB/s"),
    ]
    assert gib(3 << 30) == "3.0 GiB"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_every_two_nodes_meet_once_and_none_is_in_two_pairs_of_a_round(count):
    found = list(rounds(count))
    assert len(found) == (count if count % 2 else count - 1)
    assert all(len({*itertools.chain(*pairs)}) == 2 * len(pairs) for pairs in found)
    assert sorted(itertools.chain(*found)) == list(itertools.combinations(range(count), 2))


def measured(stuck: tuple[int, int]) -> list[tuple[str, str]]:
    """(check, state) with one rank per node; the first rank of the `stuck` pair does not answer the second, which gives it up
    sooner than others would."""
    real, store = network._all_reduce, dist.distributed_c10d._get_default_store()

    def all_reduce(group, device, size):
        if group is None or dist.get_process_group_ranks(group) != list(stuck):
            return real(group, device, size)
        assert group._get_backend(device).options._timeout == datetime.timedelta(seconds=120)
        if dist.get_rank() == stuck[0]:
            store.wait(["given up"], datetime.timedelta(seconds=300))
            raise RuntimeError("no route")
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2), group)
        try:
            return real(group, device, size)
        finally:
            store.set("given up", "")

    with mock.patch.object(network, "_all_reduce", all_reduce):
        nodes = list(range(dist.get_world_size()))
        found = network.measure(nodes, device=torch.device("cpu"), size=4096, timeout_s=120)
    return [(one.check, one.state) for one in found]


@pytest.mark.slow
def test_a_pair_that_does_not_answer_is_named_on_every_rank_and_the_others_are_measured():
    assert PAIR_TIMEOUT_S < TIMEOUT_S / 1.5  # the others wait in a collective meanwhile
    # New ranks, as in a job: torch names a pair's group after the number of groups that each of its ranks has.
    gang = Gang(4)
    try:
        everywhere = gang.run("tests.test_preflight:measured", stuck=(1, 2))
    finally:
        gang.stop()
    for found in everywhere:
        checks = [check for check, state in found if state == "FAILED"]
        assert checks == ["all-reduce of nodes 1 and 2", "all-reduce of all ranks"]
        assert ("all-reduce between nodes", "ok") in found


def test_the_table_ends_with_what_failed():
    found = findings([NODE, other(token="", open_files=10)], token="t", needed_bytes=0)
    lines = table(found).splitlines()
    assert len(lines) == len(found)
    assert " ".join(lines[-1].split()) == "run.dir is shared FAILED node 1 (b) cannot see what rank 0 writes there"
    assert "warning" in lines[-2] and " ok " in lines[0]


def preflight(tmp_path, *arguments, nproc=2):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m", "etr_megatron.preflight"]
    job = ["configs/cpu_tiny.yaml", f"run.dir={tmp_path / 'runs'}", *arguments]
    process = warm.start([sys.executable, *command, *job], {**os.environ, "OMP_NUM_THREADS": "1"})
    printed = process.communicate(timeout=600)
    return subprocess.CompletedProcess(command, process.returncode, *printed)


@pytest.mark.slow
def test_two_ranks_of_this_machine_pass_and_leave_nothing(tmp_path):
    done = preflight(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "all 1 nodes see it" in checks["run.dir is shared"]
    assert " GB/s" in checks["all-reduce of all ranks"] and "one node" in checks["all-reduce between nodes"]
    assert "torch 2." in checks["versions"]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_a_model_that_is_not_there_fails_with_one_sentence(tmp_path):
    done = preflight(tmp_path, f"model.path={tmp_path / 'none'}", nproc=1)
    assert done.returncode != 0
    assert "error: 1 of 15 checks failed: model" in done.stderr
    assert "is not a directory" in done.stdout and "Traceback" not in done.stdout
