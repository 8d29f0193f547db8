"""A pool of killable processes that call a user's function: limits the time per call, replaces stuck and crashed workers."""

from __future__ import annotations

import errno
import json
import logging
import selectors
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal, Self

from etr_megatron.config import EnvironmentConfig, RewardConfig
from etr_megatron.errors import UserError
from etr_megatron.platform.files import allow_open_files
from etr_megatron.platform.worker_process import Job, WorkerProcess, close_all, kill_all

STARTUP_TIMEOUT_S = 300.0
"""Deadline for a worker to report ready (a user's module may load a model first)."""
MAX_CRASHES = 2
"""A request that crashes this many workers is an error; a single crash may have another cause, such as memory."""

_GRACE_S = 10.0
"""Seconds after a call's time limit in which a concurrent worker must report that the call was late, or send anything else. If
it does not, its event loop counts as blocked."""

logger = logging.getLogger(__name__)

_PIPES = 2
"""Open files per worker."""


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request without a reply. how: for "timeout", what was done about it; for "crash" (of `MAX_CRASHES` workers), how the
    last worker ended."""

    why: Literal["timeout", "crash"]
    how: str


class WorkerPool:
    """Worker processes and their requests. The workers die with this process, even after a kill -9.

    Not thread-safe, but may be used from different threads one after the other: all work is done in the method calls, without
    threads or signals. Raises UserError if a worker cannot be started, or cannot load the user's function.
    """

    def __init__(
        self, module: str, section: str, config: RewardConfig | EnvironmentConfig, *, worker: str, ahead: int = 1
    ) -> None:
        """Start `config.workers` processes and wait until they are ready.

        module: the module that they run, which calls `worker_main.serve`. section: the config's name, for messages.
        worker: name of a worker in messages, with its article.
        ahead: most requests in flight at a worker that answers one after the other; more than one hides the pipe's latency. A
            concurrent worker may have `config.concurrency`.
        """
        self._module, self._section, self._config = module, section, config
        self._worker, self._ahead = worker, ahead
        self.closed = False
        self._selector = selectors.DefaultSelector()
        self.workers: list[WorkerProcess] = []
        self._pending: deque[Job] = deque()
        self._suspects: deque[Job] = deque()  # may have crashed a worker; each goes to an idle worker, alone
        self._outcomes: list[tuple[int, dict[str, Any] | FailedRequest]] = []
        self.under_way = 0
        allow_open_files(_PIPES * config.workers)
        try:
            self._fill()
            while not all(worker.ready for worker in self.workers):
                self._step(time.monotonic() + STARTUP_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def submit(self, requests: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Queue requests, and send as many as possible without waiting. A key must differ from those of pending requests."""
        jobs = [Job(key, json.dumps({"key": key, "request": request}).encode() + b"\n") for key, request in requests]
        self._pending.extend(jobs)
        self.under_way += len(jobs)
        self._fill()
        self._feed()

    def poll(self, timeout_s: float) -> list[tuple[int, dict[str, Any] | FailedRequest]]:
        """The outcomes since the last call, in the order of their arrival: (key, reply or why there is none).

        Waits up to `timeout_s` for the first outcome, unless no request is pending.
        """
        end = time.monotonic() + timeout_s
        is_first = True
        while self.under_way and not self._outcomes and (is_first or time.monotonic() < end):
            self._step(end)
            is_first = False
        self._feed()
        outcomes, self._outcomes = self._outcomes, []
        self.under_way -= len(outcomes)
        return outcomes

    def close(self) -> None:
        """End all workers and wait for them. Idempotent."""
        self.closed = True
        self._selector.close()
        workers, self.workers = self.workers, []
        close_all(workers)

    def _fill(self) -> None:
        while len(self.workers) < self._config.workers:
            try:
                worker = WorkerProcess(self._module, json.dumps(asdict(self._config)))
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                raise UserError(
                    f"{self._section}.workers={self._config.workers}: so many processes need more open files than the system "
                    f"allows; raise `ulimit -Hn` or lower {self._section}.workers"
                ) from error
            self.workers.append(worker)
            self._selector.register(worker.read_fd, selectors.EVENT_READ, worker)

    def _drop(self, workers: list[WorkerProcess]) -> list[str]:
        """Kill workers; returns how each ended."""
        for worker in workers:
            self.workers.remove(worker)
            self._selector.unregister(worker.read_fd)
        return kill_all(workers)

    def _step(self, end: float) -> None:
        """Serve the workers once: wait for one of them until `end` or the next deadline."""
        self._feed()
        # Taken before reading, so that a reply which is in the pipe at its deadline counts as in time.
        now = time.monotonic()
        for worker in self._wait(now, end):
            self._receive(worker)
        self._enforce_deadlines(now)

    def _feed(self) -> None:
        """Send requests to ready workers. Sends fewer ahead when few are pending, so that all workers finish together."""
        ready = [worker for worker in self.workers if worker.ready]
        while self._suspects and (idle := next((worker for worker in ready if not worker.inflight), None)):
            idle.send(self._suspects.popleft())
        # If suspects are left, the worker that will be idle first gets no new requests, so that it can take the next suspect.
        kept = min(ready, key=_load, default=None) if self._suspects else None
        while self._pending:
            ahead = max(1, min(self._ahead, len(self._pending) // (2 * self._config.workers)))
            free = [worker for worker in ready if worker is not kept and _load(worker) < self._room(worker, ahead)]
            if not free:
                return
            min(free, key=_load).send(self._pending.popleft())

    def _room(self, worker: WorkerProcess, ahead: int) -> int:
        """Most requests that a worker may have in flight."""
        if not worker.concurrent:
            return ahead
        first = next(iter(worker.inflight.values()), None)
        return 1 if first is not None and first.crashes else self._config.concurrency

    def _wait(self, now: float, end: float) -> list[WorkerProcess]:
        """Write queued requests and return workers with something to read, waiting at most until `end` or a deadline."""
        deadlines = [self._deadline(worker) for worker in self.workers]
        timeout = min([end, *(d for d in deadlines if d is not None)]) - now
        writing = [worker for worker in self.workers if worker.wants_to_write]
        for worker in writing:
            self._selector.register(worker.write_fd, selectors.EVENT_WRITE, worker)
        try:
            found = self._selector.select(max(0.0, timeout))
        finally:
            for worker in writing:
                self._selector.unregister(worker.write_fd)
        for key, events in found:
            if events & selectors.EVENT_WRITE:
                key.data.flush()
        return [key.data for key, events in found if events & selectors.EVENT_READ]

    def _deadline(self, worker: WorkerProcess) -> float | None:
        if not worker.ready:
            return worker.started + STARTUP_TIMEOUT_S
        if worker.concurrent and worker.inflight:
            oldest = next(iter(worker.inflight.values()))
            return max(oldest.sent + self._config.timeout_s, worker.heard) + _GRACE_S
        return None if worker.head_since is None else worker.head_since + self._config.timeout_s

    def _receive(self, worker: WorkerProcess) -> None:
        messages, ended = worker.receive()
        for message in messages:
            if worker.ready:
                worker.finish(message["key"])
                outcome = FailedRequest("timeout", "the call was cancelled") if "late" in message else message["reply"]
                self._outcomes.append((message["key"], outcome))
            elif "ready" in message:
                worker.ready, worker.concurrent = True, message["concurrent"]
            else:
                raise self._load_error(message["fatal"])
        if ended:
            self._replace_crashed(worker)

    def _replace_crashed(self, worker: WorkerProcess) -> None:
        jobs, (how,) = list(worker.inflight.values()), self._drop([worker])
        if not worker.ready:
            raise self._load_error(f"{self._worker} ended while starting ({how}); see its own output")
        failure = FailedRequest("crash", how)
        if worker.concurrent:
            self._retry_alone(jobs, failure, f"ended ({how})")
            return
        self._requeue([*self._count_crash(jobs[:1], failure), *jobs[1:]])

    def _count_crash(self, jobs: list[Job], failure: FailedRequest) -> list[Job]:
        """Add a crash to each of these requests. Those with `MAX_CRASHES` fail; returns the others."""
        for job in jobs:
            job.crashes += 1
        self._outcomes += [(job.key, failure) for job in jobs if job.crashes >= MAX_CRASHES]
        return [job for job in jobs if job.crashes < MAX_CRASHES]

    def _retry_alone(self, jobs: list[Job], failure: FailedRequest, what: str) -> None:
        """Repeat the requests of a lost concurrent worker, each alone at a worker, as it is not known which one is to blame.
        Requests with `MAX_CRASHES` fail instead."""
        self._suspects += self._count_crash(jobs, failure)
        if len(jobs) > 1:
            logger.warning(
                "%s.function: %s %s with %d calls, which are made again, one at a time",
                *(self._section, self._worker, what, len(jobs)),
            )
        self._fill()

    def _enforce_deadlines(self, now: float) -> None:
        late = [worker for worker in self.workers if (deadline := self._deadline(worker)) is not None and deadline <= now]
        if not all(worker.ready for worker in late):
            raise self._load_error(f"{self._worker} was not ready after {STARTUP_TIMEOUT_S:.0f} s")
        self._drop(late)
        for worker in late:
            jobs = list(worker.inflight.values())
            if worker.concurrent:
                failure = FailedRequest("timeout", "the call blocked its event loop, so the process was killed")
                self._retry_alone(jobs, failure, "was killed, as its event loop was blocked,")
            else:
                self._outcomes.append((jobs[0].key, FailedRequest("timeout", "the process was killed")))
                self._requeue(jobs[1:])

    def _requeue(self, jobs: list[Job]) -> None:
        """Put the jobs that a lost worker had not begun back at the front of the queue, and replace the worker."""
        self._pending.extendleft(reversed(jobs))
        self._fill()

    def _load_error(self, why: str) -> UserError:
        return UserError(f'{self._section}.function = "{self._config.function}" cannot be used: {why}')


def _load(worker: WorkerProcess) -> int:
    return len(worker.inflight)


class FunctionPool:
    """Base class of pools for one kind of user function. The `WorkerPool` is closed at the end of the `with` block."""

    _pool: WorkerPool

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the current workers."""
        return [worker.pid for worker in self._pool.workers]

    def close(self) -> None:
        """End all workers and wait for them. Idempotent."""
        self._pool.close()
