"""A weight sync as a transaction on the servers: pause, begin; transfer; end, flush, set version, continue.

Servers keep their requests (`retract`). A server that fails at any step is marked failed, because it may have weights of two
versions. It needs a complete sync before it serves again.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from etr_megatron.rollout.sglang.client import ServerClient, ServerError
from etr_megatron.rollout.sglang.fleet import Fleet

_GOODBYE_S = 5.0
"""Timeout of the requests that resume a failed server."""


class Transaction:
    """The steps of a sync before and after the transfer. timeout_s: of every request. Errors name the server."""

    def __init__(self, fleet: Fleet, timeout_s: float) -> None:
        self._fleet, self._timeout_s = fleet, timeout_s
        self._paused: list[ServerClient] = []

    async def begin(self) -> None:
        """Pause all servers and open the update. Raises EngineGoneError when none is left."""
        self._paused = self._fleet.serving
        await self._fleet.call_all("/pause_generation", {"mode": "retract"}, timeout_s=self._timeout_s)
        await self._fleet.for_all(self._open)
        self._fleet.refuse_if_gone()

    async def finish(self, version: int) -> None:
        """Close the update, flush caches and set `version`; servers that then report another version are marked failed.

        Raises EngineGoneError when none is left.
        """
        await self._fleet.for_all(self._close)
        await self._fleet.call_all("/flush_cache", {}, timeout_s=self._timeout_s)
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._fleet.call_all("/update_weight_version", body, timeout_s=self._timeout_s)
        await self._fleet.for_all(lambda client: self._shake_hands(client, version))
        self._fleet.version = str(version)
        await self._fleet.call_all("/continue_generation", {}, timeout_s=self._timeout_s)
        await self._let_go()
        self._fleet.refuse_if_gone()

    async def abandon(self, why: str) -> None:
        """After a failure on the trainer's side: mark all servers failed, and resume them, as they may have other users."""
        for client in self._fleet.serving:
            self._fleet.mark_failed(client, why)
        await self._let_go()

    async def _let_go(self) -> None:
        """Try to resume the paused servers that have failed, because they may have other users."""
        failed = [client for client in self._paused if client.name in self._fleet.failed]
        await asyncio.gather(*map(self.end_what_is_open, failed))
        self._paused = []

    async def end_what_is_open(self, client: ServerClient) -> None:
        """Resume a paused server, whether or not an update is open. Errors and timeouts are ignored."""
        for route in ("/end_weight_update", "/continue_generation"):
            if client.has(route):
                with suppress(ServerError):  # from the first route, if no update is open
                    await client.call(route, {}, timeout_s=min(_GOODBYE_S, self._timeout_s))

    async def _open(self, client: ServerClient) -> None:
        if not client.has("/begin_weight_update"):
            return
        try:
            await client.call("/begin_weight_update", {}, timeout_s=self._timeout_s)
        except ServerError as error:
            if "already open" not in str(error):
                raise
            # The update was left open by a job that ended in the middle of a sync.
            await client.call("/end_weight_update", {}, timeout_s=self._timeout_s)
            await client.call("/begin_weight_update", {}, timeout_s=self._timeout_s)

    async def _close(self, client: ServerClient) -> None:
        if client.has("/end_weight_update"):
            await client.call("/end_weight_update", {}, timeout_s=self._timeout_s)

    async def _shake_hands(self, client: ServerClient, version: int) -> None:
        found = await client.weight_version(self._timeout_s)
        if found != str(version):
            raise ServerError(f"reports weight version {found} after it was sent {version}")
