"""No process outlives the one that started it, however that one ends (kill -9 included). Stdlib only.

Ranks and graders call `die_with_parent()` first thing. On Linux the kernel does it: PR_SET_PDEATHSIG sends SIGKILL when
the parent is gone. "Parent" there means the *thread* that forked: a child started by a thread that later ends would be
killed while its process lives on. Whoever starts children from short-lived threads starts them through
`popen_from_lasting_thread`.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

_PR_SET_PDEATHSIG = 1
_WATCHDOG_PERIOD_S = 0.5


def die_with_parent(parent_pid: int | None = None) -> None:
    """From here on this process is killed (SIGKILL) when its parent ends; at once if the parent is gone already.

    parent_pid: pid of the process that started this one, where it is known (a grader is told it). Without it a parent
        that ended before this call goes unnoticed, as the pid of whoever adopted this process looks like any other.
    Where there is no PR_SET_PDEATHSIG (anything but Linux) a daemon thread looks for the parent twice a second; it
    cannot run while other code holds the GIL. Raises OSError if the kernel refuses.
    """
    expected = os.getppid() if parent_pid is None else parent_pid
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"prctl(PR_SET_PDEATHSIG): {os.strerror(errno)}")
    else:
        threading.Thread(target=_watch_parent, args=(expected,), name="parent-watchdog", daemon=True).start()
    # The parent may have ended before the request was in place; then no signal will come.
    if os.getppid() != expected:
        _end_now()


def _watch_parent(expected: int) -> None:
    while os.getppid() == expected:
        time.sleep(_WATCHDOG_PERIOD_S)
    _end_now()


def _end_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _LastingThread:
    """One daemon thread that forks for the whole process, so that the children's parent thread lives as long as it."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[tuple[Future[subprocess.Popen[bytes]], Sequence[str], dict[str, Any]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._serve, name="process-starter", daemon=True).start()

    def popen(self, args: Sequence[str], kwargs: dict[str, Any]) -> subprocess.Popen[bytes]:
        future: Future[subprocess.Popen[bytes]] = Future()
        self._requests.put((future, args, kwargs))
        return future.result()

    def _serve(self) -> None:
        while True:
            future, args, kwargs = self._requests.get()
            try:
                future.set_result(subprocess.Popen(args, **kwargs))
            except Exception as error:  # belongs to the caller, who is waiting for it
                future.set_exception(error)


_starter: _LastingThread | None = None
_starter_pid = -1
_starter_lock = threading.Lock()


def popen_from_lasting_thread(args: Sequence[str], **kwargs: Any) -> subprocess.Popen[bytes]:
    """`subprocess.Popen(args, **kwargs)`, forked by a thread that lives as long as this process.

    For children that call `die_with_parent()`: started from any other thread they would die with that thread.
    Raises what Popen raises.
    """
    global _starter, _starter_pid
    with _starter_lock:
        if _starter is None or _starter_pid != os.getpid():  # threads do not survive a fork
            _starter, _starter_pid = _LastingThread(), os.getpid()
        starter = _starter
    return starter.popen(args, kwargs)
