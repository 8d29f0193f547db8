"""Writing files that a full disk or a kill -9 must not leave half-written."""

from __future__ import annotations

import errno
import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from etr_megatron.errors import UserError

_NO_ROOM = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would become larger than is allowed here (ulimit -f, or the file system)",
}
"""What the system says where a disk takes no more, in words."""
_NOT_WRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ENOENT,  # of a directory that is made with its parents: in /proc, or where one of them is being removed
)

_OF_PATHS = (*_NOT_WRITABLE, errno.ELOOP)
_LONGEST_NAME = 200


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk met inside the block into a `UserError` that names `path`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise UserError(
                f"{path}: {no_room(error)}; make room (or set run.dir to another disk) and start the same command again, it "
                "continues from the last checkpoint"
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise UserError(
                f"{path}: cannot be written ({os.strerror(error.errno)}); choose another run.dir or run.name"
            ) from error
        raise


@contextmanager
def path_errors() -> Iterator[None]:
    """Turn what the system says of a path that was given, met inside the block, into a `UserError` that names the path.

    Of a path that may not be entered or read, leads nowhere or is too long; other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in _OF_PATHS:
            raise
        name = os.fsdecode(error.filename)
        name = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
        raise UserError(f"{name}: {os.strerror(error.errno)}") from error


def problems_of(checks: Iterable[Callable[[], object]]) -> list[str]:
    """What the checks raise as UserError, or of paths (see `path_errors`), each once: two may share a problem."""
    problems: list[str] = []
    for check in checks:
        try:
            with path_errors():
                check()
        except UserError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def refuse_all(*checks: Callable[[], object]) -> None:
    """Raise one UserError with every problem found."""
    if problems := problems_of(checks):
        raise UserError("\n".join(problems))


def entries(folder: Path, pattern: str) -> list[Path]:
    """As `Path.glob`, which finds nothing in a folder that may not be looked into: there OSError is raised."""
    return [path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, pattern)] if folder.is_dir() else []


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: after a crash at any moment it holds either the old or the new content, on disk.

    Raises `UserError` naming `path` when the disk is full; the old content is then still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_to_disk(path.parent)


def disk_full_behind(error: BaseException | None) -> OSError | None:
    """The OSError of a disk that takes no more which `error` is or was caused by."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error
        error = error.__cause__ or error.__context__
    return None


def no_room(error: OSError) -> str:
    """What such an error says, in words."""
    assert error.errno is not None
    return _NO_ROOM[error.errno]


def sync_to_disk(path: Path) -> None:
    """Make a file's content, or a directory's renames and new names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
