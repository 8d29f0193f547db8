"""Locks between processes. The kernel releases a lock when its holder ends, even after a kill -9."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Error numbers of a file system without locks, such as Lustre mounted without `flock`."""


def try_lock(descriptor: int, path: Path) -> bool:
    """Lock an open file or directory until the last copy of its descriptor is closed; False if another process holds it.

    path: of the locked file, for a warning if the file system has no locks; then this returns True without a lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        text = "%s: its file system has no locks (%s), so nothing prevents a second process from working there"
        logger.warning(text, path, error.strerror)
    return True
