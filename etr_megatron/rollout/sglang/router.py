"""SGLang's router in front of the servers, for generation only. It sends prompts to servers that have their prefix cached.

The fleet decides which servers the router uses: the router's own health checks, retries and circuit breakers are off. Weight
syncs, aborts and health checks go to the servers directly. The API is that of sglang-router 0.3: at `/workers` servers are
added (POST) and removed (DELETE `/workers/ID`) asynchronously.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from etr_megatron.config import SglangConfig, request_timeout_of, startup_timeout_of
from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang.client import PATIENCE, ServerClient, ServerError
from etr_megatron.rollout.sglang.hosts import Host
from etr_megatron.rollout.sglang.server import ServerCommand, free_port

logger = logging.getLogger(__name__)

NAME = "SGLang router"
_HOST = "127.0.0.1"
_ASK_S = 10.0
_POLL_S = 0.05


class Router:
    """A router process on rank 0's machine, and the list of its servers. `client` sends requests to the router.

    http: the fleet's client. api_key: the servers' key, which the router sends to them. logs: directory for its output.
    """

    def __init__(self, config: SglangConfig, http: httpx.AsyncClient, *, api_key: str | None, logs: Path) -> None:
        self._config, self._http, self._key, self._logs = config, http, api_key, logs
        self._host: Host | None = None
        self._ids: dict[str, str] = {}  # of workers, by URL
        self._told: frozenset[str] = frozenset()
        self._lock = asyncio.Lock()
        self.client = ServerClient(NAME, "", http)
        self.is_up = False

    def start(self) -> None:
        """Start or restart it, without servers, and wait until it answers. Raises UserError when it does not."""
        self.stop()
        # Its metrics cannot be switched off; by default they are served on all interfaces, at a fixed port.
        arguments = ["--prometheus-host", _HOST, "--prometheus-port", str(free_port(_HOST)), "--log-level", "warn"]
        timeout_s = math.ceil(PATIENCE * request_timeout_of(self._config))
        arguments += ["--policy", str(self._config.router), "--request-timeout-secs", str(timeout_s)]
        arguments += ["--disable-health-check", "--disable-retries", "--disable-circuit-breaker"]
        arguments += ["--shutdown-grace-period-secs", "1"]
        python, launch = self._config.python, self._config.router_launch
        command = ServerCommand(python, launch, tuple(arguments), host=_HOST, told_by="request_id")
        self._host = Host({NAME: command}, self._logs, startup_timeout_of(self._config))
        started = self._host.start([NAME])[NAME]
        if started.problem is not None:
            raise UserError(f"sglang.router: {started.problem}")
        self.client.url, self._ids, self.is_up = started.url, {}, True
        self._told = frozenset()

    def restart_if_down(self) -> None:
        """Restart it after `give_up`; if that fails, log a warning and go on without it."""
        if not self.is_up:
            try:
                self.start()
            except UserError as error:
                logger.warning("%s", error)

    def give_up(self, why: str) -> None:
        """Send no more requests through it until `restart_if_down`."""
        if self.is_up:
            logger.warning(
                "the router is not used until the next weight sync, and requests go to the servers directly: %s", why
            )
        self.is_up = False

    async def leads_to(self, urls: Iterable[str]) -> bool:
        """Whether requests can go through the router to exactly these servers. Adds and removes servers first if necessary."""
        wanted = frozenset(urls)
        if self.is_up and self._told != wanted:
            async with self._lock:
                try:
                    if self._told != wanted:
                        await self._tell(wanted)
                except ServerError as error:
                    self.give_up(str(error))
        return self.is_up

    async def _tell(self, wanted: frozenset[str]) -> None:
        """Add and remove servers until the router has exactly these. Raises ServerError if it does not within the timeout."""
        for url in self._ids.keys() - wanted:
            await self._ask("DELETE", f"/workers/{self._ids.pop(url)}")
        key = {"api_key": self._key} if self._key else {}
        for url in wanted - self._ids.keys():
            await self._ask("POST", "/workers", {"url": url, **key})
        deadline = asyncio.get_running_loop().time() + self._config.update_timeout_s
        while True:
            self._ids, known = _workers_of(await self._ask("GET", "/workers"))
            if self._ids.keys() == wanted and known == len(wanted):
                self._told = wanted
                return
            if asyncio.get_running_loop().time() > deadline:
                late = ", ".join(sorted(self._ids.keys() ^ wanted))
                raise ServerError(
                    f"{NAME}: servers were not added or removed within {self._config.update_timeout_s:g} s: {late}"
                )
            await asyncio.sleep(_POLL_S)

    async def _ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            async with asyncio.timeout(_ASK_S):  # httpx restarts its timeout with every chunk that arrives
                reply = await self._http.request(method, self.client.url + route, json=body, timeout=_ASK_S)
            if reply.is_success and isinstance(found := reply.json(), dict):
                return found
        except (OSError, httpx.HTTPError, ValueError) as error:
            raise ServerError(f"{NAME}: {method} {route} failed: {str(error) or type(error).__name__}") from error
        raise ServerError(f"{NAME}: {method} {route} answered {reply.status_code}: {reply.text[:300]}", reply.status_code)

    def stop(self) -> None:
        """Stop it and wait until all its processes have ended."""
        self.is_up = False
        if self._host is not None:
            self._host.stop()
            self._host = None


def _workers_of(reply: dict[str, Any]) -> tuple[dict[str, str], int]:
    """Ids of the healthy workers by URL, and the number of all workers, from the reply to `GET /workers`. Raises ServerError
    for a reply of another form, as from another version."""
    try:
        workers = reply["workers"]
        return {str(worker["url"]): str(worker["id"]) for worker in workers if worker["is_healthy"]}, len(workers)
    except (KeyError, TypeError) as error:
        raise ServerError(f"{NAME}: GET /workers returned an unexpected reply ({error!r}): {str(reply)[:300]}") from error
