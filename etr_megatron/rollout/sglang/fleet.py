"""Several servers as one: which of them take traffic, and whether a failure is a server's or the request's own."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from etr_megatron.rollout.engine import EngineGoneError, RefusedError
from etr_megatron.rollout.sglang.client import Generated, GenerateParameters, ServerClient, ServerError
from etr_megatron.rollout.sglang.failures import Failures, GivenUpError
from etr_megatron.rollout.sglang.liveness import LivenessMonitor
from etr_megatron.rollout.sglang.router import Router

logger = logging.getLogger(__name__)

_Answer = Callable[[ServerClient, Sequence[ServerClient]], Awaitable[Generated]]

_WELL_S = 10.0
"""Time for a server to show that it is well after a request failed there."""


@dataclass(frozen=True)
class Request:
    """One response to generate. problem: id of its problem; requests without one share a problem if their prompts are equal.
    cached_at: name of the server that drew the dialogue which it continues, if it does."""

    prompt_ids: Sequence[int]
    parameters: GenerateParameters
    problem: str = ""
    cached_at: str = ""

    @property
    def problem_id(self) -> str:
        """Id of the problem that the response is for."""
        return self.problem or " ".join(map(str, self.prompt_ids))

    @property
    def size(self) -> str:
        """Its size in words."""
        return f"{len(self.prompt_ids)} prompt tokens and up to {self.parameters.max_new_tokens} response tokens"


@dataclass(frozen=True)
class _Asking:
    """A request under way, with what is needed to handle its failure."""

    request: Request
    rid: str | None
    failures: Failures
    answer: _Answer


class Fleet:
    """Clients of all servers, and which of them take traffic.

    timeout_s: of one response. hang_timeout_s: for a server to answer a liveness check, see `LivenessMonitor`. router: chooses
    the server of a request, if there is one.
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
        """Version of the weights that responses must come from; None, before the first sync, allows any."""
        self.apart: str | None = None
        """The server that the router must not use."""
        self._timeout_s, self._hang_timeout_s = timeout_s, hang_timeout_s
        self._failed: dict[str, str] = {}
        self._joins: Counter[str] = Counter()
        self._marks = 0
        self._looking = asyncio.Lock()
        self._liveness = LivenessMonitor(hang_timeout_s, self.mark_failed)

    @property
    def serving(self) -> list[ServerClient]:
        """The servers that take traffic, in order."""
        return [client for client in self.clients if client.name not in self._failed]

    @property
    def failed(self) -> dict[str, str]:
        """Name -> why it takes no traffic."""
        return dict(self._failed)

    @property
    def members(self) -> list[tuple[str, int]]:
        """Name of each serving server and how often it has rejoined: equal lists mean the same processes."""
        return [(client.name, self._joins[client.name]) for client in self.serving]

    def mark_failed(self, client: ServerClient, why: str) -> None:
        """No more traffic to this server until `rejoin`."""
        why = why.removeprefix(f"{client.name}: ")
        if client.name not in self._failed:
            logger.warning("%s gets no more requests: %s", client.name, why)
        self._failed[client.name] = why
        self._marks += 1

    def rejoin(self, client: ServerClient) -> None:
        """Traffic again. The caller ensures that the server has the current weights before the next request."""
        if self._failed.pop(client.name, None) is not None:
            self._joins[client.name] += 1

    def refuse_if_gone(self) -> None:
        """Raises EngineGoneError, with each server's reason, when none takes traffic."""
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
    ) -> Generated:
        """One response from `client` or, with a router, from the server that it chooses.

        Raises the error after marking the server that failed. A response that was cut off is an error too, unless
        `may_abort()`, and so is one from other weights, as from a server that somebody restarted. A router does not tell which
        server failed: those that are not well are marked; if all are well, the router is given up, so that every failure leaves
        less to fail. What one server refuses goes to another, chosen by `elsewhere`, as those at `sglang.urls` may differ. If
        it takes the request, the one that refused has failed; if it does not, RefusedError is raised and no server has failed.
        What is refused through a router goes to `client` directly: the router may have limits of its own.

        failures: of this request so far, one object for all its attempts; it counts the servers that died. Raises GivenUpError
        when the request itself is at fault, see `_failed_at`.
        """
        router, marks = self.router, self._marks
        behind = [one for one in self.serving if one.name != self.apart]
        routed = router is not None and await router.leads_to(one.url for one in behind)
        asked = router.client if router is not None and routed else client
        answer = partial(self._reply, request=request, rid=rid, may_abort=may_abort)
        asking = _Asking(request, rid, failures if failures is not None else Failures(), answer)
        try:
            return await answer(asked, behind if routed else [client])
        except RefusedError as refusal:
            if router is not None and routed:
                return await self._ask_past(router, client, asking, refusal)
            return await self._ask_another(client, asking, elsewhere, refusal)
        except ServerError as error:
            if router is None or not routed:
                await self._failed_at(client, asking, error)
            else:
                await self._failed_behind(router, marks, asking, error)
            raise

    async def _failed_at(self, client: ServerClient, asking: _Asking, error: ServerError) -> None:
        """Mark the server at which a request failed, unless an exception below applies; the caller repeats the request.

        The last server is only marked when it is unreachable or not well. The first time that a request's connection breaks, a
        server that is well is not marked, and aborts what it may still have of the request. Raises GivenUpError when the
        request has failed at servers that were well afterwards: it would fail at all the others, too.
        """
        failures = asking.failures
        if error.broken and not failures.broke and await self._is_well(client, asking.rid):
            failures.broke = True
            logger.warning("%s; the server is healthy, so the request is repeated", error)
            return
        has_no_part = not error.reached
        is_last = self.serving == [client]
        if has_no_part or not is_last:
            self.mark_failed(client, str(error))
        if has_no_part:
            return
        well = await self._is_well(client)
        failures.add(str(error), well=well)
        if is_last and not well:
            self.mark_failed(client, str(error))
        if failures.are_its_own:
            said = "; ".join(failures.said)
            raise GivenUpError(f"a request with {asking.request.size} failed {len(failures.said)} times: {said}")

    async def _failed_behind(self, router: Router, marks: int, asking: _Asking, error: ServerError) -> None:
        """Mark the servers that are not well, or give up the router. marks: `_marks` when the request began."""
        async with self._looking:
            if router.is_up and self._marks == marks:
                await self.for_all(self._see_that_it_is_well)
            if self._marks == marks:
                router.give_up(str(error))
                return
        asking.failures.add(str(error), well=False)

    async def survives(self, client: ServerClient, request: Request, rid: str) -> bool | None:
        """Whether `client` survives a request that may have killed another server; it is marked if not.

        None: it was not well before, or not reached. Other failures of the request will show when it is repeated.
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
        """Whether the server is alive, has the weights and generates, and acknowledges an abort of `rid`."""
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
    ) -> Generated:
        """servers: those that may answer."""
        with self._liveness.watch(servers):
            reply = await asked.generate(request.prompt_ids, request.parameters, timeout_s=self._timeout_s, rid=rid)
        if reply.finish_reason == "abort" and not may_abort():
            raise ServerError(f"{asked.name}: aborted a request that it was not asked to abort")
        if reply.ids and self.version not in (None, reply.version):
            raise ServerError(f"{asked.name}: generated with weights of version {reply.version} instead of {self.version}")
        return reply

    async def _ask_past(self, router: Router, client: ServerClient, asking: _Asking, refusal: RefusedError) -> Generated:
        """Ask `client` directly after a refusal through the router, which is given up if the server takes the request."""
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
        refusal: RefusedError,
    ) -> Generated:
        """Ask another server after `client` refused. Raises the refusal if the other refuses as well or none is left to ask."""
        while others := [one for one in self.serving if one is not client]:
            other = elsewhere(others)
            try:
                reply = await asking.answer(other, [other])
            except RefusedError:
                break
            except ServerError as error:
                await self._failed_at(other, asking, error)
            else:
                self.mark_failed(client, str(refusal))
                return reply
        raise refusal

    async def for_all(self, step: Callable[[ServerClient], Awaitable[Any]]) -> bool:
        """`await step(client)` for every serving server at once. Those for which it raises ServerError take no more traffic.

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
        """POST to every serving server at once, as `for_all`."""
        return await self.for_all(lambda client: client.call(route, body, timeout_s=timeout_s))

    async def see_that_they_live(self, timeout_s: float) -> None:
        """Mark serving servers that do not answer, paused or not."""
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
        """Have serving servers cut off all their requests; as `for_all`."""
        return await self.call_all("/abort_request", {"rid": "", "abort_all": True}, timeout_s=timeout_s)
