"""Rank 0's communication with the servers: their clients, and one event loop in a thread for all requests."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

import httpx

from etr_megatron.config import SglangConfig, request_timeout_of, startup_timeout_of, sync_of
from etr_megatron.errors import UserError
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.rollout.engine import STOP_POLL_S, MustStop, Place, RefusedError
from etr_megatron.rollout.sglang.client import GenerateParameters, ServerClient, ServerError
from etr_megatron.rollout.sglang.connections import Connections, allow_connections
from etr_megatron.rollout.sglang.delivery import LIVENESS_S, BroadcastDelivery, Bucket, Delivery, TensorDelivery
from etr_megatron.rollout.sglang.fits import Expected, groups_of
from etr_megatron.rollout.sglang.fleet import Fleet
from etr_megatron.rollout.sglang.hosts import Started
from etr_megatron.rollout.sglang.loads import LoadMonitor
from etr_megatron.rollout.sglang.places import hosts_away
from etr_megatron.rollout.sglang.replies import Generated
from etr_megatron.rollout.sglang.restart_backoff import RestartBackoff
from etr_megatron.rollout.sglang.router import Router
from etr_megatron.rollout.sglang.senders import SendQueue
from etr_megatron.rollout.sglang.sharded_sender import OfferCalls
from etr_megatron.rollout.sglang.stream import RequestStream
from etr_megatron.rollout.sglang.suspicions import Suspicions
from etr_megatron.rollout.sglang.sync import Transaction

logger = logging.getLogger(__name__)

T = TypeVar("T")

API_KEY_VARIABLE = "ETR_SGLANG_API_KEY"
"""The API key of servers at `sglang.urls`, if they require one."""

_UPDATE_ROUTE = {
    "broadcast": "/update_weights_from_distributed",
    "tensor": "/update_weights_from_tensor",
    "sharded": "/update_weights_from_tensor",
    "disk": "/update_weights_from_disk",
}
_ROUTES = (
    "/generate",
    "/pause_generation",
    "/continue_generation",
    "/flush_cache",
    "/update_weight_version",
    "/model_info",
    "/server_info",
)
_RELEASE = ("/release_memory_occupation", "/resume_memory_occupation")
PROBE_PROMPT = tuple(range(3, 15))
"""Token ids of the prompt of a probe; every vocabulary has them."""

_CLOSE_S = 5.0
"""Seconds for servers to return aborted requests when the job ends. The replies are not used."""

_IDLE_S = 30.0
"""Seconds for a server to become idle after its last request was answered or aborted."""

_PROBE_TOKENS = 32
_SUSPICIONS = "suspicions.json"
_HEALTH_S = 5.0
"""Seconds for a server to answer a health check, for which it generates a token."""


class _UnwellError(ServerError):
    """A server did not pass its health check."""


class Control:
    """Communicates with all servers on behalf of the engines of all ranks. names: of all servers, in order.

    expected: the weights that servers at `sglang.urls` must be able to load. host: this machine's address for the transfer of
    weights. api_key: of all servers, None if they require none. logs: directory for a router's output and for the list of
    problems that may have killed servers.
    """

    def __init__(
        self,
        config: SglangConfig,
        names: Sequence[str],
        expected: Expected,
        *,
        host: str,
        api_key: str | None,
        backend: str,
        logs: Path,
    ) -> None:
        self._expected = expected
        self._config, self._colocated = config, config.placement == "colocated"
        self._on_cpu = backend == "gloo"
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="sglang", daemon=True).start()
        key = api_key or os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if not key and (away := hosts_away(config.urls)):
            logger.warning(
                "sglang.urls: anyone who can connect to %s can replace the servers' weights; start them with --api-key, and "
                "set %s",
                ", ".join(dict.fromkeys(away)),
                API_KEY_VARIABLE,
            )
        allow_connections(config.concurrency * max(1, len(names)))
        self._http = httpx.AsyncClient(transport=Connections(), headers=headers)
        urls = config.urls or ("",) * len(names)
        self._clients = {name: ServerClient(name, url, self._http) for name, url in zip(names, urls, strict=True)}
        self._router = Router(config, self._http, api_key=key, logs=logs) if config.router is not None else None
        self.fleet = fleet = Fleet(
            list(self._clients.values()),
            timeout_s=request_timeout_of(config),
            hang_timeout_s=config.hang_timeout_s,
            router=self._router,
        )
        self._backoff = RestartBackoff(names)
        self._released: list[tuple[str, int]] = []
        self.stream = RequestStream(
            fleet,
            concurrency=config.concurrency,
            exclusive=not config.urls,
            suspicions=Suspicions.read(logs / _SUSPICIONS),
        )
        self.loads = LoadMonitor(lambda: fleet.serving, lambda: self.stream.in_flight)
        self._watching = asyncio.run_coroutine_threadsafe(self.loads.run(), self.loop)
        self._transaction = Transaction(fleet, config.update_timeout_s)
        self.calls = OfferCalls(fleet, self.loop, config.update_timeout_s)
        if sync_of(config) == "tensor" and config.urls:
            logger.warning("sglang.sync: tensor sends about 30 MB/s to servers at sglang.urls; broadcast and disk are faster")
        self._delivery: Delivery = TensorDelivery(fleet, workers=config.tp, timeout_s=config.update_timeout_s)
        if sync_of(config) == "broadcast":
            self._delivery = BroadcastDelivery(
                fleet, workers=config.tp, host=host, backend=backend, timeout_s=config.update_timeout_s
            )
        self.send_queue = SendQueue(self._post)

    def _post(self, bucket: Bucket) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(self._delivery.deliver(bucket), self.loop)

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop's thread, and wait for its result."""
        return asyncio.run_coroutine_threadsafe(what, self.loop).result()

    def run_until_stopped(self, what: Coroutine[Any, Any, T], must_stop: MustStop) -> T:
        """As `run`; once `must_stop()` is true, cancels `what` and raises StopAskedError."""
        future = asyncio.run_coroutine_threadsafe(what, self.loop)
        while not wait([future], timeout=STOP_POLL_S).done:
            if must_stop():
                future.cancel()
                raise StopAskedError("told to stop (SIGTERM) while waiting for responses")
        return future.result()

    def start_router(self) -> None:
        """Start the router, if one is configured. Raises UserError when it does not start."""
        if self._router is not None:
            self._router.start()

    def open(self, started: Mapping[str, Started]) -> None:
        """Check all servers for the first time. Raises UserError if a server does not serve."""
        for name, problem in self.run(self._get_to_know(list(self._clients), started, patient=True)).items():
            if problem is not None:
                raise UserError(str(problem))
            self.fleet.rejoin(self._clients[name])
        if self._colocated and self._on_cpu:
            logger.warning("sglang.placement: colocated servers on CPU keep their memory while the policy trains")

    def due(self) -> list[str]:
        """Failed servers that are to be brought back at this weight sync."""
        return self._backoff.due(self.fleet.failed)

    def to_restart(self, names: Sequence[str]) -> list[str]:
        """Those of these servers, which are `due`, that the job must start again. The others are healthy, and failed for the
        first time and outside of weight syncs and probes."""
        return [] if self._config.urls else self.run(self._unusable(names))

    async def _unusable(self, names: Sequence[str]) -> list[str]:
        async def is_usable(name: str) -> bool:
            if name in self.fleet.spoiled or not self._backoff.is_first(name):
                return False
            try:  # it may still have requests, which nobody awaits
                await self._clients[name].call("/abort_request", {"rid": "", "abort_all": True}, timeout_s=_HEALTH_S)
            except ServerError:
                return False
            return await self._clients[name].is_healthy(_HEALTH_S)

        usable = await asyncio.gather(*map(is_usable, names))
        return [name for name, is_well in zip(names, usable, strict=True) if not is_well]

    def take_back(self, names: Sequence[str], started: Mapping[str, Started]) -> None:
        """Take back servers that were `due` and have recovered or been restarted (in `started`). The weight sync comes next."""
        for name, problem in self.run(self._get_to_know(names, started, patient=False)).items():
            if problem is not None:
                if name in started:
                    logger.warning("%s was started again in vain: %s", name, problem)
                self.fleet.mark_failed(self._clients[name], str(problem))
                if isinstance(problem, _UnwellError) and name not in started:  # unlike a restart, a health check is cheap
                    self._backoff.do_not_count(name)
            else:
                logger.warning("%s is back", name)
                self.fleet.rejoin(self._clients[name])

    async def _get_to_know(
        self, names: Sequence[str], started: Mapping[str, Started], *, patient: bool
    ) -> dict[str, ServerError | None]:
        """Check servers; returns server -> why it does not serve, None if it does. patient: wait, as it may be starting up."""
        needed = (*_ROUTES, _UPDATE_ROUTE[sync_of(self._config)], *(_RELEASE if self._colocated else ()))

        async def one(name: str) -> ServerError | None:
            client = self._clients[name]
            if name in started:
                client.url = started[name].url
                if (problem := started[name].problem) is not None:
                    return ServerError(problem)
            try:
                await self._wait_until_healthy(client, startup_timeout_of(self._config) if patient else 0.0)
                try:
                    said = await client.get("/server_info", timeout_s=min(LIVENESS_S, self._config.update_timeout_s))
                except ServerError as error:
                    raise ServerError(f"{client.name}: its workers do not answer at {client.url}") from error
                client.groups = groups_of(said)
                await client.learn_routes(needed, timeout_s=self._config.update_timeout_s)
                if self._config.urls:
                    await self._refuse_misfit(client, said)
            except ServerError as error:
                return error
            return None

        return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))

    async def _refuse_misfit(self, client: ServerClient, said: Mapping[str, Any]) -> None:
        """Raises ServerError when the server's own report shows that it cannot load the job's weights. said: JSON of
        `/server_info`."""
        model = await client.get("/model_info", timeout_s=self._config.update_timeout_s)
        if (problem := self._expected.misfit(said, model)) is not None:
            raise ServerError(f"{client.name} at {client.url} cannot take the job's weights: {problem}")
        if (dtype := self._expected.other_dtype(said)) is not None:
            logger.warning("%s at %s computes in %s, the job in %s", client.name, client.url, dtype, self._expected.dtype)

    async def _wait_until_healthy(self, client: ServerClient, patience_s: float) -> None:
        """Raises _UnwellError when the server is not healthy in time."""
        deadline = self.loop.time() + patience_s
        while not await self._is_healthy(client):
            if self.loop.time() >= deadline:
                raise _UnwellError(f"{client.name} did not answer within {patience_s or _HEALTH_S:g} s at {client.url}")
            await asyncio.sleep(0.5)

    async def _is_healthy(self, client: ServerClient) -> bool:
        """Whether the server generates.

        A server at `sglang.urls` that is alive but does not generate may still be paused by a weight sync: of a job that was
        killed, or of this job if the server failed at it. Then that sync is ended, and the server is checked again.
        """
        if not self._config.urls:
            return await client.is_healthy(_HEALTH_S)
        try:  # one request at a time: a paused server reports that it is healthy if it answers another request meanwhile
            await client.get("/server_info", timeout_s=_HEALTH_S)
        except ServerError as error:  # it answered, if only to reject a wrong key, so check its health
            return error.status is not None and await client.is_healthy(_HEALTH_S)
        if not await client.is_healthy(_HEALTH_S):
            await self._transaction.end_what_is_open(client)
            return await client.is_healthy(_HEALTH_S)
        return True

    def begin(self) -> None:
        """Open the transaction of a sync. Raises EngineGoneError when no server is left."""
        self.fleet.in_sync = True
        self.run(self._resume("weights"))
        self.run(self._transaction.begin())

    def finish(self, version: int) -> None:
        """Close the transaction. Raises EngineGoneError when no server is left."""
        if self._released:  # a flush also frees the transfer's GPU memory, which the KV cache needs
            self.run(self.fleet.call_all("/flush_cache", {}, timeout_s=self._config.update_timeout_s))
        self.run(self._resume("kv_cache", "cuda_graph"))
        self._released = []
        self.run(self._transaction.finish(version))
        self.fleet.in_sync = False
        if self._router is not None:
            self._router.restart_if_down()

    def abandon(self, why: str) -> None:
        """See `Transaction.abandon`."""
        self.run(self._transaction.abandon(why))
        self.fleet.in_sync = False

    def load(self, directory: Path) -> None:
        """Have all serving servers load a directory. Raises EngineGoneError when none is left."""
        # By default a server uses the load format that it was started with: `dummy` for the job's own, which fails here.
        body = {"model_path": str(directory.absolute()), "load_format": "auto", "flush_cache": False}
        self.run(self.fleet.call_all(_UPDATE_ROUTE["disk"], body, timeout_s=self._config.update_timeout_s))
        self.fleet.refuse_if_gone()

    def release(self) -> list[str]:
        """Have colocated servers release their memory until the next sync. Raises EngineGoneError when none is left.

        Returns the failed servers: they get no request, and hold their memory as long as they run.
        """
        if self._colocated and not self._released:
            assert not self.stream.in_flight
            # SGLang (0.5.21) ends a server that is not idle when it is to release its memory. An aborted request may occupy it
            # for a little longer than its reply; this request waits until the server is idle.
            self.run(self.fleet.call_all(f"/flush_cache?timeout={_IDLE_S:g}", {}, timeout_s=self._config.update_timeout_s))
            self.run(self.fleet.call_all(_RELEASE[0], {}, timeout_s=self._config.update_timeout_s))
            self._released = self.fleet.members
            self.fleet.refuse_if_gone()
        return list(self.fleet.failed) if self._colocated else []

    async def _resume(self, *tags: str) -> None:
        """Have servers that released memory allocate it again. A server that was restarted since then is left out, because the
        request would crash it.

        tags: SGLang's names of the parts. The KV cache comes last, when the sync has freed its memory.
        """
        had = [name for name, _ in set(self._released) & set(self.fleet.members)]

        async def one(client: ServerClient) -> None:
            if client.name in had:
                await client.call(_RELEASE[1], {"tags": tags}, timeout_s=self._config.update_timeout_s)

        await self.fleet.for_all(one)

    def probe(self, temperature: float) -> dict[Place, Generated]:
        """What each attention group of each server generates for a fixed prompt. Raises EngineGoneError when no server is
        left."""
        parameters = GenerateParameters(_PROBE_TOKENS, temperature, 1.0, 0, 0, (), ignore_eos=True)
        timeout_s, found = self._config.update_timeout_s, {}

        async def one(client: ServerClient) -> None:
            groups = range(client.groups) if client.groups > 1 else [None]
            asked = (client.generate(PROBE_PROMPT, parameters, timeout_s=timeout_s, group=group) for group in groups)
            try:
                replies = await asyncio.gather(*asked)
            except RefusedError as refusal:  # a server that refuses a prompt of this length cannot be used
                raise ServerError(str(refusal)) from refusal
            found.update({Place(client.name, group): reply for group, reply in zip(groups, replies, strict=True)})

        self.run(self.fleet.for_all(one))
        self.fleet.refuse_if_gone()
        return found

    def serving(self) -> list[str]:
        """Names of the servers that take traffic."""
        return [client.name for client in self.fleet.serving]

    def mark_failed(self, name: str, why: str) -> None:
        """See `Fleet.mark_failed`. The server did not pass a probe."""
        self.fleet.mark_failed(self._clients[name], why, spoiled=True)

    def close(self) -> None:
        """Abort the requests in flight, leave the weight group, stop the router and the event loop."""
        self._watching.cancel()
        self.run(self.stream.stop(abort=True, held_s=_CLOSE_S))
        self.run(self._delivery.close())
        self.run(self._http.aclose())
        if self._router is not None:
            self._router.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
