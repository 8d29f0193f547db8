"""Save a run's checkpoints, with `checkpoint.asynchronous` in a thread while the run goes on.

The thread writes a snapshot in host memory. Its collectives have a group of their own, so they never mix with the run's. A
checkpoint gets its name only when all ranks have written it, as in a save that stops the run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etr_megatron.checkpoint.checkpoint import PreparedCheckpoint, prepare, save
from etr_megatron.config import Config
from etr_megatron.errors import UserError
from etr_megatron.platform.files import disk_full_behind, no_room
from etr_megatron.platform.phases import PhaseBarriers
from etr_megatron.policy import Policy

logger = logging.getLogger(__name__)

MIN_CLOSE_S = 60.0
"""Seconds that a save may take at least after the run has failed."""

OTHERS_S = 10.0
"""Seconds in which the failure of a save on one rank reaches the others' threads. One that waits longer for its disk hangs."""

_COMPLETE, _RUNNING, _FAILED = range(3)  # the highest of all ranks tells what to do


class Saver:
    """All methods but `times` and `close` are collectives.

        saver.save(folder, step, policy, state, best)   # returns after the snapshot
        saver.check()                                   # at every barrier of the run: raises the error of that save
        saver.finish()                                  # returns when the checkpoint is complete

    At most one save is pending. Errors are those of `checkpoint.save`, or TimeoutError and ConnectionError, which name a rank
    that has not written. `check` raises on all ranks if a save has failed on one.
    """

    def __init__(self, config: Config, phases: PhaseBarriers) -> None:
        """phases: of the run's main threads."""
        self._keep, self._phases = config.checkpoint.keep, phases
        # A thread cannot share a group with the main thread: they would take each other's messages.
        self._writers = PhaseBarriers(config.run.phase_timeout_s) if config.checkpoint.asynchronous else None
        self._pending: _Pending | None = None
        self._times: dict[str, float] = {}

    def save(self, folder: Path, step: int, policy: Policy, state: dict[str, Any], best: Collection[int]) -> None:
        """Save as `checkpoint.save`. With `checkpoint.asynchronous`, wait for the save before, take the snapshot and return."""
        self.finish()
        with self._stops():
            if self._writers is None:
                save(folder, step, policy, state, keep=self._keep, best=best)
            else:
                self._pending = _Pending(prepare(folder, step, policy, state, keep=self._keep, best=best), self._writers)

    def check(self) -> None:
        """Raise the error of the pending save if it has failed on any rank. Does not wait for it otherwise."""
        if self._pending is None:
            return
        state = self._phases.all_reduce_max(self._pending.state)
        if state == _RUNNING:
            return
        if state == _FAILED and not self._pending.done.wait(OTHERS_S):
            self._pending = None  # this rank's disk hangs, and so would `close`
        else:
            self._end_of_pending()
        if state == _FAILED:
            raise RuntimeError("a rank has not completed the checkpoint, see the other ranks' errors")

    def finish(self, *, only_warn: bool = False) -> None:
        """Wait for the pending save, if there is one. only_warn: if it could not be written, log that instead of raising it."""
        if self._pending is None:
            return
        with self._stops():
            self._pending.done.wait()
        try:
            self._end_of_pending()
        except (UserError, RuntimeError) as error:  # not those that name a lost rank
            if not only_warn:
                raise
            logger.warning("%s", error)

    def close(self) -> None:
        """Wait for the pending save after an error that ends the run. As another rank may be lost, wait at most as long again
        as the save has taken, or `MIN_CLOSE_S`. Its own error is only logged."""
        if self._pending is None:
            return
        try:
            if not self._pending.done.wait(max(MIN_CLOSE_S, self._pending.age)):
                raise TimeoutError("not all ranks have written it in time")
            self._end_of_pending()
        except Exception as error:
            logger.warning("the last checkpoint is not complete: %s", error)

    def _end_of_pending(self) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        self._times["time_checkpoint_write"] = pending.result()

    def times(self) -> dict[str, float]:
        """Seconds since the last call, as metrics."""
        times, self._times = self._times, {}
        return times

    @contextmanager
    def _stops(self) -> Iterator[None]:
        """The run stops while the block runs."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._times["time_checkpoint"] = self._times.get("time_checkpoint", 0.0) + time.perf_counter() - start


class _Pending:
    """A checkpoint that a thread writes. writers: of the threads of all ranks. done: set when it is complete or has failed.

    The thread is a daemon: it ends with the process, even if a disk hangs.
    """

    def __init__(self, prepared: PreparedCheckpoint, writers: PhaseBarriers) -> None:
        self.done = threading.Event()
        self._error: BaseException | None = None
        self._begun, self._seconds = time.perf_counter(), 0.0
        what = f"writing of the checkpoint of step {prepared.step}"

        def barrier() -> None:
            try:
                writers.barrier(what)
            except Exception as error:
                full = disk_full_behind(error)  # of this rank, before the barrier
                both = type(error)(f"{error}; besides, {prepared.checkpoints}: {no_room(full)}") if full else error
                self._end(both)  # torch's next collective would first wait once more for the missing rank
                raise

        def write() -> None:
            try:
                prepared.write(writers.group, barrier)
            except BaseException as error:  # raised by `result`, in the thread that can handle it
                self._end(error)
            else:
                self._end(None)

        threading.Thread(target=write, name=what, daemon=True).start()

    def _end(self, error: BaseException | None) -> None:
        if not self.done.is_set():  # the first error is the cause
            self._error, self._seconds = error, self.age
            self.done.set()

    @property
    def age(self) -> float:
        """Seconds since the snapshot was complete."""
        return time.perf_counter() - self._begun

    @property
    def state(self) -> int:
        """`_COMPLETE`, `_RUNNING` or `_FAILED`."""
        if not self.done.is_set():
            return _RUNNING
        return _COMPLETE if self._error is None else _FAILED

    def result(self) -> float:
        """Wait until it is done. Returns the seconds that the write took, or raises the error of the thread."""
        self.done.wait()
        if self._error is not None:
            raise self._error
        return self._seconds
