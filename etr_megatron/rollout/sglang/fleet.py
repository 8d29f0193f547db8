"""Several servers as one: which servers take requests, and whether a server or the request is to blame for a failure."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from etr_megatron.rollout.engine import EngineGoneError, Place, RefusedError
from etr_megatron.rollout.sglang.client import GenerateParameters, ServerClient, ServerError
from etr_megatron.rollout.sglang.failures import Failures, GivenUpError
from etr_megatron.rollout.sglang.liveness import LivenessMonitor
from etr_megatron.rollout.sglang.replies import Generated
from etr_megatron.rollout.sglang.router import Router

logger = logging.getLogger(__name__)

_Answer = Callable[[ServerClient, Sequence[ServerClient]], Awaitable[Generated]]

_MAX_PROBLEMS = 3
"""A healthy server that answers requests of this many problems with an error, and completes no response in between, has failed.
Fewer problems may themselves be to blame."""

_WELL_S = 10.0
"""Seconds in which a server must prove healthy after a request failed there."""


@dataclass(frozen=True)
class Request:
    """One response to generate. problem: id of its problem; requests without an id share a problem if their prompts are equal.
    cached_at: if the request continues a dialogue, where that dialogue was generated."""

    prompt_ids: Sequence[int]
    parameters: GenerateParameters
    problem: str = ""
    cached_at: Place | None = None

    @property
    def problem_id(self) -> str:
        """Id of the problem that the response is for."""
        return self.problem or " ".join(map(str, self.prompt_ids))

    @property
    def size(self) -> str:
        """Its size, as text for messages."""
        return f"{len(self.prompt_ids)} prompt tokens and up to {self.parameters.max_new_tokens} response tokens"


@dataclass(frozen=True)
class _Asking:
    """A request in flight, with what is needed to handle its failure."""

    request: Request
    rid: str | None
    failures: Failures
    answer: _Answer


class Fleet:
    """Clients of all servers, and which of the servers take requests.

    timeout_s: of one response. hang_timeout_s: for a server to answer a liveness check, see `LivenessMonitor`. router: chooses
    the server of a request; None if there is no router.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        *,
        timeout_s: float,
        hang_timeout_s: float,
        router: Router | None = None,
    ) -> None:
        self.clients, self.router = list(clients), router
        self.version: str | None = None
        """Weight version that responses must come from. None, before the first sync, allows any."""
        self.apart: str | None = None
        """The server that the router must not use."""
        self.in_sync = False
        """Whether a weight sync is open. A server that fails meanwhile may have weights of two versions."""
        self._timeout_s, self._hang_timeout_s = timeout_s, hang_timeout_s
        self._failed: dict[str, str] = {}
        self._spoiled: set[str] = set()
        self._problems: defaultdict[str, set[str]] = defaultdict(set)  # see `_MAX_PROBLEMS`
        self._joins: Counter[str] = Counter()
        self._marks = 0
        self._looking = asyncio.Lock()
        self._liveness = LivenessMonitor(hang_timeout_s, self.mark_failed)

    @property
    def serving(self) -> list[ServerClient]:
        """The servers that take requests, in order."""
        return [client for client in self.clients if client.name not in self._failed]

    @property
    def failed(self) -> dict[str, str]:
        """Name of each failed server -> why it takes no requests."""
        return dict(self._failed)

    @property
    def members(self) -> list[tuple[str, int]]:
        """Name of each serving server, and how often it has rejoined. Equal lists mean the same server processes."""
        return [(client.name, self._joins[client.name]) for client in self.serving]

    @property
    def spoiled(self) -> set[str]:
        """The failed servers that may be healthy and still not usable without a restart."""
        return set(self._spoiled)

    def mark_failed(self, client: ServerClient, why: str, *, spoiled: bool = False) -> None:
        """Send no more requests to this server until `rejoin`. spoiled: see the property; always the case in a weight sync."""
        why = why.removeprefix(f"{client.name}: ")
        if client.name not in self._failed:
            logger.warning("%s gets no more requests: %s", client.name, why)
        self._failed[client.name] = why
        self._marks += 1
        if spoiled or self.in_sync:
            self._spoiled.add(client.name)

    def rejoin(self, client: ServerClient) -> None:
        """Send requests to this server again. The caller ensures that it has the current weights before the next request."""
        if self._failed.pop(client.name, None) is not None:
            self._joins[client.name] += 1
        self._spoiled.discard(client.name)
        self._problems.pop(client.name, None)

    def refuse_if_gone(self) -> None:
        """Raises EngineGoneError, with each server's reason, when no server takes requests."""
        if not self.serving:
            reasons = "; ".join(f"{client.name}: {self._failed[client.name]}" for client in self.clients)
            raise EngineGoneError(f"no SGLang server is left: {reasons}")

    async def ask(
        self,
        client: ServerClient,
        request: Request,
        rid: str | None = None,
        *,
        failures: Failures | None = None,
        may_abort: Callable[[], bool] = lambda: False,
        elsewhere: Callable[[Sequence[ServerClient]], ServerClient] = lambda others: others[0],
        group: Callable[[], int | None] = lambda: None,
    ) -> Generated:
        """One response from `client` or, with a router, from the server that the router chooses. Failures:

        - The request fails at `client`: that server is marked, and ServerError is raised. A response that was cut off, unless
          `may_abort()`, counts as a failure; so does a response from other weights, as after a manual restart of the server.
        - `client` answers with an error, such as 500 for a request that does not fit into its KV cache, and is healthy: the
          request goes to another server. `client` is only marked after errors for `_MAX_PROBLEMS` problems.
        - The request fails behind a router, which does not tell which server failed: unhealthy servers are marked. If all are
          healthy, the router is given up, so that fewer parts are left that can fail.
        - `client` refuses the request: it goes to another server, chosen by `elsewhere`, as those at `sglang.urls` may differ.
          If that server accepts it, `client` is marked; if not, RefusedError is raised, and no server is marked.
        - It is refused through a router: it goes to `client` directly, because the router may have limits of its own.
        - The request itself is at fault, see `_failed_at`: GivenUpError is raised.

        failures: those of this request so far, one object for all its attempts; it also counts the servers that died. group:
        the attention group for the request at `client` or, after `elsewhere`, at that server; a router is not told.
        """
        router, marks = self.router, self._marks
        behind = [one for one in self.serving if one.name != self.apart]
        routed = router is not None and await router.leads_to(one.url for one in behind)
        asked = router.client if router is not None and routed else client
        answer = partial(self._reply, request=request, rid=rid, may_abort=may_abort, group=group)
        asking = _Asking(request, rid, failures if failures is not None else Failures(), answer)
        try:
            return await answer(asked, behind if routed else [client])
        except RefusedError as refusal:
            if router is not None and routed:
                return await self._ask_past(router, client, asking, refusal)
            return await self._ask_another(client, asking, elsewhere, refusal)
        except ServerError as error:
            if router is not None and routed:
                await self._failed_behind(router, marks, asking, error)
            elif await self._failed_at(client, asking, error):
                return await self._ask_another(client, asking, elsewhere, error)
            raise

    async def _failed_at(self, client: ServerClient, asking: _Asking, error: ServerError) -> bool:
        """Mark the server at which a request failed, with three exceptions; the caller repeats the request.

        - The last server is only marked if it is unreachable or unhealthy.
        - A healthy server is not marked when a connection of this request breaks for the first time; it aborts the request.
        - A healthy server that answered with an error keeps serving, see `ask`. Only after such an answer this returns True.

        Raises GivenUpError when the request has failed at `_AT_WELL_SERVERS` servers that were healthy afterwards, because it
        would then fail at all others too.
        """
        failures = asking.failures
        if error.broken and not failures.broke and await self._is_well(client, asking.rid):
            failures.broke = True
            logger.warning("%s; the server is healthy, so the request is repeated", error)
            return False
        answered = error.status is not None and await self._is_well(client)
        has_no_part = not error.reached
        is_last = self.serving == [client]
        if answered:
            self._problems[client.name].add(asking.request.problem_id)
        keeps_serving = is_last or (answered and len(self._problems[client.name]) < _MAX_PROBLEMS)
        if has_no_part or not keeps_serving:
            self.mark_failed(client, str(error))
        elif answered:
            logger.warning("%s; the server is healthy and keeps serving", error)
        if has_no_part:
            return False
        well = answered or await self._is_well(client)
        failures.add(str(error), well=well)
        if is_last and not well:
            self.mark_failed(client, str(error))
        if failures.are_its_own:
            said = "; ".join(failures.said)
            raise GivenUpError(f"a request with {asking.request.size} failed {len(failures.said)} times: {said}")
        return answered

    async def _failed_behind(self, router: Router, marks: int, asking: _Asking, error: ServerError) -> None:
        """Mark unhealthy servers, or give up the router if all are healthy. marks: `_marks` when the request began."""
        async with self._looking:
            if router.is_up and self._marks == marks:
                await self.for_all(self._see_that_it_is_well)
            if self._marks == marks:
                router.give_up(str(error))
                return
        asking.failures.add(str(error), well=False)

    async def survives(self, client: ServerClient, request: Request, rid: str) -> bool | None:
        """Whether `client` survives a request that may have killed another server; it is marked if not.

        None: the server was unhealthy before, or was not reached. Other errors are ignored: the request is repeated later.
        """
        if not await self._is_well(client):
            self.mark_failed(client, "is not healthy")
            return None
        try:
            with self._liveness.watch([client]):
                await client.generate(request.prompt_ids, request.parameters, timeout_s=self._timeout_s, rid=rid)
        except RefusedError:
            return True
        except ServerError as error:
            if await self._is_well(client):
                return True
            self.mark_failed(client, str(error))
            return False if error.reached else None
        return True

    async def _is_well(self, client: ServerClient, rid: str | None = None) -> bool:
        """Whether the server is alive, has the current weights, generates, and acknowledges an abort of `rid` if given."""
        timeout_s = min(_WELL_S, self._hang_timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                if rid is not None:
                    await client.abort(rid, timeout_s=timeout_s)
                await self._see_that_it_is_well(client)
                return await client.is_healthy(timeout_s)
        except (ServerError, TimeoutError):
            return False

    async def _reply(
        self,
        asked: ServerClient,
        servers: Sequence[ServerClient],
        *,
        request: Request,
        rid: str | None,
        may_abort: Callable[[], bool],
        group: Callable[[], int | None],
    ) -> Generated:
        """One response, checked. servers: those that may answer."""
        is_router = self.router is not None and asked is self.router.client
        chosen, timeout_s = None if is_router else group(), self._timeout_s
        with self._liveness.watch(servers):
            reply = await asked.generate(request.prompt_ids, request.parameters, timeout_s=timeout_s, rid=rid, group=chosen)
        if reply.finish_reason == "abort" and not may_abort():
            raise ServerError(f"{asked.name}: aborted a request that it was not asked to abort")
        if reply.ids and self.version not in (None, reply.version):
            raise ServerError(f"{asked.name}: generated with weights of version {reply.version} instead of {self.version}")
        if is_router:
            self._problems.clear()
        self._problems.pop(asked.name, None)
        return reply

    async def _ask_past(self, router: Router, client: ServerClient, asking: _Asking, refusal: RefusedError) -> Generated:
        """Ask `client` directly after a refusal through the router. If `client` accepts the request, the router is given up."""
        try:
            reply = await asking.answer(client, [client])
        except RefusedError:
            raise
        except ServerError as error:
            await self._failed_at(client, asking, error)
            raise
        router.give_up(str(refusal))
        return reply

    async def _ask_another(
        self,
        client: ServerClient,
        asking: _Asking,
        elsewhere: Callable[[Sequence[ServerClient]], ServerClient],
        error: RefusedError | ServerError,
    ) -> Generated:
        """Ask another server after `client` answered with an error. Raises that error if the other server refuses too, or none
        is left. A server that alone refuses a request is marked."""
        while others := [one for one in self.serving if one is not client]:
            other = elsewhere([one for one in others if one.name != self.apart] or others)
            deaths = asking.failures.deaths
            try:
                reply = await asking.answer(other, [other])
            except RefusedError:
                break
            except ServerError as failure:
                await self._failed_at(other, asking, failure)
                if asking.failures.deaths > deaths:
                    raise  # where it is asked next depends on its deaths
                continue
            if isinstance(error, RefusedError):
                self.mark_failed(client, str(error))
            return reply
        raise error

    async def for_all(self, step: Callable[[ServerClient], Awaitable[Any]]) -> bool:
        """`await step(client)` for all serving servers concurrently. A server for which it raises ServerError is marked failed.

        Returns whether it raised for none.
        """

        async def one(client: ServerClient) -> bool:
            try:
                await step(client)
            except ServerError as error:
                self.mark_failed(client, str(error))
                return False
            return True

        return all(await asyncio.gather(*map(one, self.serving)))

    async def call_all(self, route: str, body: dict[str, Any], *, timeout_s: float) -> bool:
        """POST to all serving servers concurrently, as `for_all`."""
        return await self.for_all(lambda client: client.call(route, body, timeout_s=timeout_s))

    async def see_that_they_live(self, timeout_s: float) -> None:
        """Mark serving servers that do not answer. Paused servers answer too."""
        await self.for_all(lambda client: self._see_that_it_lives(client, timeout_s))

    async def _see_that_it_lives(self, client: ServerClient, timeout_s: float) -> None:
        if not await client.is_alive(timeout_s):
            raise ServerError(f"{client.name}: does not answer")

    async def _see_that_it_is_well(self, client: ServerClient) -> None:
        await self._see_that_it_lives(client, self._hang_timeout_s)
        found = await client.weight_version(self._hang_timeout_s)
        if self.version not in (None, found):
            raise ServerError(f"{client.name}: has weights of version {found} instead of {self.version}")

    async def abort_all(self, timeout_s: float) -> bool:
        """Have serving servers abort all their requests; as `for_all`."""
        return await self.call_all("/abort_request", {"rid": "", "abort_all": True}, timeout_s=timeout_s)
