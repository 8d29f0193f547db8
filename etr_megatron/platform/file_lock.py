"""Locks between processes that the kernel frees when their holder ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Error numbers of a file system that has no locks, such as Lustre mounted without `flock`."""


def try_lock(descriptor: int, path: Path) -> bool:
    """Lock an open file or directory, until the last copy of its descriptor is closed; False where another process has it.

    path: of what is locked, for the warning where the file system has no locks: then it counts as locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        text = "%s: its file system has no locks (%s), so that nothing keeps a second process from working there"
        logger.warning(text, path, error.strerror)
    return True
