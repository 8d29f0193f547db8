"""The output directory of a conversion: either complete or absent."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from etr_megatron.convert.ranks import Ranks
from etr_megatron.errors import UserError
from etr_megatron.platform.file_lock import try_lock
from etr_megatron.platform.files import disk_full_behind, no_room, sync_to_disk

_SPARE_BYTES = 16 * 2**20
"""Disk space for files and headers besides tensors: safetensors headers, an index, a tokenizer."""

SEEN_S = 30.0
"""Seconds to wait until a file of rank 0 becomes visible: a network file system may cache a listing for about as long."""

_OURS = ".conversion"
"""Name of the marker file in a conversion's unfinished directory. The contents of a directory without it are never removed.
Ranks compare its content to check that they see the same directory."""


@contextmanager
def output_directory(out: Path, size: int, ranks: Ranks) -> Iterator[Path]:
    """A directory to write into, `<out>.unfinished`, that becomes `out` when the block ends without an error. A collective.

    size: bytes that will be written, compared with the free space first. Rank 0 creates, removes and renames the directory.
    Raises UserError when `out` is not empty, another conversion writes there, a rank does not see rank 0's directory under that
    name, or the disk is full or not writable; the partial output is then removed. After `kill -9` the unfinished directory
    stays until the same conversion is started again. A non-empty `<out>.unfinished` that is not from a conversion is refused.
    """
    refuse_existing(out)
    partial = out.with_name(out.name + ".unfinished")
    lock = ranks.on_rank0(lambda: _prepare(out, partial, size))
    try:
        try:
            _refuse_unshared(partial, out, ranks)
            yield partial
            ranks.on_rank0(lambda: _finish(partial, out))
        except BaseException as error:
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            full = disk_full_behind(error)
            if full is not None:
                raise UserError(f"{out}: {no_room(full)}; make room or choose another --out") from error
            raise
    finally:
        if lock is not None:
            os.close(lock)


def _prepare(out: Path, partial: Path, size: int) -> int:
    """Create the unfinished directory; returns a file descriptor of the directory, which holds its lock."""
    lock = _lock(out, partial)
    try:
        _claim(out, partial)
        _empty(out, partial)
        free = shutil.disk_usage(partial).free
        if free < size + _SPARE_BYTES:
            shutil.rmtree(partial)
            raise UserError(
                f"--out {out} needs {(size + _SPARE_BYTES) / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; make room "
                "or choose another --out"
            )
    except BaseException:
        os.close(lock)
        raise
    return lock


def refuse_existing(out: Path) -> None:
    """Raise UserError unless `out` names a new or empty directory."""
    if not out.name or out.resolve().name != out.name:
        raise UserError(f"--out {out} must end in the name of a new directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} already exists and is not an empty directory; choose another one or remove it")


def _lock(out: Path, partial: Path) -> int:
    """Make and lock the unfinished directory; until it is locked another conversion may rename or remove it at any moment."""
    while True:
        refuse_existing(out)
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # also "no such file", for an impossible path such as one below /proc
            raise UserError(f"--out {out}: {partial} cannot be created ({error.strerror})") from error
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror})") from error
        if not try_lock(lock, partial):
            os.close(lock)
            raise UserError(f"another conversion is writing {partial}; wait for it or choose another --out")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(partial)):
                return lock
        os.close(lock)


def _claim(out: Path, partial: Path) -> None:
    """Write the marker file into the unfinished directory. A directory without it that is not empty is refused."""
    if not (partial / _OURS).exists() and any(partial.iterdir()):
        raise UserError(f"--out {out}: {partial} exists and was not left by a conversion; remove it or choose another --out")
    try:
        (partial / _OURS).touch()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror})") from error


def _empty(out: Path, partial: Path) -> None:
    """Remove what a killed conversion has left."""
    try:
        for leftover in set(partial.iterdir()) - {partial / _OURS}:
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    except OSError as error:  # the error has at most a file name relative to its directory
        raise UserError(
            f"--out {out}: what is left in {partial} cannot be removed ({error.strerror}); remove it or choose another --out"
        ) from error


def _refuse_unshared(partial: Path, out: Path, ranks: Ranks) -> None:
    """Raise UserError if a rank does not see rank 0's directory under this name. A collective.

    Such a rank would write its share elsewhere, and rank 0 would give the final name to its own part alone.
    """
    if ranks.world == 1:
        return
    marker, token = partial / _OURS, ranks.broadcast(secrets.token_hex(16))
    ranks.on_rank0(lambda: marker.write_text(token))

    def look() -> None:
        deadline = time.monotonic() + SEEN_S
        while not _holds(marker, token):
            if time.monotonic() > deadline:
                raise UserError(
                    f"--out {out} is not the same directory for rank {ranks.rank} as for rank 0; give the full path of a "
                    "directory on a file system that all processes share"
                )
            time.sleep(0.1)

    ranks.on_all_ranks(look)


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_text() == text
    except OSError:
        return False


def _finish(partial: Path, out: Path) -> None:
    for path in [*partial.rglob("*"), partial]:  # tensors, and the files copied beside them
        sync_to_disk(path)
    os.rename(partial, out)  # also onto an empty directory
    with suppress(OSError):  # the output is complete even if this fails
        (out / _OURS).unlink()
    sync_to_disk(out.parent)
