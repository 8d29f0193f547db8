"""Puts bytes into files that are being written, at the speed at which the kernel copies a file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from etr_megatron.errors import UserError

WRITE_BYTES = 2**17
"""Bytes per write from memory. For more, Linux looks for large free blocks of memory; writes took up to ten times as long."""

_COPY_BYTES = 2**23
_NOT_POSSIBLE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ETXTBSY, errno.EPERM)
"""Errors by which the kernel reports that it cannot copy between two files; then this process reads and writes the bytes."""
_FAILED_DISK = (errno.EIO, errno.ESTALE)
_WORTH_WRITING = 2**18
"""Minimum bytes for `start_writeback`; smaller writes are left to the kernel's own writeback."""


def copy_bytes(source: Path, begin: int, target: Path, at: int, count: int) -> None:
    """Copy `count` bytes from `begin` of `source` to `at` of `target`, which must exist; within the kernel if possible.

    Raises UserError if `source` ends too early or a disk fails, OSError for a full disk.
    """
    with open(source, "rb", buffering=0) as file, open(target, "r+b", buffering=0) as out:
        while count:
            try:
                done = _copy_some(file.fileno(), begin, out.fileno(), at, min(count, _COPY_BYTES))
            except OSError as error:  # it names neither of the two files
                if error.errno not in _FAILED_DISK:
                    raise
                raise UserError(f"{source} cannot be copied to {target} ({error.strerror})") from error
            if done == 0:
                raise UserError(f"{source} ends at byte {begin}, in the middle of a tensor; fetch the checkpoint again")
            start_writeback(out.fileno(), at, done)
            begin, at, count = begin + done, at + done, count - done


def _copy_some(source: int, begin: int, target: int, at: int, size: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, size, begin, at)
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise
    return os.pwrite(target, os.pread(source, min(size, WRITE_BYTES), begin), at)


def write_bytes(target: int, data: memoryview, at: int) -> None:
    """Write memory to `at` of the file with the descriptor `target`. Raises OSError for a full disk."""
    begin, length = at, len(data)
    while data:
        count = os.pwrite(target, data[:WRITE_BYTES], at)
        data, at = data[count:], at + count
    start_writeback(target, begin, length)


def start_writeback(descriptor: int, begin: int, length: int) -> None:
    """Have the kernel write these bytes to the disk while the next ones are made; a sync at the end then has little to do."""
    if length >= _WORTH_WRITING and hasattr(os, "posix_fadvise"):
        # With DONTNEED the kernel first writes dirty pages out, before it drops them from memory.
        os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_DONTNEED)
