"""SGLang's router in front of the servers, for generation alone: prompts with a beginning in common go where it is cached.

Which servers there are is the fleet's to say: the router's own health checks, retries and circuit breakers are off. Requests of
a weight sync, aborts and questions go to the servers directly. Spoken to as sglang-router 0.3 has it: `/workers`, where servers
are added (POST) and removed (DELETE `/workers/ID`) in the background.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from etr_megatron.config import SglangConfig
from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang.client import ServerClient, ServerError
from etr_megatron.rollout.sglang.hosts import Host
from etr_megatron.rollout.sglang.server import ServerCommand, free_port

logger = logging.getLogger(__name__)

NAME = "SGLang router"
_HOST = "127.0.0.1"
_ASK_S = 10.0
_POLL_S = 0.05


class Router:
    """A process on rank 0's machine, and the servers that it was told of. `client` generates by way of it.

    http: the fleet's. api_key: the servers', whom the router gives it. logs: directory for what it prints.
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
        """Start it, anew if it runs, without servers, and wait until it answers. Raises UserError when it does not."""
        self.stop()
        # Its metrics cannot be switched off; by default they are served to everybody, at a port that only one router can have.
        arguments = ["--prometheus-host", _HOST, "--prometheus-port", str(free_port(_HOST)), "--log-level", "warn"]
        timeout_s = math.ceil(self._config.request_timeout_s)
        arguments += ["--policy", str(self._config.router), "--request-timeout-secs", str(timeout_s)]
        arguments += ["--disable-health-check", "--disable-retries", "--disable-circuit-breaker"]
        arguments += ["--shutdown-grace-period-secs", "1"]
        python, launch = self._config.python, self._config.router_launch
        command = ServerCommand(python, launch, tuple(arguments), host=_HOST, told_by="request_id")
        self._host = Host({NAME: command}, self._logs, self._config.startup_timeout_s)
        started = self._host.start([NAME])[NAME]
        if started.problem is not None:
            raise UserError(f"sglang.router: {started.problem}")
        self.client.url, self._ids, self.is_up = started.url, {}, True
        self._told = frozenset()

    def restart_if_down(self) -> None:
        """After `give_up`; when it does not come back either, that is said, and requests go on without it."""
        if not self.is_up:
            try:
                self.start()
            except UserError as error:
                logger.warning("%s", error)

    def give_up(self, why: str) -> None:
        """No more requests by way of it until `restart_if_down`."""
        if self.is_up:
            logger.warning("requests go to the servers directly until the next weight sync: %s", why)
        self.is_up = False

    async def leads_to(self, urls: Iterable[str]) -> bool:
        """Whether requests can go by way of it, to these servers alone; it is told of those that came or went meanwhile."""
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
        """Raises ServerError when it does not take servers up, or does not let them go."""
        for url in self._ids.keys() - wanted:
            await self._ask("DELETE", f"/workers/{self._ids.pop(url)}")
        key = {"api_key": self._key} if self._key else {}
        for url in wanted - self._ids.keys():
            await self._ask("POST", "/workers", {"url": url, **key})
        deadline = asyncio.get_running_loop().time() + self._config.update_timeout_s
        while True:
            workers = (await self._ask("GET", "/workers"))["workers"]
            self._ids = {worker["url"]: worker["id"] for worker in workers if worker["is_healthy"]}
            if self._ids.keys() == wanted and len(workers) == len(wanted):
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
            async with asyncio.timeout(_ASK_S):  # httpx counts anew with every piece that arrives
                reply = await self._http.request(method, self.client.url + route, json=body, timeout=_ASK_S)
            if reply.is_success:
                return dict(reply.json())
        except (TimeoutError, httpx.HTTPError, ValueError) as error:
            raise ServerError(f"{NAME}: {method} {route} failed: {str(error) or type(error).__name__}") from error
        raise ServerError(f"{NAME}: {method} {route} answered {reply.status_code}: {reply.text[:300]}", reply.status_code)

    def stop(self) -> None:
        """End it and wait until nothing of it is left."""
        self.is_up = False
        if self._host is not None:
            self._host.stop()
            self._host = None
