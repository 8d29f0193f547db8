"""Several servers as one: requests go where least is under way, and elsewhere when a server fails."""

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
from etr_megatron.rollout.sglang.pulse import Pulse
from etr_megatron.rollout.sglang.router import Router

logger = logging.getLogger(__name__)

_Answer = Callable[[ServerClient, Sequence[ServerClient]], Awaitable[Generated]]

_WELL_S = 10.0
"""For a server that a request failed at to show that it is well."""


@dataclass(frozen=True)
class Request:
    """One response to be generated. problem: whose; requests without it are of one problem if their prompts are the same."""

    prompt_ids: Sequence[int]
    parameters: GenerateParameters
    problem: str = ""

    @property
    def problem_id(self) -> str:
        """Of whose responses this is one."""
        return self.problem or " ".join(map(str, self.prompt_ids))

    @property
    def size(self) -> str:
        """In words."""
        return f"{len(self.prompt_ids)} prompt tokens and up to {self.parameters.max_new_tokens} to follow"


@dataclass(frozen=True)
class _Asking:
    """A request that is being asked: what is needed of it where it fails."""

    request: Request
    rid: str | None
    failures: Failures
    answer: _Answer


class Fleet:
    """Clients of all servers, and which of them take traffic.

    timeout_s: of one response; hang_timeout_s: for a server in doubt to say that it lives, see `Pulse`. router: chooses the
    server of a request, if there is one.
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
        """Of the weights that responses must come from; None, before the first sync, is any."""
        self.apart: str | None = None
        """The server that the router is to give nothing."""
        self._timeout_s, self._hang_timeout_s = timeout_s, hang_timeout_s
        self._failed: dict[str, str] = {}
        self._joins: Counter[str] = Counter()
        self._marks = 0
        self._looking = asyncio.Lock()
        self._pulse = Pulse(hang_timeout_s, self.mark_failed)

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
        """Name of each serving server and how often it has rejoined: two lists that are equal have had the same processes."""
        return [(client.name, self._joins[client.name]) for client in self.serving]

    def mark_failed(self, client: ServerClient, why: str) -> None:
        """No more traffic to this server until `rejoin`."""
        why = why.removeprefix(f"{client.name}: ")
        if client.name not in self._failed:
            logger.warning("%s takes no more requests: %s", client.name, why)
        self._failed[client.name] = why
        self._marks += 1

    def rejoin(self, client: ServerClient) -> None:
        """Traffic again. The caller sees to it that the server has the current weights before the next request."""
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
        """One response from `client`, or with a router from the server that this chooses.

        Raises what went wrong, after the server that failed is marked; a response that is cut off is an error as well, unless
        `may_abort()`, and so is one from other weights, as of a server that somebody has started anew. A router does not say
        which server failed: those that are not well are marked. When all are, the router is given up, so that every failure
        leaves less to fail. What one server calls wrong another is asked, which `elsewhere` chooses, as those at `sglang.urls`
        may differ: when it takes the request, who refused has failed; when it does not RefusedError is raised, which is no
        server's failure. Of what is refused through a router `client` itself is asked: the router may have limits of its own.

        failures: of this request before, one object for all its attempts; it says what has died. Raises GivenUpError where the
        request fails for its own sake, see `_failed_at`.
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
        except Exception as error:
            if router is None or not routed:
                await self._failed_at(client, asking, error)
            else:
                await self._failed_behind(router, marks, asking, error)
            raise

    async def _failed_at(self, client: ServerClient, asking: _Asking, error: Exception) -> None:
        """Mark a server that a request failed at, if it is the server that failed; the request is to be asked again.

        The last server is only marked when it is not well. For a connection that breaks none is marked that is well, once a
        request: what the server may still have of it is cut off. Raises GivenUpError when the request failed at servers that
        were well after it: it would fail at the next as well, and in the end at all.
        """
        failures = asking.failures
        is_broken = isinstance(error, ServerError) and error.broken
        if is_broken and not failures.broke and await self._is_well(client, asking.rid):
            failures.broke = True
            logger.warning("%s; the server is well, and the request is done again", error)
            return
        has_no_part = isinstance(error, ServerError) and not error.reached
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

    async def _failed_behind(self, router: Router, marks: int, asking: _Asking, error: Exception) -> None:
        """Mark the servers that are not well, or give up the router. marks: when the request began."""
        async with self._looking:
            if router.is_up and self._marks == marks:
                await self.for_all(self._see_that_it_is_well)
            if self._marks == marks:
                router.give_up(str(error))
                return
        asking.failures.add(str(error), well=False)

    async def survives(self, client: ServerClient, request: Request, rid: str) -> bool | None:
        """Whether `client` lives after a request that another may have died of; it is marked if not.

        None: it was not well before, or not reached. Whatever else a request may fail for is seen when it is asked again.
        """
        if not await self._is_well(client):
            self.mark_failed(client, "is not well")
            return None
        try:
            with self._pulse.watch([client]):
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
        """Whether it lives, has the weights and generates, and whether it took note of an abort of `rid`."""
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
        """servers: which may be the one that answers."""
        with self._pulse.watch(servers):
            reply = await asked.generate(request.prompt_ids, request.parameters, timeout_s=self._timeout_s, rid=rid)
        if reply.finish_reason == "abort" and not may_abort():
            raise ServerError(f"{asked.name}: aborted a request that nobody asked it to")
        if reply.ids and self.version not in (None, reply.version):
            raise ServerError(f"{asked.name}: generated with weights {reply.version} where {self.version} were sent")
        return reply

    async def _ask_past(self, router: Router, client: ServerClient, asking: _Asking, refusal: RefusedError) -> Generated:
        """Of what was refused on the way through the router, which is given up where the server takes the request."""
        try:
            reply = await asking.answer(client, [client])
        except RefusedError:
            raise
        except Exception as error:
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
        """Of what `client` refused. Raises the refusal where another refuses as well, or none is left to be asked."""
        while others := [one for one in self.serving if one is not client]:
            other = elsewhere(others)
            try:
                reply = await asking.answer(other, [other])
            except RefusedError:
                break
            except Exception as error:
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
            raise ServerError(f"{client.name}: has weights {found} where {self.version} were sent")

    async def abort_all(self, timeout_s: float) -> bool:
        """Have serving servers cut off all that they have in hand; as `for_all`."""
        return await self.call_all("/abort_request", {"rid": "", "abort_all": True}, timeout_s=timeout_s)
