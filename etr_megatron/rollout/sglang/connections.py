"""Connections to servers that stay open between requests, at a cost that does not grow with their number."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable

import httpx

_IDLE_S = 2.0
"""A connection idle for longer is closed: after 5 seconds a server closes it, perhaps while a request is on its way."""

_Idle = deque[tuple[float, httpx.AsyncHTTPTransport]]
"""When each was used last, the latest at the end."""


class Connections(httpx.AsyncBaseTransport):
    """A transport of `httpx.AsyncClient` for any number of requests at once.

    httpx's own pool looks at all its connections whenever a request begins or ends. Here every request has a pool of one, the
    one that was used last, and closes those that nobody has used for long.
    """

    def __init__(self) -> None:
        self._context = httpx.create_ssl_context()
        self._limits = httpx.Limits(max_connections=1, keepalive_expiry=_IDLE_S)
        self._idle: defaultdict[tuple[str, str, int | None], _Idle] = defaultdict(deque)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See `httpx.AsyncBaseTransport`."""
        idle = self._idle[(request.url.scheme, request.url.host, request.url.port)]
        connection = idle.pop()[1] if idle else httpx.AsyncHTTPTransport(verify=self._context, limits=self._limits)
        await _close(idle, before=time.monotonic() - _IDLE_S)

        def give_back() -> None:
            idle.append((time.monotonic(), connection))

        try:
            response = await connection.handle_async_request(request)
        except BaseException:
            give_back()  # what is broken in it, it makes anew
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Body(response.stream, give_back)
        return response

    async def aclose(self) -> None:
        """Close what is not in use."""
        for idle in self._idle.values():
            await _close(idle, before=math.inf)


async def _close(idle: _Idle, before: float) -> None:
    """Those that were used last before that time."""
    while idle and idle[0][0] < before:
        await idle.popleft()[1].aclose()


class _Body(httpx.AsyncByteStream):
    """A reply's bytes; after them the connection is free."""

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
