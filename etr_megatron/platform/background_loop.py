"""Work that a background thread repeats until it is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class BackgroundLoop:
    """Repeats `work` between `start` and `stop`, until it returns False or raises."""

    def __init__(self, work: Callable[[], bool], name: str) -> None:
        self._work, self._name = work, name
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self) -> None:
        """Start the thread. Does nothing if it has been started, or if an error waits to be raised by `stop`."""
        if self._thread is None and self._error is None:
            self._done.clear()
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Wait for the call of `work` in progress, and end the thread. Raises, once, the error that `work` has raised."""
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Suspend the work while the block runs. An error of `work` is kept until `stop`."""
        was_on = self._thread is not None
        try:
            self.stop()
        except Exception as error:
            self._error = error
        yield
        if was_on:
            self.start()

    def _run(self) -> None:
        try:
            while not self._done.is_set() and self._work():
                pass
        except Exception as error:  # raised by `stop`, in the thread that can handle it
            self._error = error
