"""Shares tensors with other processes of this machine: they are sent handles to torch's shared memory instead of bytes."""

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

FILES = Path("/dev/shm")
SEGMENTS = 2
"""Segments of `SharedBuckets`, each as large as the largest bucket."""

_ROOM = 64 << 20
"""Bytes left for other users of /dev/shm: a process that writes to a mapped file on a full file system dies of SIGBUS."""

_strategy = threading.Lock()  # the sharing strategy is process-wide, so one thread at a time may change it


@contextmanager
def _by_name() -> Iterator[None]:
    """Inside the block torch makes segments that unrelated processes can open by name, instead of by file descriptor."""
    with _strategy:
        before = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")
        try:
            yield
        finally:
            torch.multiprocessing.set_sharing_strategy(before)


def _keep_sockets_to_ourselves() -> None:
    """Make all sockets of this process non-inheritable, before torch starts its segment manager with the first segment.

    The manager lives as long as any reader. Torch leaves the sockets of gloo and of the store inheritable; if the manager
    inherited them, peers would not notice that this process has died.
    """
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor of this listing, and any that was closed meanwhile
            if os.readlink(entry).startswith("socket:"):
                os.set_inheritable(int(entry.name), False)


class SharedMemory:
    """One buffer in shared memory. It is freed once this process and all processes that opened it have ended.

    The buffer is replaced by a larger segment when necessary. A handle that was never read, because its server failed, keeps a
    replaced segment until this process ends. To avoid that, pass the largest size to the first `put` if it is known.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def put(self, flat: Tensor, largest: int = 0) -> Tensor:
        """Copy flat, uint8 [n] on any device, into the buffer; the caller ensures that no process still reads the old content.

        largest: size in bytes of the largest tensor that will ever be put here.

        Returns a view of the buffer, which owns the memory. Raises OSError when /dev/shm has no room (in a container: `--ipc
        host`, or `--shm-size`) or torch cannot make a segment.
        """
        if len(self._buffer) < len(flat):
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = _segment(max(len(flat), largest))
        here = self._buffer[: len(flat)]
        here.copy_(flat)
        return here


def _segment(nbytes: int) -> Tensor:
    """A new segment of shared memory. Raises OSError."""
    if not has_room(nbytes):
        raise OSError(f"{FILES} has no room for {-(-nbytes // (1 << 20))} MiB of weights")
    try:
        _keep_sockets_to_ourselves()
        with _by_name():
            return torch.empty(nbytes, dtype=torch.uint8).share_memory_()
    except (OSError, RuntimeError) as error:
        raise OSError(f"there is no shared memory for weights ({error})") from error


class SharedBuckets:
    """Flat buckets, alternately in two segments: one is filled while servers read the other.

    workers: number of workers of each server; every worker gets its own handles.
    """

    def __init__(self, workers: int) -> None:
        self._workers, self._segments = workers, deque(SharedMemory() for _ in range(SEGMENTS))

    def put(self, fields: Sequence[Field], flat: Tensor, names: Sequence[str], largest: int = 0) -> dict[str, list[str]]:
        """Server -> handles of a bucket (uint8 [n], any device) for each of its workers. largest: see `SharedMemory.put`.

        The caller ensures that servers have answered the bucket before the previous one, or will not read it any more. Raises
        OSError like `SharedMemory.put`.
        """
        self._segments.rotate()
        shared = self._segments[0].put(flat, largest)
        views = [(field.name, field.view(shared)) for field in fields]
        return {name: [handles(views) for _ in range(self._workers)] for name in names}

    def close(self) -> None:
        """Release the segments. They stay valid in processes that have opened them."""
        self._segments = deque(SharedMemory() for _ in range(SEGMENTS))


def has_room(nbytes: int) -> bool:
    """Whether there is room for a segment of this size."""
    try:
        found = os.statvfs(FILES)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize >= nbytes + _ROOM


def handles(named: Sequence[tuple[str, Tensor]]) -> str:
    """Pickled handles of views of a `SharedMemory`, for `/update_weights_from_tensor`.

    They are for one process, which must read them once. Torch counts one reader per pickling, so after a second read of the
    same handles the segment would count as unused. That is why every worker gets its own handles.
    """
    with _by_name():
        return base64.b64encode(ForkingPickler.dumps(list(named))).decode()
