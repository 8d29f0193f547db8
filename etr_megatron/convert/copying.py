"""Bytes into files that are being written, at the speed at which the kernel copies a file."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etr_megatron.errors import UserError
from etr_megatron.platform.files import DISK_FULL

WRITE_BYTES = 2**17
"""Written from memory at a time: with more Linux looks for large stretches of free memory, and took up to ten times as long."""

_COPY_BYTES = 2**23
_THREADS = 2
_AHEAD = 16
"""Copies that wait or run at a time."""
_WORTH_WRITING = 2**18
"""Bytes below which the kernel is left to decide when to bring them to the disk."""


class Copies:
    """Byte ranges that are copied from file to file by a few threads, within the kernel if it can.

        with Copies(written) as copies:
            copies.add(source, begin, target, at, count)

    written: called in the caller's thread with the bytes of each copy that is done. The end of the block waits for all of them;
    it, or an `add` before, raises what went wrong in any: UserError where a source ends too early, OSError for a full disk.
    """

    def __init__(self, written: Callable[[int], Any]) -> None:
        self._written = written
        self._pool = ThreadPoolExecutor(_THREADS)
        self._running: deque[Future[int]] = deque()

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._running:
                self._collect()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def add(self, source: Path, begin: int, target: Path, at: int, count: int) -> None:
        """Copy `count` bytes from `begin` of `source` to `at` of `target`, which exists; soon, and in any order."""
        for first in range(0, count, _COPY_BYTES):
            if len(self._running) >= _AHEAD:
                self._collect()
            size = min(_COPY_BYTES, count - first)
            self._running.append(self._pool.submit(_copy, source, begin + first, target, at + first, size))

    def _collect(self) -> None:
        self._written(self._running.popleft().result())


def _copy(source: Path, begin: int, target: Path, at: int, count: int) -> int:
    left = count
    with open(source, "rb", buffering=0) as file, open(target, "r+b", buffering=0) as out:
        while left:
            done = _copy_some(file.fileno(), begin, out.fileno(), at, left)
            if done == 0:
                raise UserError(f"{source} ends at byte {begin}, in the middle of a tensor; fetch the checkpoint again")
            begin, at, left = begin + done, at + done, left - done
        start_writeback(out.fileno(), at - count, count)
    return count


def _copy_some(source: int, begin: int, target: int, at: int, size: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, size, begin, at)
        except OSError as error:  # between some file systems it is not possible
            if error.errno in DISK_FULL:
                raise
    return os.pwrite(target, os.pread(source, min(size, WRITE_BYTES), begin), at)


def write_bytes(target: int, data: memoryview, at: int) -> None:
    """Write memory to `at` of the file with the descriptor `target`. Raises OSError for a disk that is full."""
    begin, length = at, len(data)
    while data:
        count = os.pwrite(target, data[:WRITE_BYTES], at)
        data, at = data[count:], at + count
    start_writeback(target, begin, length)


def start_writeback(descriptor: int, begin: int, length: int) -> None:
    """Have the kernel bring these bytes to the disk while the next ones are made; a sync in the end then finds little to do."""
    if length >= _WORTH_WRITING and hasattr(os, "posix_fadvise"):
        # Bytes that nobody needs are written out first of all, before they are dropped from memory.
        os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_DONTNEED)
