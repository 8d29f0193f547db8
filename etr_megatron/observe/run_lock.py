"""One process at a time writes a run directory."""

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
"""A process that was killed a moment ago keeps its lock until the kernel has taken its memory back."""

_PAUSE_S = 0.1

_held: set[int] = set()


def _let_go_in_child() -> None:
    # A lock belongs to all who share its descriptor, and a child that was forked may live longer than the run.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def locked(file: Path, patience_s: float | None = None) -> Iterator[None]:
    """Hold the lock of `file`'s directory, which is made if it is not there. It ends with this process, however that ends.

    patience_s: seconds for which a lock that is held is asked for again; None: `PATIENCE_S`.
    Raises `UserError` when another process holds the lock, or when the directory cannot be written or its disk is full.
    Where the file system has no locks it warns and goes on without.
    """
    with disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(file):
        # For writing, although nothing is: a lock over NFS asks for it. Children that are not forks do not inherit it.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        _lock(descriptor, file, PATIENCE_S if patience_s is None else patience_s)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def is_free(file: Path) -> bool:
    """Whether no process holds the lock now, as far as that can be found out: not where it may not be opened, or is none."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # whoever starts in this moment asks again
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _lock(descriptor: int, file: Path, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not try_lock(descriptor, file.parent):
        if time.monotonic() >= deadline:
            raise UserError(f"another process is running in {file.parent}; wait for it, stop it, or choose another run.name")
        time.sleep(_PAUSE_S)
