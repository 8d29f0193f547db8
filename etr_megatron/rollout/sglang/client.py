"""HTTP clients of SGLang servers: every reply is checked, every request has a timeout."""

from __future__ import annotations

import asyncio
import base64
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from etr_megatron.rollout.engine import Place, RefusedError
from etr_megatron.types import FinishReason

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture

_REFUSALS = (400, 413, 422)
"""Status codes that reject the request itself: every server should answer the same."""

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}

_LONGEST_PATTERN = 256
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
class Generated:
    """What a server generated for one request.

    ids: response token ids. logprobs: log-prob of each, under the tempered distribution. version: weight version at the last
    token, as the server reports it. given_up: why the request was given up, if it was; there are no tokens then. routing: if
    requested, the experts, in all layers, of all tokens of prompt and response but the last; see `of_expert_layers`. place:
    the server that was asked, and its group.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    version: str
    given_up: str = ""
    routing: array[int] = field(default_factory=lambda: array("B"))
    place: Place | None = None

    def without_tokens(self) -> Generated:
        """The reply as if nothing had been generated, with its reason."""
        return Generated([], [], self.finish_reason, self.version, self.given_up)


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
    But the model may draw that text in more tokens. A pattern (`stop_regex`) widens the window, for texts too, to one more
    token than the pattern has characters.
    """
    if not texts:
        return {}
    pattern = re.escape(max(texts, key=len))
    return {"stop": list(texts), **({"stop_regex": [pattern]} if len(pattern.encode()) <= _LONGEST_PATTERN else {})}


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

    async def _request(self, method: str, route: str, body: dict[str, Any] | None, timeout_s: float | None) -> httpx.Response:
        try:
            async with asyncio.timeout(timeout_s):  # httpx restarts its timeout with every chunk that arrives
                return await self._http.request(method, self.url + route, json=body, timeout=timeout_s)
        except (OSError, httpx.HTTPError) as error:
            if timeout_s is not None and isinstance(error, TimeoutError | httpx.TimeoutException):
                raise ServerError(f"{self.name}: {route} did not answer within {timeout_s:g} s") from error
            raise ServerError(
                f"{self.name}: {route} failed: {str(error) or type(error).__name__}",
                reached=not isinstance(error, httpx.ConnectError),
                broken=isinstance(error, OSError | httpx.TransportError),
            ) from error

    async def call(self, route: str, body: dict[str, Any] | None = None, *, timeout_s: float | None) -> dict[str, Any]:
        """POST; returns the reply's JSON object, {} if it is not one. timeout_s: None if the caller has a deadline.

        Raises ServerError for no answer, a status other than 200, and an answer with `success: false`.
        """
        reply = await self._request("POST", route, body or {}, timeout_s)
        if reply.status_code != 200:
            raise ServerError(f"{self.name}: {route} answered {reply.status_code}: {reply.text[:300]}", reply.status_code)
        try:
            found = reply.json()
        except ValueError:
            return {}
        if isinstance(found, dict) and found.get("success") is False:
            raise ServerError(f"{self.name}: {route}: {found.get('message', 'refused without a reason')}")
        return found if isinstance(found, dict) else {}

    async def get(self, route: str, *, timeout_s: float) -> dict[str, Any]:
        """GET; returns the reply's JSON object. Raises ServerError as `call` does."""
        reply = await self._request("GET", route, None, timeout_s)
        if reply.status_code != 200:
            raise ServerError(f"{self.name}: {route} answered {reply.status_code}: {reply.text[:300]}", reply.status_code)
        try:
            found = reply.json() if reply.content else {}
        except ValueError as error:
            raise ServerError(f"{self.name}: {route} did not answer with JSON: {reply.text[:300]}") from error
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
            ids, meta = list(map(int, reply["output_ids"] or [])), reply["meta_info"]
            finish_reason = _FINISH[meta["finish_reason"]["type"]]
            # A request that was aborted before it began has no log-probs.
            pairs = meta["output_token_logprobs"] if ids or finish_reason != "abort" else []
            logprobs, of = [float(pair[0]) for pair in pairs], [pair[1] for pair in pairs]
            routing = _routing(meta) if parameters.routing and finish_reason != "abort" else array("B")
            found = Generated(ids, logprobs, finish_reason, str(meta.get("weight_version")), routing=routing)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ServerError(f"{self.name}: /generate returned an unexpected reply ({error!r}): {str(reply)[:300]}") from error
        if of != ids:
            raise ServerError(f"{self.name}: /generate returned log-probs of other tokens than it generated")
        return found

    async def _complete(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply to `/generate`. A reply restarts the timeout of all other requests in flight, up to `PATIENCE` timeouts in
        total, because a server may lose a request."""
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                self._deadlines[deadline] = timeout_s, asyncio.get_running_loop().time() + PATIENCE * timeout_s
                try:
                    reply = await self.call("/generate", body, timeout_s=None)
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


def of_expert_layers(routing: array[int], model: Architecture) -> array[int]:
    """Convert `Generated.routing` to that of `Sample`: without the dense layers, for which SGLang (0.5.21) returns zeros.
    Unchanged if the reply does not include dense layers."""
    experts = model.experts
    if experts is None or not experts.dense_layers or len(routing) % (model.layers * experts.per_token):
        return routing
    chosen = np.frombuffer(routing, np.uint8).reshape(-1, model.layers, experts.per_token)
    if chosen[:, sorted(experts.dense_layers)].any():  # it has only expert layers, and its size fits by chance
        return routing
    return array("B", chosen[:, model.expert_layers].tobytes())


def _routing(meta: dict[str, Any]) -> array[int]:
    """Decode SGLang's base64 of int32 [tokens, layers, experts per token] (`state_capturer/routed_experts.py`, 0.5.21)."""
    experts = np.frombuffer(base64.b64decode(meta["routed_experts"], validate=True), np.int32)
    return array("B", experts.astype(np.uint8).tobytes())
