"""HTTP clients of SGLang servers: every reply is checked, every request has a timeout."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from etr_megatron.rollout.engine import RefusedError
from etr_megatron.rollout.sglang.replies import Generated, OtherTokensError, read_generated

_REFUSALS = (400, 413, 422)
"""Status codes that reject the request itself: every server should answer the same."""

_MAX_PATTERN_BYTES = 256
"""Longest `stop_regex` that SGLang accepts, in bytes (`sampling/sampling_params.py`, 0.5.21)."""

PATIENCE = 10
"""Longest time for a response while the server completes others, as a multiple of `request_timeout_s`."""


class ServerError(RuntimeError):
    """A request to a server failed; the message names the server, the route and the answer.

    status: HTTP status, if the server answered. reached: whether the server may have received the request; False if no
    connection was made. broken: the connection failed, which is no evidence that the server is at fault.
    """

    def __init__(self, message: str, status: int | None = None, *, reached: bool = True, broken: bool = False) -> None:
        super().__init__(message)
        self.status, self.reached, self.broken = status, reached, broken


@dataclass(frozen=True)
class GenerateParameters:
    """Sampling parameters of one request, in SGLang's terms. routing: whether the reply must include the chosen experts.
    stop_strings: need a server with a tokenizer."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_ids: Sequence[int]
    stop_strings: Sequence[str] = ()
    ignore_eos: bool = False
    routing: bool = False

    def as_json(self) -> dict[str, Any]:
        """The `sampling_params` of `/generate`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k if self.top_k > 0 else -1,
            "sampling_seed": self.seed % (1 << 31),
            "stop_token_ids": list(self.stop_ids),
            "skip_special_tokens": False,
            "ignore_eos": self.ignore_eos,
            **_stops(self.stop_strings),
        }


def _stops(texts: Sequence[str]) -> dict[str, Any]:
    """Parameters that end a response with the token in which one of these texts ends.

    SGLang (0.5.21) matches texts in a window of the last tokens: one more token than its tokenizer makes of the longest text.
    But the model may generate that text in more tokens. A pattern (`stop_regex`) widens the window, for texts too, to one more
    token than the pattern has characters.
    """
    if not texts:
        return {}
    pattern = re.escape(max(texts, key=len))
    return {"stop": list(texts), **({"stop_regex": [pattern]} if len(pattern.encode()) <= _MAX_PATTERN_BYTES else {})}


class ServerClient:
    """Client of one server. `http` is shared by all clients of a fleet and keeps connections open between requests.

    groups: number of its attention groups, each of which caches prefixes on its own.
    """

    def __init__(self, name: str, url: str, http: httpx.AsyncClient) -> None:
        self.name, self.url, self._http = name, url.rstrip("/"), http
        self.groups = 1
        self._routes: frozenset[str] | None = None
        # Deadlines of the requests in flight -> (timeout in seconds, event-loop time beyond which it is not extended).
        self._deadlines: dict[asyncio.Timeout, tuple[float, float]] = {}

    async def learn_routes(self, required: Iterable[str], *, timeout_s: float) -> None:
        """Ask the server for its routes, which differ between versions. Raises ServerError naming a required route that is
        missing.

        A server that does not list its routes (DISABLE_OPENAPI_DOC) is assumed to have all.
        """
        try:
            self._routes = frozenset((await self.get("/openapi.json", timeout_s=timeout_s))["paths"])
        except ServerError as error:
            if error.status != 404:
                raise
            self._routes = None
        missing = [route for route in required if not self.has(route)]
        if missing:
            raise ServerError(
                f"{self.name} at {self.url} has no route {missing[0]}, which the job needs; use SGLang 0.5.17 or newer"
            )

    def has(self, route: str) -> bool:
        """Whether the server has a route; True if its routes are not known."""
        return self._routes is None or route in self._routes

    async def _request(self, method: str, route: str, body: dict[str, Any] | None, timeout_s: float | None) -> bytes:
        """The body of the reply. Raises ServerError for no answer and for a status other than 200."""
        try:
            async with asyncio.timeout(timeout_s):  # httpx restarts its timeout with every chunk that arrives
                reply = await self._http.request(method, self.url + route, json=body, timeout=timeout_s)
        except (OSError, httpx.HTTPError) as error:
            if timeout_s is not None and isinstance(error, TimeoutError | httpx.TimeoutException):
                raise ServerError(f"{self.name}: {route} did not answer within {timeout_s:g} s") from error
            raise ServerError(
                f"{self.name}: {route} failed: {str(error) or type(error).__name__}",
                reached=not isinstance(error, httpx.ConnectError),
                broken=isinstance(error, OSError | httpx.TransportError),
            ) from error
        if reply.status_code != 200:
            raise ServerError(f"{self.name}: {route} answered {reply.status_code}: {reply.text[:300]}", reply.status_code)
        return reply.content

    async def call(self, route: str, body: dict[str, Any] | None = None, *, timeout_s: float | None) -> dict[str, Any]:
        """POST; returns the reply's JSON object, {} if it is not one. timeout_s: None if the caller has a deadline.

        Raises ServerError for no answer, a status other than 200, and an answer with `success: false`.
        """
        try:
            found = json.loads(await self._request("POST", route, body or {}, timeout_s))
        except ValueError:
            return {}
        if isinstance(found, dict) and found.get("success") is False:
            raise ServerError(f"{self.name}: {route}: {found.get('message', 'refused without a reason')}")
        return found if isinstance(found, dict) else {}

    async def get(self, route: str, *, timeout_s: float) -> dict[str, Any]:
        """GET; returns the reply's JSON object. Raises ServerError as `call` does."""
        reply = await self._request("GET", route, None, timeout_s)
        try:
            found = json.loads(reply) if reply else {}
        except ValueError as error:
            raise ServerError(f"{self.name}: {route} did not answer with JSON: {_begin_of(reply)}") from error
        return found if isinstance(found, dict) else {}

    async def is_healthy(self, timeout_s: float) -> bool:
        """Whether the server generates. Not meaningful for a paused server, which does not generate."""
        return await self._answers("/health", timeout_s)

    async def is_alive(self, timeout_s: float) -> bool:
        """Whether the server and its workers answer, paused or not."""
        return await self._answers("/server_info", timeout_s)

    async def _answers(self, route: str, timeout_s: float) -> bool:
        try:
            await self.get(route, timeout_s=timeout_s)
        except ServerError:
            return False
        return True

    async def weight_version(self, timeout_s: float) -> str:
        """Version of the server's weights, as the last weight sync set it."""
        return str((await self.get("/model_info", timeout_s=timeout_s)).get("weight_version"))

    async def generate(
        self,
        prompt_ids: Sequence[int],
        parameters: GenerateParameters,
        *,
        timeout_s: float,
        rid: str | None = None,
        group: int | None = None,
    ) -> Generated:
        """One response. Raises RefusedError and ServerError; the latter also if the log-probs are not those of the tokens.

        rid: request id for `abort`; an aborted reply has the tokens so far. timeout_s: the request times out when the server
        has completed no response at all for so long, because a busy server lets requests wait in its queue. group: the
        attention group that generates; the server chooses if it is None, or if the server does not know this field.
        """
        body = {
            "input_ids": list(prompt_ids),
            "sampling_params": parameters.as_json(),
            "return_logprob": True,
            "logprob_start_len": -1,
            **({"return_routed_experts": True} if parameters.routing else {}),
            **({} if rid is None else {"rid": rid}),
            **({} if group is None else {"routed_dp_rank": group}),
        }
        try:
            reply = await self._complete(body, timeout_s)
        except ServerError as error:
            if error.status in _REFUSALS:
                size = f"{len(prompt_ids)} prompt tokens and up to {parameters.max_new_tokens} response tokens"
                raise RefusedError(f"{error} (a request with {size})") from error
            raise
        try:
            return read_generated(reply, routing=parameters.routing)
        except OtherTokensError as error:
            raise ServerError(f"{self.name}: /generate returned log-probs of other tokens than it generated") from error
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise ServerError(f"{self.name}: /generate returned an unexpected reply ({error!r}): {_begin_of(reply)}") from error

    async def _complete(self, body: dict[str, Any], timeout_s: float) -> bytes:
        """The body of the reply to `/generate`. A reply restarts the timeout of all other requests in flight, up to `PATIENCE`
        timeouts in total, because a server may lose a request."""
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                self._deadlines[deadline] = timeout_s, asyncio.get_running_loop().time() + PATIENCE * timeout_s
                try:
                    reply = await self._request("POST", "/generate", body, None)
                finally:
                    del self._deadlines[deadline]
        except TimeoutError as error:
            raise ServerError(f"{self.name}: /generate completed no response within {timeout_s:g} s") from error
        now = asyncio.get_running_loop().time()
        for other, (patience_s, last) in self._deadlines.items():
            if not other.expired():
                other.reschedule(min(now + patience_s, last))
        return reply

    async def abort(self, rid: str, *, timeout_s: float) -> None:
        """Cut off the request with this id, if the server has it. Raises ServerError."""
        await self.call("/abort_request", {"rid": rid, "abort_all": False}, timeout_s=timeout_s)


def _begin_of(reply: bytes) -> str:
    return reply[:300].decode(errors="replace")
