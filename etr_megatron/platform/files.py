"""Write files so that a full disk or a kill -9 does not leave them half-written, and report errors of disks and paths."""

from __future__ import annotations

import errno
import fnmatch
import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from etr_megatron.errors import UserError

_NO_ROOM = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would exceed the largest size allowed here (ulimit -f, or the file system)",
}
"""Messages for the error numbers of a full disk."""
_NOT_WRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ENOENT,  # creating a directory with its parents in /proc, or while a parent is being removed
)

_OF_PATHS = (*_NOT_WRITABLE, errno.ELOOP)
_MAX_NAME_CHARS = 200
_OTHER_FILES = 1024
"""Reserve for a rank's other open files: sockets of ranks and of the store, checkpoints, logs."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of a full or unwritable disk inside the block into a `UserError` that names `path`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise UserError(
                f"{path}: {no_room(error)}; make room and start the same command again to continue from the last checkpoint "
                "(or move the run to another disk and set run.dir)"
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise UserError(
                f"{path}: cannot be written ({os.strerror(error.errno)}); choose another run.dir or run.name"
            ) from error
        raise


@contextmanager
def path_errors() -> Iterator[None]:
    """Turn the system's errors about a user's path inside the block into a `UserError` that names the path.

    Covers paths that are not accessible, do not exist or are too long; other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in _OF_PATHS:
            raise
        name = os.fsdecode(error.filename)
        name = name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}..."
        raise UserError(f"{name}: {os.strerror(error.errno)}") from error


def problems_of(checks: Iterable[Callable[[], object]]) -> list[str]:
    """Messages of the UserErrors (including those of `path_errors`) that the checks raise, without duplicates."""
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


def allow_open_files(more: int) -> tuple[int, int]:
    """Raise this process's limit of open files so that it can open `more` files, as far as the hard limit allows.

    Returns the limit that is needed, and the part of it that the hard limit allows.
    """
    wanted = more + max(_OTHER_FILES, len(os.listdir("/dev/fd")) + _OTHER_FILES // 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return wanted, most


def entries(folder: Path, pattern: str) -> list[Path]:
    """Like `Path.glob`, but raises OSError for an unreadable folder, where `Path.glob` finds nothing."""
    return [path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, pattern)] if folder.is_dir() else []


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace the content of `path` by `data`: after a crash at any moment it has either the old or the new content.

    data: may be given in pieces, which then need not be in memory together.
    Raises `UserError` naming `path` if the disk is full; the old content then remains.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    with disk_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_to_disk(path.parent)


def disk_full_behind(error: BaseException | None) -> OSError | None:
    """The OSError of a full disk that is `error` or one of its causes, or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error
        error = error.__cause__ or error.__context__
    return None


def no_room(error: OSError) -> str:
    """The message for an error that `disk_full_behind` returned."""
    assert error.errno is not None
    return _NO_ROOM[error.errno]


def sync_to_disk(path: Path) -> None:
    """Make a file's content, or a directory's renames and new names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
