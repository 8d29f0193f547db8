"""Ensure that no process outlives its parent, even after a kill -9 of the parent. Stdlib only.

Ranks and the workers of a `WorkerPool` call `die_with_parent()` at startup. On Linux the kernel does the work: PR_SET_PDEATHSIG
sends SIGKILL when the parent is gone. "Parent" there means the *thread* that forked: a child of a thread that ends is killed
although the process lives on. So children must not be started from short-lived threads, except through
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
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

_PR_SET_PDEATHSIG = 1
_WATCHDOG_PERIOD_S = 0.5


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have this process killed (SIGKILL) when its parent ends; at once if the parent is already gone.

    parent_pid: pid of the process that started this one, if known (a worker gets it as an argument). Without it, a parent that
        ended before this call goes unnoticed, because this process then has another valid parent pid.
    Without PR_SET_PDEATHSIG (on any system but Linux) a daemon thread checks for the parent twice a second; it cannot run
    while other code holds the GIL. Raises OSError if the kernel refuses.
    """
    expected = os.getppid() if parent_pid is None else parent_pid
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"prctl(PR_SET_PDEATHSIG): {os.strerror(errno)}")
    else:
        threading.Thread(target=_watch_parent, args=(expected,), name="parent-watchdog", daemon=True).start()
    # If the parent ended before the call above, no signal will come.
    if os.getppid() != expected:
        _end_now()


def _watch_parent(expected: int) -> None:
    while os.getppid() == expected:
        time.sleep(_WATCHDOG_PERIOD_S)
    _end_now()


def _end_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_trees(pids: Iterable[int]) -> None:
    """SIGKILL these descendants of this process, which must not have been waited for, and on Linux their own descendants.

    A process whose parent has ended is not found.
    """
    tree = set(pids)
    new = tree
    while new:
        for one in new:
            _signal(one, signal.SIGSTOP)  # so that it starts no more processes during the search
        new = _descendants(tree) - tree
        tree = tree | new
    for one in tree:
        _signal(one, signal.SIGKILL)


def kill_descendants() -> None:
    """SIGKILL all descendants of this process, see `kill_trees`."""
    kill_trees(_descendants([os.getpid()]))


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # it has ended, or is another user's
        os.kill(pid, number)


def _descendants(pids: Iterable[int]) -> set[int]:
    """All descendants of `pids`. Empty on systems without Linux's /proc."""
    children: dict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if name.isdecimal():
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                children[int(file.read().rpartition(b")")[2].split()[1])].append(int(name))
    found = [child for pid in pids for child in children[pid]]
    for one in found:  # the list grows in the loop
        found += children.pop(one, [])
    return set(found)


class _LastingThread:
    """A daemon thread that forks for the whole process, so that the children's parent thread lives as long as the process."""

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
            except Exception as error:  # raised in the caller, which waits for the future
                future.set_exception(error)


_starter: _LastingThread | None = None
_starter_pid = -1
_starter_lock = threading.Lock()


def popen_from_lasting_thread(args: Sequence[str], **kwargs: Any) -> subprocess.Popen[bytes]:
    """`subprocess.Popen(args, **kwargs)`, forked by a thread that lives as long as this process.

    For children that call `die_with_parent()`: started from another thread, they would die with that thread.
    Raises what Popen raises.
    """
    global _starter, _starter_pid
    with _starter_lock:
        if _starter is None or _starter_pid != os.getpid():  # threads do not survive a fork
            _starter, _starter_pid = _LastingThread(), os.getpid()
        starter = _starter
    return starter.popen(args, kwargs)
