"""SIGTERM asks a rank to stop at the next point where the run can be saved, within a grace period.

A scheduler that preempts a machine sends SIGTERM and, a while later, SIGKILL. Python runs signal handlers between its own
bytecode instructions, so a rank blocked inside a collective would not notice. But the C part of the handler writes to a socket
at once. A thread reads this socket, and ends the rank when the grace period is over, even if it is blocked.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

LOOK_S = 0.2
"""Seconds between checks, on a rank that was asked to stop, whether another rank has given up the run."""

_REPORT_S = 10.0
"""Most seconds that `wait_until_reported` waits."""


class StopRequest:
    """A callable: `request()` returns whether this rank was asked to stop."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._others: list[Callable[[], bool]] = []
        self._told: Callable[[], None] | None = None
        self._late: Callable[[], int | None] = lambda: None
        self._reported = threading.Event()

    def __call__(self) -> bool:
        """True once a SIGTERM has arrived inside `on_sigterm`, or a callable passed to `heed` returns True."""
        return self._asked.is_set() or any(other() for other in self._others)

    def heed(self, other: Callable[[], bool]) -> None:
        """Also call `other`, which returns whether a process without a rank (a server node) received SIGTERM."""
        self._others.append(other)

    @property
    def is_own(self) -> bool:
        """Whether this process itself received SIGTERM."""
        return self._asked.is_set()

    def report_to(self, told: Callable[[], None], late: Callable[[], int | None]) -> None:
        """told: called once after a SIGTERM, even if it has already arrived. late: called when the grace period is over;
        returns the exit code, None for 128 + SIGTERM. Both run in the watching thread, which cannot end the rank meanwhile."""
        self._told, self._late = told, late

    def wait_until_reported(self) -> None:
        """After a SIGTERM, wait until `told` has returned."""
        if self._asked.is_set() and self._told is not None:
            self._reported.wait(_REPORT_S)

    @contextmanager
    def on_sigterm(self, grace_s: float, given_up: Callable[[], int | None] = lambda: None) -> Iterator[StopRequest]:
        """Inside the block, SIGTERM sets the request. `grace_s` seconds later the process exits, with the code that `late` of
        `report_to` returns, or with 128 + SIGTERM. Must be entered in the main thread.

        grace_s: 0 leaves SIGTERM handling unchanged. given_up: called in a separate thread; returns an exit code if another
        rank has given up the run, after which torchrun sends SIGTERM too. The process then exits with this code without
        waiting. Further signals have no effect, because a scheduler and torchrun may both send one.
        """
        if grace_s <= 0:
            yield self
            return
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        finished = threading.Event()
        # The wakeup byte is the message. The handler itself does nothing, but without one SIGTERM would end the process. It is
        # set after the wakeup socket and removed before it, so that no signal is lost in between.
        wakeup_before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        watcher = threading.Thread(target=self._watch, args=(reading, finished, grace_s, given_up), name="sigterm", daemon=True)
        watcher.start()
        try:
            yield self
        finally:
            finished.set()
            signal.signal(signal.SIGTERM, before)
            signal.set_wakeup_fd(wakeup_before)
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
        self._report()
        while not finished.wait(LOOK_S):
            self._report()
            code = given_up()
            if code is None and time.monotonic() >= end:
                code = self._code_when_late()
            if code is not None:
                os._exit(code)

    def _report(self) -> None:
        if self._told is not None and not self._reported.is_set():
            try:
                self._told()
            except Exception as error:  # this thread must go on to end the rank
                logger.warning("SIGTERM was not reported", exc_info=error)
            self._reported.set()

    def _code_when_late(self) -> int:
        try:
            return self._late() or 128 + signal.SIGTERM
        except Exception as error:
            logger.warning("the end of the grace was not reported", exc_info=error)
            return 128 + signal.SIGTERM
