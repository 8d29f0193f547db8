"""A pool of grader processes. Keeps the order of requests, and turns timeouts and crashes of workers into grades."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from typing import Any

from etr_megatron.config import RewardConfig
from etr_megatron.platform.workers import MAX_CRASHES, FailedRequest, FunctionPool, WorkerPool
from etr_megatron.reward.grade import Grade, GradeRequest

MAX_INFLIGHT = 32
"""Requests sent ahead to one worker, to hide the pipe's latency."""
_POLL_S = 60.0
_SERVE_S = 0.2
"""Longest time in seconds that a thread serves the workers before it sends them what other threads have submitted meanwhile."""
_ACQUIRE_S = 0.01
"""Longest wait in seconds for another thread that serves the workers: that thread may get our grades without letting us in."""


class GraderPool(FunctionPool):
    """Grades responses in worker processes.

        with GraderPool(config.reward) as pool:
            grades = pool.grade([GradeRequest(prompt, response, answer), ...])

    May be used from any thread (it uses no signals). Concurrent calls of `grade` run one after the other; `submit` and `poll`
    do not wait for them. The workers are served only while a thread is in one of these methods. Workers die with this process,
    even after a kill -9.

    If an answer takes longer than `timeout_s`, its call is cancelled, or its worker is killed and replaced; it gets `range_min`
    with status "timeout". An answer that crashes two workers gets `range_min` with status "error". All three methods raise
    UserError if a replacement cannot load `reward.function`, RuntimeError after `close`.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Start `config.workers` processes and wait until they are ready.

        Raises UserError if `config.function` cannot be loaded.
        """
        self._config = config
        self._lock = threading.Lock()  # held in `grade`
        self._serving = threading.Lock()  # held by the thread that serves the workers
        self._keys = itertools.count()
        self._queue: deque[tuple[int, dict[str, Any]]] = deque()
        self._wanted: set[int] = set()
        self._grades: dict[int, Grade] = {}
        self._pool = WorkerPool("etr_megatron.reward.worker", "reward", config, worker="a grader process", ahead=MAX_INFLIGHT)

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """One grade per request, in the order of the requests."""
        with self._lock:
            keys = self.submit(requests)
            grades: dict[int, Grade] = {}
            try:
                while left := set(keys).difference(grades):
                    grades |= self.poll(left, _POLL_S)
            except BaseException:
                self._wanted.difference_update(keys)
                raise
            return [grades[key] for key in keys]

    def submit(self, requests: Sequence[GradeRequest]) -> list[int]:
        """Queue requests without waiting; returns their keys for `poll`."""
        keys = list(itertools.islice(self._keys, len(requests)))
        self._wanted.update(keys)
        self._queue.extend(zip(keys, map(asdict, requests), strict=True))
        self._serve(0.0)
        return keys

    def poll(self, keys: AbstractSet[int], timeout_s: float) -> dict[int, Grade]:
        """The grades that have arrived for these keys, each returned once; waits up to `timeout_s` for the first of them."""
        end = time.monotonic() + timeout_s
        while True:
            self._serve(min(_SERVE_S, max(0.0, end - time.monotonic())))
            found = [key for key in list(self._grades) if key in keys]
            if found or time.monotonic() >= end:
                return {key: self._grades.pop(key) for key in found}

    def close(self) -> None:
        """End all workers and wait for them. If another thread is in `grade`, waits until it has finished. Idempotent."""
        with self._lock, self._serving:
            self._pool.close()

    def _serve(self, timeout_s: float) -> None:
        """Exchange requests and grades with the workers, waiting up to `timeout_s` for a grade. Does less if another thread is
        doing that."""
        if not self._serving.acquire(timeout=min(timeout_s, _ACQUIRE_S)):
            return
        try:
            if self._pool.closed:
                raise RuntimeError("this GraderPool is closed")
            self._pool.submit([self._queue.popleft() for _ in range(len(self._queue))])
            for key, outcome in self._pool.poll(timeout_s):
                if key in self._wanted:  # else an error has ended the call of `grade`
                    self._wanted.remove(key)
                    self._grades[key] = self._grade(outcome)
        finally:
            self._serving.release()

    def _grade(self, outcome: dict[str, Any] | FailedRequest) -> Grade:
        if not isinstance(outcome, FailedRequest):
            return Grade(**outcome)
        if outcome.why == "timeout":
            detail = f"no grade within reward.timeout_s = {self._config.timeout_s} s; {outcome.how}"
            return Grade(self._config.range_min, "timeout", detail)
        detail = f"the grader process ended ({outcome.how}) on this answer, {MAX_CRASHES} times"
        return Grade(self._config.range_min, "error", detail)
