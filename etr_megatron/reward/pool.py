"""A pool of grader processes: keeps order, limits wall-clock time per answer, replaces stuck and crashed graders."""

from __future__ import annotations

import selectors
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from etr_megatron.config import RewardConfig
from etr_megatron.errors import UserError
from etr_megatron.reward.grade import Grade, GradeRequest
from etr_megatron.reward.process import GraderProcess, Job, close_all, encode

STARTUP_TIMEOUT_S = 300.0
"""Deadline for a grader to report ready (a user's module may load a model first)."""
MAX_INFLIGHT = 32
"""Requests sent ahead to one worker, to hide the pipe's latency."""
MAX_CRASHES = 2
"""An answer that crashes this many workers is an error; a single crash may have another cause, such as memory."""


class GraderPool:
    """Grades responses in worker processes.

        with GraderPool(config.reward) as pool:
            grades = pool.grade([GradeRequest(prompt, response, answer), ...])

    Works from any thread (it uses no signals); concurrent calls of `grade` take turns. Workers die with this process,
    however it ends.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Start `config.workers` processes and wait until they are ready.

        Raises UserError if `config.function` cannot be loaded.
        """
        self._config = config
        self._lock = threading.Lock()
        self._closed = False
        self._workers: list[GraderProcess] = []
        try:
            self._fill()
            _Round(self, []).run(until_ready=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the current workers."""
        return [worker.pid for worker in self._workers]

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """One grade per request, in the order of the requests.

        An answer that takes longer than `timeout_s` has its worker killed and replaced and gets `range_min` with
        status "timeout"; one that crashes two workers gets `range_min` with status "error".
        Raises UserError if a replacement cannot load `reward.function`, RuntimeError after `close`.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("this GraderPool is closed")
            self._fill()
            try:
                return _Round(self, requests).run()
            except BaseException:
                # Replies still in flight belong to this call; a later call must not take them for its own.
                for worker in [w for w in self._workers if w.inflight]:
                    self._drop(worker)
                raise

    def close(self) -> None:
        """End all workers and wait for them, after the round in progress if another thread grades. Idempotent."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, []
            close_all(workers)

    def _fill(self) -> None:
        while len(self._workers) < self._config.workers:
            self._workers.append(GraderProcess(self._config))

    def _drop(self, worker: GraderProcess) -> str:
        self._workers.remove(worker)
        return worker.kill()


class _Round:
    """One call of `grade`: pending requests and received grades."""

    def __init__(self, pool: GraderPool, requests: Sequence[GradeRequest]) -> None:
        self._pool = pool
        self._config = pool._config
        self._pending = deque(Job(index, encode(request)) for index, request in enumerate(requests))
        self._grades: list[Grade | None] = [None] * len(requests)
        self._missing = len(requests)

    def run(self, *, until_ready: bool = False) -> list[Grade]:
        """Serve the workers until every request has its grade (and, if asked, every worker is ready)."""
        workers = self._pool._workers
        while self._missing or (until_ready and not all(worker.ready for worker in workers)):
            for worker in workers:
                self._feed(worker)
            # From before reading: a reply that is in the pipe at its deadline is in time, however late it is read.
            now = time.monotonic()
            for worker in self._wait(now):
                self._receive(worker)
            self._enforce_deadlines(now)
        return [grade for grade in self._grades if grade is not None]

    def _feed(self, worker: GraderProcess) -> None:
        """Keep a ready worker busy; sends fewer requests ahead towards the end, so that all workers finish together."""
        if not worker.ready:
            return
        share = len(self._pending) // (2 * self._config.workers)
        ahead = max(1, min(MAX_INFLIGHT, share))
        while self._pending and len(worker.inflight) < ahead:
            worker.send(self._pending.popleft())

    def _wait(self, now: float) -> list[GraderProcess]:
        """Write queued requests and return workers with something to read, waiting at most until the next deadline."""
        workers = self._pool._workers
        deadlines = [self._deadline(worker) for worker in workers]
        timeout = min((d for d in deadlines if d is not None), default=now + 1.0) - now
        readable: list[GraderProcess] = []
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.read_fd, selectors.EVENT_READ, worker)
                if worker.wants_to_write:
                    selector.register(worker.write_fd, selectors.EVENT_WRITE, worker)
            for key, events in selector.select(timeout):
                if events & selectors.EVENT_READ:
                    readable.append(key.data)
                else:
                    key.data.flush()
        return readable

    def _deadline(self, worker: GraderProcess) -> float | None:
        if not worker.ready:
            return worker.started + STARTUP_TIMEOUT_S
        return None if worker.head_since is None else worker.head_since + self._config.timeout_s

    def _receive(self, worker: GraderProcess) -> None:
        messages, ended = worker.receive()
        for message in messages:
            if "ready" in message:
                worker.ready = True
            elif "fatal" in message:
                raise self._load_error(message["fatal"])
            else:
                self._settle(worker.finish_head(), Grade(**message))
        if ended:
            self._replace_crashed(worker)

    def _settle(self, job: Job, grade: Grade) -> None:
        self._grades[job.index] = grade
        self._missing -= 1

    def _replace_crashed(self, worker: GraderProcess) -> None:
        jobs, how = list(worker.inflight), self._pool._drop(worker)
        if not worker.ready:
            raise self._load_error(f"a grader process ended while starting ({how}); see its own output")
        if jobs:
            jobs[0].crashes += 1
            if jobs[0].crashes >= MAX_CRASHES:
                detail = f"the grader process ended ({how}) on this answer, {MAX_CRASHES} times"
                self._settle(jobs.pop(0), Grade(self._config.range_min, "error", detail))
        self._requeue(jobs)

    def _enforce_deadlines(self, now: float) -> None:
        for worker in list(self._pool._workers):
            deadline = self._deadline(worker)
            if deadline is None or now < deadline:
                continue
            if not worker.ready:
                raise self._load_error(f"a grader process was not ready after {STARTUP_TIMEOUT_S:.0f} s")
            jobs = list(worker.inflight)
            self._pool._drop(worker)
            detail = f"no grade within reward.timeout_s = {self._config.timeout_s} s; the grader was killed"
            self._settle(jobs[0], Grade(self._config.range_min, "timeout", detail))
            self._requeue(jobs[1:])

    def _requeue(self, jobs: list[Job]) -> None:
        """Put the jobs that a lost worker did not reach back at the front, and replace the worker."""
        self._pending.extendleft(reversed(jobs))
        self._pool._fill()

    def _load_error(self, why: str) -> UserError:
        return UserError(f'reward.function = "{self._config.function}" cannot be used: {why}')
