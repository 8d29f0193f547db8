"""A weight sync as a transaction on the servers: pause, begin; what is sent; end, flush, version, continue.

Servers keep what they have in hand (`retract`). One that fails at any of this takes no more traffic, as it may have weights of
two versions: it must get a whole sync before it serves again.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from etr_megatron.rollout.sglang.client import ServerClient, ServerError
from etr_megatron.rollout.sglang.fleet import Fleet

_GOODBYE_S = 5.0
"""How long a server that has failed may take to be let go."""


class Transaction:
    """The steps of a sync before and after the transfer. timeout_s: of every request, whose failure names the server."""

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
        """Close the update, drop caches, and hold servers to `version`: those that answer with another serve no more.

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
        """After a failure of ours in the middle: servers go on, so that nobody waits for them, but take no traffic of ours."""
        for client in self._fleet.serving:
            self._fleet.mark_failed(client, why)
        await self._let_go()

    async def _let_go(self) -> None:
        """Servers that were paused and have failed go on as well, if they still can: they may have users besides us."""
        failed = [client for client in self._paused if client.name in self._fleet.failed]
        await asyncio.gather(*map(self.end_what_is_open, failed))
        self._paused = []

    async def end_what_is_open(self, client: ServerClient) -> None:
        """Have a server go on that is paused, in an update or not. One that refuses, or says nothing for a while, is left as
        it is."""
        for route in ("/end_weight_update", "/continue_generation"):
            if client.has(route):
                with suppress(ServerError):  # of the first, where the update was closed already or never opened
                    await client.call(route, {}, timeout_s=min(_GOODBYE_S, self._timeout_s))

    async def _open(self, client: ServerClient) -> None:
        if not client.has("/begin_weight_update"):
            return
        try:
            await client.call("/begin_weight_update", {}, timeout_s=self._timeout_s)
        except ServerError as error:
            if "already open" not in str(error):
                raise
            # by a job that ended in the middle of a sync
            await client.call("/end_weight_update", {}, timeout_s=self._timeout_s)
            await client.call("/begin_weight_update", {}, timeout_s=self._timeout_s)

    async def _close(self, client: ServerClient) -> None:
        if client.has("/end_weight_update"):
            await client.call("/end_weight_update", {}, timeout_s=self._timeout_s)

    async def _shake_hands(self, client: ServerClient, version: int) -> None:
        found = await client.weight_version(self._timeout_s)
        if found != str(version):
            raise ServerError(f"serves version {found} after it was sent {version}")
