"""A pool of grader processes. Keeps the order of requests, and turns timeouts and crashes of workers into grades."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from etr_megatron.config import RewardConfig
from etr_megatron.platform.workers import MAX_CRASHES, FunctionPool, Lost, WorkerPool
from etr_megatron.reward.grade import Grade, GradeRequest

MAX_INFLIGHT = 32
"""Requests sent ahead to one worker, to hide the pipe's latency."""
_POLL_S = 60.0


class GraderPool(FunctionPool):
    """Grades responses in worker processes.

        with GraderPool(config.reward) as pool:
            grades = pool.grade([GradeRequest(prompt, response, answer), ...])

    May be used from any thread (it uses no signals); concurrent calls of `grade` run one after the other. Workers die with this
    process, even after a kill -9.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Start `config.workers` processes and wait until they are ready.

        Raises UserError if `config.function` cannot be loaded.
        """
        self._config = config
        self._lock = threading.Lock()
        self._pool = WorkerPool("etr_megatron.reward.worker", "reward", config, worker="a grader process", ahead=MAX_INFLIGHT)

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """One grade per request, in the order of the requests.

        If an answer takes longer than `timeout_s`, its call is cancelled, or its worker is killed and replaced; it gets
        `range_min` with status "timeout". An answer that crashes two workers gets `range_min` with status "error".
        Raises UserError if a replacement cannot load `reward.function`, RuntimeError after `close`.
        """
        with self._lock:
            if self._pool.closed:
                raise RuntimeError("this GraderPool is closed")
            grades: dict[int, Grade] = {}
            try:
                self._pool.submit((index, asdict(request)) for index, request in enumerate(requests))
                while self._pool.under_way:
                    grades |= {index: self._grade(outcome) for index, outcome in self._pool.poll(_POLL_S)}
            except BaseException:
                # Replies still in flight belong to this call, and must not reach a later call.
                self._pool.forget()
                raise
            return [grades[index] for index in range(len(requests))]

    def close(self) -> None:
        """End all workers and wait for them. If another thread is in `grade`, waits until it has finished. Idempotent."""
        with self._lock:
            self._pool.close()

    def _grade(self, outcome: dict[str, Any] | Lost) -> Grade:
        if not isinstance(outcome, Lost):
            return Grade(**outcome)
        if outcome.why == "timeout":
            detail = f"no grade within reward.timeout_s = {self._config.timeout_s} s; {outcome.how}"
            return Grade(self._config.range_min, "timeout", detail)
        detail = f"the grader process ended ({outcome.how}) on this answer, {MAX_CRASHES} times"
        return Grade(self._config.range_min, "error", detail)
