"""Decides how a run ended, and writes it to status.json."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from etr_megatron.checkpoint import latest_step
from etr_megatron.config import Config
from etr_megatron.errors import RequeueError, UserError
from etr_megatron.observe import RunDirectory
from etr_megatron.observe.run_directory import RunState
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.platform.preemption import StopRequest
from etr_megatron.platform.rank_liveness import RankLiveness
from etr_megatron.status import REQUEUE_EXIT, report_user_error

logger = logging.getLogger(__name__)

_AGAIN = "start again with the same command to continue"

_DETECTION_S = 2.0
"""Seconds to wait for a failed rank to end after its connections were closed."""


class RunTermination:
    """Decides on every rank whether the run ends as `requeue` or `failed`. Rank 0, or the first rank that is left, writes it.

    The message names the rank that was lost or failed first, if any: libraries that lose a connection name only a port.

    A job that was asked to stop while all ranks were alive ends as `requeue`, even if an error follows before it has stopped,
    because its last checkpoint can be resumed. torchrun also sends SIGTERM after a rank has failed; then not all ranks are
    alive.
    """

    def __init__(self, config: Config, directory: RunDirectory, liveness: RankLiveness, stop: StopRequest) -> None:
        self._config, self._directory, self._liveness, self._stop = config, directory, liveness, stop
        self._is_over, self._lock = False, threading.Lock()
        self._requeued: RequeueError | None = None
        self._trained: Callable[[], int] | None = None
        self._has_begun: Callable[[], bool] = lambda: False
        stop.set_callbacks(self._on_stop, self._on_timeout)

    @contextmanager
    def during_startup(self) -> Iterator[None]:
        """Turn a StopAskedError inside the block, and any error after SIGTERM, into a RequeueError. For the time before the
        first step; the trainer handles a later StopAskedError."""
        try:
            yield
        except StopAskedError as error:
            raise self._end_as_requeue(RequeueError(f"{error}: {_AGAIN}"), self._last_checkpoint()) from error
        except Exception as error:
            if self._is_over:
                raise
            self._report_failure(error)
            raise

    def run(self, train: Callable[[], None], trained: Callable[[], int], has_begun: Callable[[], bool]) -> None:
        """Call `train`, the loop over all steps, and write how it ended. trained: returns the last completed step. has_begun:
        returns whether this start has changed the run; a start that fails before leaves the status of a finished run as it is.

        Raises the error of `train`, or RequeueError for any error after SIGTERM.
        """
        self._trained, self._has_begun = trained, has_begun
        try:
            train()
        except RequeueError as error:
            self._end_as_requeue(error, self._last_step())
            raise
        except Exception as error:
            self._report_failure(error)
            failure = None if isinstance(error, UserError) else self._liveness.find_failure(_DETECTION_S)
            if failure is not None and str(error) and str(error) in failure:
                failure = None  # All ranks raise the same error, as for work of rank 0. The first report blames no rank.
            if failure is not None and self._liveness.is_reporter:
                logger.error("%s", failure)  # what follows on the terminal is the library's error on this rank
            after = "" if failure is None else f"{failure}; rank {self._liveness.rank} then failed: "
            self._end("failed", self._last_step(), f"{after}{error}")
            raise
        with self._lock:
            self._is_over = True
        if self._liveness.rank == 0:
            self._directory.write_status("finished", trained(), self._config.run.steps)

    def _on_stop(self) -> None:
        """SIGTERM has arrived. Called in StopRequest's thread, like `_on_timeout`."""
        failure = self._liveness.check_after_sigterm()
        if failure is None:
            return
        with self._lock:
            # Write it now: NCCL may wait for the lost rank, or end this process, without an error in Python.
            if self._trained is not None and not self._is_over:
                self._write("failed", self._last_step(), failure)

    def _on_timeout(self) -> int | None:
        """The grace period is over. Returns the exit code of a job that can be resumed, None for a job that has failed."""
        if not self._can_resume() or (self._is_over and self._requeued is None):
            return None
        error = TimeoutError(f"run.stop_grace_s={self._config.run.stop_grace_s:g} was too short to save")
        report_user_error(self._requeued or self._requeue_after(error))
        return REQUEUE_EXIT

    def _report_failure(self, error: Exception) -> None:
        """Record that this rank ends with the error. Raises RequeueError instead if the job was asked to stop before."""
        self._liveness.report_failure(_describe(error))
        if self._is_preempted():
            raise self._requeue_after(error) from error

    def _is_preempted(self) -> bool:
        if self._stop():
            self._stop.wait_for_callback()
            if not self._stop.received_sigterm and self._liveness.find_failure() is None:
                self._liveness.mark_stopped()  # a server node received SIGTERM
        return self._can_resume()

    def _can_resume(self) -> bool:
        return self._config.checkpoint.resume and self._liveness.is_stopped

    def _requeue_after(self, error: Exception) -> RequeueError:
        saved = self._last_checkpoint()
        words = f"told to stop (SIGTERM), and before it had: {error}; {_AGAIN} after step {saved}, the last that is saved"
        logger.warning("an error after SIGTERM, with which the run ends as `requeue`", exc_info=error)
        return self._end_as_requeue(RequeueError(words), saved)

    def _end_as_requeue(self, error: RequeueError, step: int) -> RequeueError:
        self._liveness.mark_stopped()  # ranks that end later must not report those that have ended as lost
        self._requeued = error
        self._end("requeue", step, str(error))
        return error

    def _last_checkpoint(self) -> int:
        return latest_step(self._directory.checkpoints) or 0

    def _last_step(self) -> int:
        """The last completed step, also after a refused resume."""
        return max(self._trained() if self._trained is not None else 0, self._last_checkpoint())

    def _end(self, state: RunState, step: int, message: str) -> None:
        with self._lock:
            self._is_over = True
            self._write(state, step, message)

    def _write(self, state: RunState, step: int, message: str) -> None:
        """Write the status. Errors are ignored: on a full disk it may not fit, and they must not hide the run's own error."""
        if self._liveness.is_reporter:
            with suppress(UserError):
                if state == "failed" and not self._has_begun() and self._directory.read_state() == "finished":
                    return  # still true: this start has changed nothing
                self._directory.write_status(state, step, self._config.run.steps, message)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
