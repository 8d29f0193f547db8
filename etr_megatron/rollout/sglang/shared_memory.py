"""Tensors for processes of this machine: what goes to them is where the bytes lie, by torch's own shared memory."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
import torch.multiprocessing  # teaches ForkingPickler tensors
from torch import Tensor

_FILES = Path("/dev/shm")
_ROOM = 64 << 20
"""Bytes that others of the machine are left: who writes to a file without room dies of SIGBUS, and is told nothing before."""


@contextmanager
def _by_name() -> Iterator[None]:
    """Segments that a process without kinship opens by a name; by default torch passes descriptors to children."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


class SharedMemory:
    """One buffer, which grows with what is put into it. It is gone with the last process that has it open."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def put(self, flat: Tensor) -> Tensor | None:
        """The bytes of a uint8 [n] of any device, here; the caller knows that nobody reads what was there before.

        Returns a view of the buffer, which owns it; None where the machine has no room (in a container: `--ipc host`, or
        `--shm-size`).
        """
        if len(self._buffer) < len(flat):
            self._buffer = torch.empty(0, dtype=torch.uint8)
            if not has_room(len(flat)):
                return None
            with _by_name():
                self._buffer = torch.empty(len(flat), dtype=torch.uint8).share_memory_()
        here = self._buffer[: len(flat)]
        here.copy_(flat)
        return here


def has_room(nbytes: int) -> bool:
    """Whether a segment of so many bytes can be made."""
    try:
        found = os.statvfs(_FILES)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize >= nbytes + _ROOM


def handles(named: Sequence[tuple[str, Tensor]]) -> str:
    """Views of a `SharedMemory` as `/update_weights_from_tensor` takes them; for one process that reads them once."""
    with _by_name():
        return base64.b64encode(ForkingPickler.dumps(list(named))).decode()
