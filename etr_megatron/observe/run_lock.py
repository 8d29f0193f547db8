"""A lock that lets only one process at a time write a run directory."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etr_megatron.errors import UserError
from etr_megatron.platform.file_lock import try_lock
from etr_megatron.platform.files import disk_errors

PATIENCE_S = 10.0
"""Seconds to wait for a lock: a process that was just killed keeps it until the kernel has reclaimed its memory."""

_PAUSE_S = 0.1

_held: set[int] = set()


def _let_go_in_child() -> None:
    # All processes that share a descriptor hold its lock, and a forked child may outlive the run.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of `file`'s directory, which is created if missing. The lock ends with this process, however that ends.

    Raises `UserError` if another process holds the lock for `PATIENCE_S`, the directory cannot be written or its disk is full.
    Warns and continues without a lock if the file system has none.
    """
    with disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(file):
        # Open for writing, because NFS requires it for a lock. Spawned children do not inherit the descriptor.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        _lock(descriptor, file)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def is_free(file: Path) -> bool:
    """Whether no process holds the lock now; False if that is unknown because the file is missing or cannot be opened."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a process that starts at this moment retries
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _lock(descriptor: int, file: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not try_lock(descriptor, file.parent):
        if time.monotonic() >= deadline:
            raise UserError(f"another process is running in {file.parent}; wait for it, stop it, or choose another run.name")
        time.sleep(_PAUSE_S)
