"""Checkpoints that threads write: the state at the time of the save, and errors that reach every rank."""

from __future__ import annotations

import datetime
import errno
import os
import re
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from etr_megatron import checkpoint
from etr_megatron.checkpoint import Saver
from etr_megatron.checkpoint.saver import _Pending
from etr_megatron.checkpoint.saving import _Writer
from etr_megatron.platform.phases import PhaseBarriers
from tests.hang import Hang
from tests.hf_models import random_sequences
from tests.late_writes import held_back
from tests.policy_jobs import build, make_batch

ASYNCHRONOUS = "checkpoint.asynchronous=true"
JOBS = "tests.test_asynchronous_checkpoints"


def saved_at_once_and_later(model: str, overrides: list[str], folder: str) -> dict[str, Any]:
    """Saves a policy after an update, and once more in threads that write only after two further updates."""
    policy = build(model, ["train.lr=0.1", ASYNCHRONOUS, *overrides])
    batch = make_batch(random_sequences())
    policy.update(batch)
    before = {name: tensor.clone() for name, tensor in policy.export()}
    state = {"cursor": [3, 1]}
    checkpoint.save(Path(folder, "at_once"), 1, policy, state, keep=1)
    saver = Saver(policy.config, PhaseBarriers(60))
    with held_back():
        saver.save(Path(folder, "later"), 1, policy, state, ())
        state["cursor"].append(7)
        for _ in range(2):
            policy.update(batch)
            saver.check()
        named = checkpoint.saved_steps(Path(folder, "later"))
    saver.finish()
    changed = sum(not before[name].equal(tensor) for name, tensor in policy.export())
    return {"named": named, "changed": changed, "times": saver.times()}


