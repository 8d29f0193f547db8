"""Tensors for processes of this machine: what goes to them is where the bytes lie, by torch's own shared memory."""

from __future__ import annotations

import base64
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
import torch.multiprocessing  # teaches ForkingPickler tensors
from torch import Tensor

from etr_megatron.weights.transport.whole import Field

_FILES = Path("/dev/shm")
_ROOM = 64 << 20
"""Bytes that others of the machine are left: who writes to a file without room dies of SIGBUS, and is told nothing before."""

_strategy = threading.Lock()  # it is the process's, and a thread that restored it would take it from another


@contextmanager
def _by_name() -> Iterator[None]:
    """Segments that a process without kinship opens by a name; by default torch passes descriptors to children."""
    with _strategy:
        before = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")
        try:
            yield
        finally:
            torch.multiprocessing.set_sharing_strategy(before)


def _keep_sockets_to_ourselves() -> None:
    """The first segment starts torch's manager of segments, a process that lives as long as a reader does. Were it to inherit
    the sockets of gloo and of the store, which torch leaves inheritable, others would not hear of it when we die."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor of this listing, and any that was closed meanwhile
            if os.readlink(entry).startswith("socket:"):
                os.set_inheritable(int(entry.name), False)


class SharedMemory:
    """One buffer, which is gone once this process and all that opened it are.

    It grows with what is put into it. A handle that was never read, because its server failed, keeps the segment until this
    process ends, also after a larger one took its place: who knows what is to come says so at the first `put`.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def put(self, flat: Tensor, largest: int = 0) -> Tensor:
        """The bytes of a uint8 [n] of any device, here; the caller knows that nobody reads what was there before.

        largest: bytes that will be put here at a time.

        Returns a view of the buffer, which owns it. Raises OSError where the machine has no room (in a container: `--ipc host`,
        or `--shm-size`) or torch cannot make a segment.
        """
        if len(self._buffer) < len(flat):
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = _segment(max(len(flat), largest))
        here = self._buffer[: len(flat)]
        here.copy_(flat)
        return here


def _segment(nbytes: int) -> Tensor:
    """Raises OSError."""
    if not has_room(nbytes):
        raise OSError(f"{_FILES} has no room for {-(-nbytes // (1 << 20))} MiB of weights")
    try:
        _keep_sockets_to_ourselves()
        with _by_name():
            return torch.empty(nbytes, dtype=torch.uint8).share_memory_()
    except (OSError, RuntimeError) as error:
        raise OSError(f"there is no shared memory for weights ({error})") from error


class SharedBuckets:
    """Flat buckets one after the other in two segments: one is filled while servers read the other.

    workers: of each server, every one of which is told on its own.
    """

    def __init__(self, workers: int) -> None:
        self._workers, self._segments = workers, deque([SharedMemory(), SharedMemory()])

    def put(self, fields: Sequence[Field], flat: Tensor, names: Sequence[str], largest: int = 0) -> dict[str, list[str]]:
        """Server -> what each of its workers is sent of a bucket (uint8 [n], any device). largest: see `SharedMemory.put`.

        The caller knows that servers have answered the bucket before the last one, or will not read it any more. Raises OSError
        as `SharedMemory.put`.
        """
        self._segments.rotate()
        shared = self._segments[0].put(flat, largest)
        views = [(field.name, field.view(shared)) for field in fields]
        return {name: [handles(views) for _ in range(self._workers)] for name in names}

    def close(self) -> None:
        """Give up the segments; whoever has them open keeps them."""
        self._segments = deque([SharedMemory(), SharedMemory()])


def has_room(nbytes: int) -> bool:
    """Whether a segment of so many bytes can be made."""
    try:
        found = os.statvfs(_FILES)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize >= nbytes + _ROOM


def handles(named: Sequence[tuple[str, Tensor]]) -> str:
    """Views of a `SharedMemory` as `/update_weights_from_tensor` takes them.

    For one process that reads them once: torch counts readers by what was pickled, and after a second reading of the same
    handles the segment would be taken for unused. So every worker is sent handles of its own.
    """
    with _by_name():
        return base64.b64encode(ForkingPickler.dumps(list(named))).decode()
