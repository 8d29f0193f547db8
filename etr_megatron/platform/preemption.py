"""SIGTERM asks a rank to stop at the next point where the run can be saved, within a time of grace.

A scheduler that takes a machine back sends SIGTERM and, a while later, SIGKILL. Python runs a signal handler between two of its
own instructions, so a rank that waits inside a collective would notice nothing; the C part of the handler writes to a socket
at once, and a thread that reads it ends the rank when the grace is over, whatever it waits for.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_S = 0.2
"""How often a rank that was told to stop looks whether another has given the run up."""


class StopRequest:
    """Whether this rank was told to stop: `request()`."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._others: list[Callable[[], bool]] = []

    def __call__(self) -> bool:
        """True once a SIGTERM has arrived within `on_sigterm`, or somebody says so who is to be heeded."""
        return self._asked.is_set() or any(other() for other in self._others)

    def heed(self, other: Callable[[], bool]) -> None:
        """`other` says whether a process was sent SIGTERM that has no rank."""
        self._others.append(other)

    @contextmanager
    def on_sigterm(self, grace_s: float, given_up: Callable[[], int | None] = lambda: None) -> Iterator[StopRequest]:
        """Within, SIGTERM sets the request, and `grace_s` seconds later ends the process with exit code 128 + SIGTERM.

        grace_s: 0 leaves SIGTERM as it is. given_up: the exit code of a run that another rank has given up, after which
        torchrun sends SIGTERM as well: the process ends with it, grace or not, as there is nothing to wait for. Asked in a
        thread of its own. To be entered in the main thread. More signals change nothing: a scheduler and torchrun may both
        send one.
        """
        if grace_s <= 0:
            yield self
            return
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        finished = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # the wake-up byte is the message
        wakeup_before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reading, finished, grace_s, given_up), name="sigterm", daemon=True)
        watcher.start()
        try:
            yield self
        finally:
            finished.set()
            signal.set_wakeup_fd(wakeup_before)
            signal.signal(signal.SIGTERM, before)
            writing.close()
            watcher.join()
            reading.close()

    def _watch(
        self, reading: socket.socket, finished: threading.Event, grace_s: float, given_up: Callable[[], int | None]
    ) -> None:
        while received := reading.recv(64):
            if signal.SIGTERM in received:
                break
        else:
            return
        self._asked.set()
        end = time.monotonic() + grace_s
        while not finished.wait(min(LOOK_S, max(0.0, end - time.monotonic()))):
            code = 128 + signal.SIGTERM if time.monotonic() >= end else given_up()
            if code is not None:
                os._exit(code)
