"""Saving a checkpoint on a disk that fills up at any point of a file, or that cannot be written at all."""

from __future__ import annotations

import errno
import os
import pickle
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from etr_megatron.checkpoint.checkpoint import prepare
from etr_megatron.checkpoint.saving import _Writer, disk_full_anywhere
from etr_megatron.errors import UserError


class _FailsOnce:
    """A file whose `at`-th write fails; later ones pass, as on a disk where another process has just freed a page."""

    def __init__(self, path, at: int, number: int) -> None:
        self._file, self._left, self._error = path.open("wb"), at, OSError(number, os.strerror(number))

    def write(self, data) -> int:
        self._left -= 1
        if self._left == 0:
            raise self._error
        return self._file.write(data)

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def _failure_of_saving(folder, at: int, number: int = errno.ENOSPC) -> BaseException | None:
    writer = _Writer(folder, thread_count=1, sync_files=False)

    @contextmanager
    def create_stream(path, mode):
        file = _FailsOnce(path, at, number)
        try:
            yield file
        finally:
            file.close()

    writer.fs.create_stream = create_stream
    try:
        dcp.save({f"tensor {n}": torch.zeros(7 * n + 1) for n in range(3)}, storage_writer=writer, no_dist=True)
    except BaseException as error:
        return pickle.loads(pickle.dumps(error))  # torch gathers it from the ranks this way, which loses exception contexts
    return None


@pytest.mark.filterwarnings("ignore")
def test_a_disk_that_is_full_at_any_write_is_recognised(tmp_path):
    failures = [_failure_of_saving(tmp_path / str(at), at) for at in range(1, 40)]
    assert len([one for one in failures if one is not None]) > 20
    assert all(one is None or disk_full_anywhere(one) is not None for one in failures)


@pytest.mark.filterwarnings("ignore")
def test_a_failure_of_another_kind_is_not_taken_for_a_full_disk(tmp_path):
    failure = _failure_of_saving(tmp_path, 5, errno.EIO)
    assert failure is not None and disk_full_anywhere(failure) is None


def saving_to(checkpoints: str) -> str:
    """Runs in a gang: the error of a save that fails before it needs the policy."""
    try:
        prepare(Path(checkpoints), 3, None, {}, keep=1)
    except UserError as error:
        return str(error)
    return ""


def test_every_rank_raises_the_error_of_rank_0_that_cannot_make_the_folder(gangs, tmp_path):
    (tmp_path / "file").write_text("")
    errors = gangs(2).run("tests.test_checkpoint_saving:saving_to", checkpoints=str(tmp_path / "file" / "checkpoints"))
    assert "cannot be written (Not a directory)" in errors[0] and errors[1] == errors[0]
