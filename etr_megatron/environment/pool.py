"""A pool of processes that call the environment's function."""

from __future__ import annotations

from dataclasses import asdict

from etr_megatron.config import EnvironmentConfig
from etr_megatron.environment.reply import EnvironmentReply, EnvironmentRequest
from etr_megatron.platform.workers import MAX_CRASHES, FailedRequest, FunctionPool, WorkerPool


class EnvironmentPool(FunctionPool):
    """Answers the model's turns in worker processes.

    May be used from different threads one after the other: all work is done in the method calls, without threads or signals.
    Workers die with this process, even after a kill -9.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        """Start `config.workers` processes and wait until they are ready.

        Raises UserError if `config.function` cannot be loaded.
        """
        self._config = config
        self._pool = WorkerPool("etr_megatron.environment.worker", "environment", config, worker="an environment process")

    @property
    def under_way(self) -> int:
        """Number of requests whose reply `poll` has not returned yet."""
        return self._pool.under_way

    def submit(self, key: int, request: EnvironmentRequest) -> None:
        """Request a reply, which `poll` returns with `key`. The key must differ from those of pending requests. Never blocks; a
        free worker begins at once.

        Raises RuntimeError after `close`.
        """
        if self._pool.closed:
            raise RuntimeError("this EnvironmentPool is closed")
        self._pool.submit([(key, asdict(request))])

    def poll(self, timeout_s: float) -> list[tuple[int, EnvironmentReply]]:
        """All replies since the last call, in the order of their arrival, with their requests' keys.

        Waits up to `timeout_s` for the first reply; returns at once if no request is pending. A call that takes longer than
        `environment.timeout_s` is cancelled, or its worker is killed and replaced; the reply has status "timeout". A call that
        crashes two workers has status "error". Raises UserError if a replacement cannot load `environment.function`.
        """
        return [(key, self._reply(outcome)) for key, outcome in self._pool.poll(timeout_s)]

    def _reply(self, outcome: dict[str, object] | FailedRequest) -> EnvironmentReply:
        if not isinstance(outcome, FailedRequest):
            return EnvironmentReply(**outcome)  # type: ignore[arg-type]
        if outcome.why == "timeout":
            detail = f"no reply within environment.timeout_s = {self._config.timeout_s} s; {outcome.how}"
            return EnvironmentReply(None, "timeout", detail)
        detail = f"the environment's process ended ({outcome.how}) in this call, {MAX_CRASHES} times"
        return EnvironmentReply(None, "error", detail)
