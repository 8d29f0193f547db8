"""Sends weights shard by shard to the workers of servers that the job started, no byte twice; see `ShardedTransport`."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from etr_megatron.rollout.engine import OtherModelError, WeightSource
from etr_megatron.rollout.rank0 import of_rank0
from etr_megatron.rollout.sglang.client import ServerClient
from etr_megatron.rollout.sglang.commands import LOADER
from etr_megatron.rollout.sglang.delivery import LIVENESS_S, serialized
from etr_megatron.rollout.sglang.fleet import Fleet
from etr_megatron.rollout.sglang.senders import SendSettings, at_servers
from etr_megatron.weights import ServerLayout
from etr_megatron.weights.transport import ShardedTransport
from etr_megatron.weights.transport.board import Board
from etr_megatron.weights.transport.server_loader import MESSAGE_NAME, Offer, refusal_key

_REPORT_AFTER_S = 1.0
"""Seconds before a failure is reported. After this delay the ranks have entered the sync that failed."""

_GRACE_S = 10.0
"""Seconds for a server to end its part of a failed sync."""


class OfferCalls:
    """Rank 0's requests that make servers' workers join a sync. loop: the clients' event loop. Do not call methods from it."""

    def __init__(self, fleet: Fleet, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._fleet, self._loop, self._timeout_s = fleet, loop, timeout_s
        self._calls: list[tuple[ServerClient, asyncio.Task[dict[str, Any]]]] = []

    def members(self) -> list[tuple[str, int]]:
        """See `Fleet.members`; raises EngineGoneError when there are none."""
        self._fleet.refuse_if_gone()
        return self._fleet.members

    def post(self, offer: Offer, report: Callable[[str], None]) -> None:
        """Send the offer to all serving servers. report: called from the loop's thread with the error of each that fails, maybe
        only after `settle`."""
        workers = offer.destination.tp
        bodies = []
        for number in range(offer.destination.servers):
            offers = [replace(offer, rank=number * workers + rank) for rank in range(workers)]
            payloads = [serialized([(MESSAGE_NAME, one.message())]) for one in offers]
            bodies.append({"serialized_named_tensors": payloads, "load_format": LOADER, "flush_cache": False})
        asyncio.run_coroutine_threadsafe(self._post(bodies, report), self._loop).result()

    async def _post(self, bodies: Sequence[dict[str, Any]], report: Callable[[str], None]) -> None:
        def look(call: asyncio.Task[dict[str, Any]]) -> None:
            if not call.cancelled() and call.exception() is not None:
                self._loop.call_later(_REPORT_AFTER_S, report, str(call.exception()))

        # The board has a timeout for every wait in a sync, and its error names the missing ranks. The timeout here is longer,
        # so that it does not expire first.
        timeout_s = 4 * self._timeout_s
        self._calls = []
        for client, body in zip(self._fleet.serving, bodies, strict=True):
            call = asyncio.create_task(client.call("/update_weights_from_tensor", body, timeout_s=timeout_s))
            call.add_done_callback(look)
            self._calls.append((client, call))

    def settle(self, failed: bool, refusals: Mapping[int, str]) -> bool:
        """Wait for the servers' replies, and mark the servers that failed; returns whether there are any.

        failed: whether the sync failed. refusals: number of a server in the sync -> why it refused the weights.
        """
        return asyncio.run_coroutine_threadsafe(self._settle(failed, refusals), self._loop).result()

    async def _settle(self, failed: bool, refusals: Mapping[int, str]) -> bool:
        calls = [call for _, call in self._calls]
        await asyncio.wait(calls, timeout=_GRACE_S if failed else self._timeout_s)
        guilty: dict[ServerClient, str] = {self._calls[number][0]: why for number, why in refusals.items()}
        for client, call in self._calls:
            if not call.done():
                call.cancel()
                guilty[client] = f"it did not {'end its part of the weight sync' if failed else 'confirm the weights'}"
            elif call.exception() is not None:
                guilty.setdefault(client, str(call.exception()))
        if failed:
            well = await asyncio.gather(*(client.is_alive(min(LIVENESS_S, self._timeout_s)) for client, _ in self._calls))
            for (client, _), good in zip(self._calls, well, strict=True):
                if not good:
                    guilty.setdefault(client, "it does not answer after a failed weight sync")
        for client, why in guilty.items():
            self._fleet.mark_failed(client, why)
        return bool(guilty)


@dataclass
class _Try:
    """A try of a sync. board: of the sync that it has entered."""

    board: Board | None

    def report(self, reason: str) -> None:
        """Report to all ranks that a server is lost, so that none waits for it until the timeout. A report that comes after the
        end of this try does not reach the next one."""
        if self.board is not None:
            self.board.report(reason)


class ShardedSender:
    """`sharded`. See `Sender`. server: one server's layout. host: rank 0's address. calls: on rank 0 only.

    After a server is lost, the sync restarts with the others. Their workers survive the failed sync, see `server_loader.load`.
    """

    def __init__(self, settings: SendSettings, server: ServerLayout, host: str, calls: OfferCalls | None) -> None:
        self._settings, self._server, self._host, self._calls = settings, server, host, calls
        self._members: list[tuple[str, int]] = []
        self._store: dist.TCPStore | None = None
        self._left: dist.TCPStore | None = None
        self._transport: ShardedTransport | None = None

    def send(self, weights: WeightSource, version: int) -> None:
        """See `Sender.send`. Raises OtherModelError if all servers refuse the weights as those of another model."""
        while not self._try(weights, version):
            pass  # every try has fewer servers; when none is left, EngineGoneError names them all

    def _try(self, weights: WeightSource, version: int) -> bool:
        """Try a sync. Returns True if the serving servers have the version, False if a server was lost and marked."""
        members = at_servers(lambda: of_rank0(self._calls).members())
        if members != self._members:
            self._leave()
        offer = self._offer(weights, version, members)
        this = _Try(None if self._transport is None else self._transport.wire.board)
        if self._calls is not None:
            self._calls.post(offer, this.report)
        error = None
        try:
            if self._transport is None:
                self._transport = self._open(offer, this)
            self._transport.sync(version, weights.shards())
        except RuntimeError as failure:  # a SyncError, or torch's error for a group that was not formed
            error = failure
            self._leave()
        refusals = at_servers(lambda: self._refusals(offer)) if error is not None else {}
        lost = at_servers(lambda: of_rank0(self._calls).settle(error is not None, refusals))
        if refusals and len(refusals) == len(members):  # they would refuse again after a restart
            raise OtherModelError(f"{next(iter(refusals.values()))}; or use another sglang.sync than sharded")
        if error is not None and not lost:
            raise error
        return error is None

    def _offer(self, weights: WeightSource, version: int, members: list[tuple[str, int]]) -> Offer:
        """The offer to the workers. A collective; opens a store if the set of servers is new."""
        settings = self._settings
        if self._transport is None:
            port = at_servers(self._open_store)
            if self._store is None:
                self._store = self._tcp_store(port, is_master=False)
            self._members = members
        assert self._store is not None
        return Offer(
            version,
            self._host,
            self._store.port,
            0,
            weights.layout,
            replace(self._server, servers=len(members)),
            settings.arch,
            str(settings.dtype).removeprefix("torch."),
            settings.fp8_block,
            settings.bucket_bytes,
            checksums=settings.checksums,
            backend=settings.backend,
            timeout_s=settings.timeout_s,
        )

    def _refusals(self, offer: Offer) -> dict[int, str]:
        """Server number -> why one of its workers refused, read from the store of the failed sync, which is still open."""
        found: dict[int, str] = {}
        store = self._left
        for rank in range(offer.destination.world):
            if store is not None and store.check([refusal_key(rank)]):
                found.setdefault(rank // offer.destination.tp, store.get(refusal_key(rank)).decode())
        return found

    def _open_store(self) -> int:
        self._store = self._tcp_store(0, is_master=True)
        return int(self._store.port)

    def _tcp_store(self, port: int, *, is_master: bool) -> dist.TCPStore:
        timeout = datetime.timedelta(seconds=self._settings.timeout_s)
        return dist.TCPStore(self._host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)

    def _open(self, offer: Offer, this: _Try) -> ShardedTransport:
        assert self._store is not None  # of the offer
        this.board = offer.board(self._store, dist.get_rank())  # until the transport has its own
        transport = offer.transport(self._store, dist.get_rank())
        this.board = transport.wire.board
        return transport

    def _leave(self) -> None:
        """Close the connections but keep the store, where other ranks may still read why a sync failed."""
        if self._transport is not None:
            self._transport.close()
        self._left = self._store or self._left
        self._transport = self._store = None
        self._members = []

    def close(self) -> None:
        """See `Sender.close`."""
        self._leave()
        self._left = None
