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

POLL_S = 0.2
"""Seconds between checks, on a rank that was asked to stop, whether another rank has given up the run."""

_CALLBACK_S = 10.0
"""Maximum wait of `wait_for_callback`."""


class StopRequest:
    """A callable: `request()` returns whether this rank was asked to stop."""

    def __init__(self) -> None:
        self._received = threading.Event()
        self._sources: list[Callable[[], bool]] = []
        self._on_stop: Callable[[], None] | None = None
        self._on_timeout: Callable[[], int | None] = lambda: None
        self._stop_handled = threading.Event()

    def __call__(self) -> bool:
        """True once a SIGTERM has arrived inside `on_sigterm`, or a callable passed to `add_source` returns True."""
        return self._received.is_set() or any(source() for source in self._sources)

    def add_source(self, source: Callable[[], bool]) -> None:
        """Also ask `source`, which returns whether a process without a rank (a server node) received SIGTERM."""
        self._sources.append(source)

    @property
    def received_sigterm(self) -> bool:
        """Whether this process itself received SIGTERM."""
        return self._received.is_set()

    def set_callbacks(self, on_stop: Callable[[], None], on_timeout: Callable[[], int | None]) -> None:
        """on_stop: called once after a SIGTERM, even if it has already arrived. on_timeout: called when the grace period is
        over; returns the exit code, None for 128 + SIGTERM. Both run in the watching thread, which cannot end the rank
        meanwhile."""
        self._on_stop, self._on_timeout = on_stop, on_timeout

    def wait_for_callback(self) -> None:
        """After a SIGTERM, wait until `on_stop` has returned."""
        if self._received.is_set() and self._on_stop is not None:
            self._stop_handled.wait(_CALLBACK_S)

    @contextmanager
    def on_sigterm(self, grace_s: float, given_up: Callable[[], int | None] = lambda: None) -> Iterator[StopRequest]:
        """Inside the block, SIGTERM sets the request. `grace_s` seconds later the process exits, with the code that
        `on_timeout` returns, or with 128 + SIGTERM. Must be entered in the main thread.

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
        self._received.set()
        end = time.monotonic() + grace_s
        self._handle_stop()
        while not finished.wait(POLL_S):
            self._handle_stop()
            code = given_up()
            if code is None and time.monotonic() >= end:
                code = self._timeout_exit_code()
            if code is not None:
                os._exit(code)

    def _handle_stop(self) -> None:
        if self._on_stop is not None and not self._stop_handled.is_set():
            try:
                self._on_stop()
            except Exception as error:  # this thread must go on to end the rank
                logger.warning("SIGTERM was not reported", exc_info=error)
            self._stop_handled.set()

    def _timeout_exit_code(self) -> int:
        try:
            return self._on_timeout() or 128 + signal.SIGTERM
        except Exception as error:
            logger.warning("the end of the grace was not reported", exc_info=error)
            return 128 + signal.SIGTERM
