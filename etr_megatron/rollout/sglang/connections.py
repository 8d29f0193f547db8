"""Keep-alive connections to servers. The cost per request does not grow with the number of connections."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable

import httpx

from etr_megatron.platform.files import allow_open_files

logger = logging.getLogger(__name__)

_IDLE_S = 2.0
"""Seconds after which idle connections are closed. A server closes them after 5 seconds, perhaps just as a request is sent."""

_KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)]
"""Connections are silent while a response is generated. Probes every 60 seconds keep firewalls from forgetting them."""

_Idle = deque[tuple[float, httpx.AsyncHTTPTransport]]
"""Idle connections with the time of their last use, the most recent at the end."""


def allow_connections(count: int) -> None:
    """Raise this process's limit of open files for `count` connections. Warn if the hard limit does not allow so many.

    At the limit new connections fail, which looks as if the server were gone.
    """
    wanted, most = allow_open_files(count)
    if most < wanted:
        logger.warning(
            "sglang.concurrency: up to %d requests at a time need %d open files, but the system allows %d; raise "
            "`ulimit -Hn` or lower sglang.concurrency",
            count,
            wanted,
            most,
        )


class Connections(httpx.AsyncBaseTransport):
    """A transport of `httpx.AsyncClient` for any number of concurrent requests.

    httpx's own pool scans all its connections whenever a request begins or ends. Here every connection has a pool of its own.
    A request takes the most recently used idle connection, and closes connections that have been idle for too long.
    """

    def __init__(self) -> None:
        self._context = httpx.create_ssl_context()
        self._limits = httpx.Limits(max_connections=1, keepalive_expiry=_IDLE_S)
        self._idle: defaultdict[tuple[str, str, int | None], _Idle] = defaultdict(deque)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See `httpx.AsyncBaseTransport`."""
        idle = self._idle[(request.url.scheme, request.url.host, request.url.port)]
        connection = idle.pop()[1] if idle else self._new()

        def give_back() -> None:
            idle.append((time.monotonic(), connection))

        try:
            await _close(idle, before=time.monotonic() - _IDLE_S)
            response = await connection.handle_async_request(request)
        except BaseException:
            give_back()  # a broken connection reconnects by itself
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Body(response.stream, give_back)
        return response

    def _new(self) -> httpx.AsyncHTTPTransport:
        return httpx.AsyncHTTPTransport(verify=self._context, limits=self._limits, socket_options=_KEEP_ALIVE)

    async def aclose(self) -> None:
        """Close all idle connections."""
        for idle in self._idle.values():
            await _close(idle, before=math.inf)


async def _close(idle: _Idle, before: float) -> None:
    """Close the connections that were last used before this time."""
    while idle and idle[0][0] < before:
        await idle.popleft()[1].aclose()


class _Body(httpx.AsyncByteStream):
    """The body of a reply; returns the connection when it is closed."""

    def __init__(self, stream: httpx.AsyncByteStream, give_back: Callable[[], None]) -> None:
        self._stream, self._give_back = stream, give_back

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._give_back()
