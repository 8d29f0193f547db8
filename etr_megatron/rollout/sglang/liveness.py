"""Detects servers that hang while requests wait for them, long before those requests time out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from etr_megatron.rollout.sglang.client import ServerClient, ServerError

_LOOKS = 4
"""Number of liveness checks per `timeout_s`."""


class LivenessMonitor:
    """While requests wait, checks that their servers are alive. A server that does not answer for `timeout_s` counts as dead.

    on_dead(client, why) is called before the requests that wait for that server are cancelled. Everything here runs in the
    event loop of the clients. A busy server answers only between two batches, so `timeout_s` must be longer than any batch.
    """

    def __init__(self, timeout_s: float, on_dead: Callable[[ServerClient, str], None]) -> None:
        self._timeout_s, self._on_dead = timeout_s, on_dead
        self._waiting: dict[asyncio.Task[Any], Sequence[ServerClient]] = {}
        self._cut: dict[asyncio.Task[Any], Exception] = {}
        self._looking: asyncio.Task[None] | None = None

    @contextmanager
    def watch(self, clients: Sequence[ServerClient]) -> Iterator[None]:
        """Watch these servers while the block waits for one of them. There are several if a router chooses the server.

        Raises ServerError when one of them is dead, and RuntimeError when the checks themselves failed.
        """
        task = asyncio.current_task()
        assert task is not None
        self._waiting[task] = clients
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        try:
            yield
        except asyncio.CancelledError:
            error = self._cut.get(task)
            # As in asyncio.timeout: turn our own cancellation into an error, unless other code cancelled the task too.
            if error is not None and task.uncancel() == 0:
                raise error from error.__cause__
            raise
        finally:
            self._cut.pop(task, None)
            del self._waiting[task]
            if not self._waiting and self._looking is not None:
                self._looking.cancel()
                self._looking = None

    async def _look(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._timeout_s / _LOOKS)
                clients = {client.name: client for some in self._waiting.values() for client in some}
                alive = await asyncio.gather(*map(self._lives, clients.values()))
                for client, lives in zip(clients.values(), alive, strict=True):
                    if not lives:
                        self._give_up(client)
        except Exception as error:  # fail at once: without checks, requests to a hanging server would wait until they time out
            self._looking = None
            for task in self._waiting:
                failure = RuntimeError("the liveness checks of servers failed")
                failure.__cause__ = error
                self._cut_off(task, failure)

    async def _lives(self, client: ServerClient) -> bool:
        """Whether the server answers within the timeout. Retries after a reset connection or a wrong answer."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._timeout_s
        while (left := end - loop.time()) > 0:
            if await client.is_alive(left):
                return True
            await asyncio.sleep(min(1.0, self._timeout_s / _LOOKS))
        return False

    def _give_up(self, client: ServerClient) -> None:
        why = f"{client.name}: gave no sign of life within {self._timeout_s:g} s"
        self._on_dead(client, why)
        for task, clients in self._waiting.items():
            if client in clients:
                self._cut_off(task, ServerError(why))

    def _cut_off(self, task: asyncio.Task[Any], error: Exception) -> None:
        if task not in self._cut:
            self._cut[task] = error
            task.cancel()