LAYOUTS = {
    "tp2": ("qwen3", ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2_vpp2": ("qwen3_moe", ["parallel.tp=1", "parallel.pp=2", "parallel.vpp=2"]),
    "ep2_sharded": ("qwen3_moe", ["parallel.tp=1", "parallel.ep=2", "train.distributed_optimizer=true"]),
    "dp2_sharded": ("qwen3_tied", ["parallel.tp=1", "train.distributed_optimizer=true"]),
    "adapters": ("qwen3", ["parallel.tp=2", "lora.rank=3"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_threads_write_while_the_policy_is_trained_on_is_byte_for_byte_what_a_save_at_once_writes(
    gangs, hf_models, tmp_path, layout
):
    family, overrides = LAYOUTS[layout]
    job = {"model": hf_models[family], "overrides": overrides, "folder": str(tmp_path)}
    for rank in gangs(2).run(f"{JOBS}:saved_at_once_and_later", **job):
        assert rank["named"] == [] and rank["changed"] > 0
        assert rank["times"]["time_checkpoint"] > 0 and rank["times"]["time_checkpoint_write"] > 0
    at_once, later = (tmp_path / name / "step_000001" for name in ("at_once", "later"))
    names = sorted(file.name for file in at_once.iterdir())
    assert names == sorted(file.name for file in later.iterdir()) and "__1_0.distcp" in names
    for name in names:
        if name != ".metadata":  # it has the folder's name
            assert (at_once / name).read_bytes() == (later / name).read_bytes(), name
    places = [FileSystemReader(folder).read_metadata() for folder in (at_once, later)]
    assert places[0].storage_data == places[1].storage_data
    assert places[0].state_dict_metadata.keys() == places[1].state_dict_metadata.keys()


def _fail_on_rank1(number: int) -> AbstractContextManager[Any]:
    """torch's writer fails on rank 1 with this error."""
    if dist.get_rank() != 1:
        return nullcontext()

    def create(path: Path, mode: str) -> None:
        raise OSError(number, os.strerror(number))

    init = _Writer.__init__

    def broken(writer: _Writer, *arguments: Any, **options: Any) -> None:
        init(writer, *arguments, **options)
        writer.fs.create_stream = create

    return patch.object(_Writer, "__init__", broken)


def _checked_until_it_fails(saver: Saver) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            saver.check()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def disk_full(model: str, folder: str, number: int) -> dict[str, Any]:
    """Step 1 is saved; step 2 fails on rank 1 with this error; then step 3 finds room."""
    policy, there = build(model, ["parallel.tp=2", ASYNCHRONOUS, "checkpoint.keep=5"]), Path(folder)
    saver = Saver(policy.config, PhaseBarriers(60))
    saver.save(there, 1, policy, {}, ())
    with _fail_on_rank1(number):
        saver.save(there, 2, policy, {}, ())
        said = _checked_until_it_fails(saver)
    dist.barrier()  # rank 0 has removed the partial checkpoint
    left = sorted(entry.name for entry in there.iterdir())
    dist.barrier()
    saver.save(there, 3, policy, {}, ())
    saver.finish()
    return {"said": said, "left": left, "steps": checkpoint.saved_steps(there)}


def test_a_full_disk_of_one_rank_reaches_every_rank_and_leaves_the_older_checkpoint(gangs, hf_models, tmp_path):
    job = {"model": hf_models["qwen3"], "folder": str(tmp_path), "number": errno.ENOSPC}
    for rank in gangs(2).run(f"{JOBS}:disk_full", **job):
        assert rank["said"].startswith(f"UserError: {tmp_path}: no space left on the device while saving step 2; make room")
        assert rank["left"] == ["step_000001"] and rank["steps"] == [1, 3]


def test_an_error_of_another_kind_reaches_every_rank_too(gangs, hf_models, tmp_path):
    job = {"model": hf_models["qwen3"], "folder": str(tmp_path), "number": errno.EIO}
    for rank in gangs(2).run(f"{JOBS}:disk_full", **job):
        assert rank["said"].startswith("RuntimeError: step 2 was not saved") and "Input/output error" in rank["said"]
        assert rank["steps"] == [1, 3]


def disk_hangs(model: str, folder: str) -> str:
    """The error on this rank if rank 1's disk takes longer than the deadline."""
    policy, there = build(model, ["parallel.tp=2", ASYNCHRONOUS]), Path(folder)
    saver, hang = Saver(policy.config, PhaseBarriers(60)), Hang()
    saver._writers._timeout = datetime.timedelta(seconds=2)
    write = _Writer.write_data

    def late(writer: _Writer, *arguments: Any) -> Any:
        if dist.get_rank() == 1:
            hang()
        return write(writer, *arguments)

    with patch.object(_Writer, "write_data", late):
        saver.save(there, 1, policy, {}, ())
        with patch("etr_megatron.checkpoint.saver.OTHERS_S", 0.1):
            said = _checked_until_it_fails(saver)
        saver.close()  # does not wait
        dist.barrier()
        hang.given_up()
    return said


def test_a_rank_whose_disk_hangs_is_named_after_the_deadline(gangs, hf_models, tmp_path):
    said, others = gangs(2).run(f"{JOBS}:disk_hangs", model=hf_models["qwen3"], folder=str(tmp_path))
    assert said == "TimeoutError: rank 0 waited 2 s at the writing of the checkpoint of step 1 for rank 1"
    assert others == "RuntimeError: a rank has not completed the checkpoint, see the other ranks' errors"


def test_a_full_disk_is_told_beside_a_rank_that_is_lost_at_the_same_time(tmp_path):
    def barrier(what: str) -> None:
        try:
            raise RuntimeError("Connection closed by peer")  # gloo's
        except RuntimeError as error:
            raise ConnectionError(f"lost rank 1 at the {what}") from error

    def write(group: Any, barrier: Any) -> None:
        with patch.object(FileSystemWriter, "write_data", side_effect=OSError(errno.ENOSPC, "full")):
            _Writer(tmp_path, barrier=barrier).write_data()

    prepared: Any = SimpleNamespace(step=3, checkpoints=tmp_path, write=write)
    pending = _Pending(prepared, SimpleNamespace(group=None, barrier=barrier))  # type: ignore[arg-type]
    told = f"lost rank 1 at the writing of the checkpoint of step 3; besides, {tmp_path}: no space left on the device"
    with pytest.raises(ConnectionError, match=re.escape(told)):
        pending.result()


def failing_run(model: str, folder: str) -> tuple[list[int], list[int]]:
    """The complete checkpoints when a run has failed while one was being written, before and after it has ended."""
    policy, there = build(model, ["parallel.tp=2", ASYNCHRONOUS]), Path(folder)
    saver = Saver(policy.config, PhaseBarriers(60))
    with held_back():
        saver.save(there, 1, policy, {}, ())
        before = checkpoint.saved_steps(there)
    saver.close()
    return before, checkpoint.saved_steps(there)


def test_a_run_that_fails_waits_for_its_checkpoint(gangs, hf_models, tmp_path):
    job = {"model": hf_models["qwen3"], "folder": str(tmp_path)}
    assert gangs(2).run(f"{JOBS}:failing_run", **job) == [([], [1])] * 2


def test_a_run_that_fails_waits_no_longer_than_that_for_a_rank_that_is_lost(monkeypatch, caplog):
    monkeypatch.setattr("etr_megatron.checkpoint.saver.MIN_CLOSE_S", 0.05)
    saver = object.__new__(Saver)
    saver._pending = SimpleNamespace(done=threading.Event(), age=0.1)
    saver.close()
    assert "the last checkpoint is not complete: not all ranks have written it in time" in caplog.text
