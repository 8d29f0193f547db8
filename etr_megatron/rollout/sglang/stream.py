"""A stream of requests to a fleet, with replies one by one as they arrive: the basis of generation during training."""

from __future__ import annotations

import asyncio
import itertools
import queue
import uuid
from array import array
from collections import defaultdict
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from etr_megatron.rollout.engine import EngineGoneError, NeedsSyncError, Place
from etr_megatron.rollout.sglang.client import ServerClient, ServerError
from etr_megatron.rollout.sglang.dispatch import Dispatch
from etr_megatron.rollout.sglang.failures import Failures, GivenUpError
from etr_megatron.rollout.sglang.fleet import Fleet, Request
from etr_megatron.rollout.sglang.groups import AttentionGroups
from etr_megatron.rollout.sglang.replies import Generated
from etr_megatron.rollout.sglang.suspicions import Suspicions

_ABORT_TIMEOUT_S = 20.0
"""Seconds for a server to acknowledge an abort; a slower server counts as hanging."""

_GIVE_BACK_S = 5.0

_HELD_S = 60.0
"""Seconds for a server to return a request after it acknowledged the abort. After that it is assumed never to return it."""

_TEST_TOKENS = 16
"""Tokens generated in a prompt's first test. If another server dies with the prompt after it passed, the next test generates
the whole response."""

_HARMLESS_S = 1.0
"""Seconds that a server must have had a prompt, and still generate, before another server gets it too. A prompt that kills a
server mostly does so during its prefill or right after."""

_Reply = tuple[int, Generated] | Exception


class _Running(NamedTuple):
    """An attempt in flight. failures: those of its request. deaths: the servers that had died with it when this one began."""

    key: int
    client: ServerClient
    request: Request
    failures: Failures
    deaths: int
    group: int | None
    task: asyncio.Task[Any]


class RequestStream:
    """Requests in flight at the servers of a fleet, see `Dispatch`. All methods but `wait` run in the clients' event loop.

    Every key is answered once:
    - with the complete reply or, at `stop`, with the tokens so far
    - if the request itself is at fault, with the reason why it was given up
    - if no server is to blame for an error, by raising it where the reply is awaited, because a retry would fail again

    When a server fails, its requests are repeated at other servers from the beginning.

    concurrency: most requests in flight per server. exclusive: the servers have no other users, so that one call to each aborts
    all its requests; required with a router. suspicions: problems that may have killed servers.
    """

    def __init__(self, fleet: Fleet, *, concurrency: int, exclusive: bool, suspicions: Suspicions | None = None) -> None:
        self._fleet, self._exclusive, self._suspicions = fleet, exclusive, suspicions or Suspicions()
        self._requests: dict[int, Request] = {}
        self._failures: defaultdict[int, Failures] = defaultdict(Failures)
        self._concurrency = concurrency
        self._dispatch, self._groups = Dispatch(concurrency, self._suspicions.deaths), AttentionGroups()
        self._running: dict[str, _Running] = {}  # by request id, which is new for every attempt
        self._proving: dict[str, asyncio.Task[None]] = {}  # by problem id
        self._is_stopping = False
        self._failed_before: set[str] | None = None
        """Servers that the last weight sync did not bring back; None until the first requests after it."""
        self._name, self._attempts = uuid.uuid4().hex, itertools.count()
        self._replies: queue.SimpleQueue[_Reply] = queue.SimpleQueue()
        self._next: Exception | None = None  # an error that followed the replies which `wait` returned last
        self._awaited: dict[int, asyncio.Future[Generated]] = {}  # the requests of `answer`, by keys below 0
        self._own_keys = itertools.count(-1, -1)

    @property
    def in_flight(self) -> int:
        """Number of requests in flight, tests of problems included."""
        return len(self._running)

    async def submit(self, requests: Mapping[int, Request], *, first: bool = False) -> None:
        """Start these requests, in order; keys must be new, and 0 or more. first: ahead of all other waiting requests."""
        self._add(dict(reversed([*requests.items()])) if first else requests, first=first)

    async def answer(self, requests: Sequence[Request]) -> list[Generated]:
        """All responses, in the order of the requests. The requests go ahead of all other waiting requests.

        Raises EngineGoneError, NeedsSyncError and RefusedError; then none of the requests is in flight any more.
        """
        keyed = dict(zip(self._own_keys, requests, strict=False))
        found = {key: asyncio.get_running_loop().create_future() for key in keyed}
        self._awaited |= found
        self._add(dict(reversed(keyed.items())), first=True)
        try:
            return await asyncio.gather(*found.values())
        finally:
            self._withdraw(found.keys())

    def wait(self, timeout_s: float | None = None) -> list[tuple[int, Generated]]:
        """All replies since the last call; waits for at least one, up to `timeout_s`. May be called from any thread.

        Raises EngineGoneError when no server is left, NeedsSyncError when the only server left must not be risked, and
        RefusedError, which drops the refused request. Any other error is a bug; the request that caused it is dropped.
        """
        if self._next is not None:
            error, self._next = self._next, None
            raise error
        try:
            return self._taken(self._replies.get(timeout=timeout_s))
        except queue.Empty:
            return []

    async def stop(self, *, abort: bool, held_s: float | None = None) -> list[tuple[int, Generated]]:
        """All replies since the last call; no request is in flight when this returns.

        abort: abort the requests in flight, else wait for them. held_s: seconds after which a server that acknowledged an abort
        but returns nothing has failed; 60 by default. Requests that have no reply by then are dropped: their servers have
        failed, or they had not begun.
        """
        self._is_stopping = abort
        loop, held_s = asyncio.get_running_loop(), _HELD_S if held_s is None else held_s
        end = loop.time() + held_s
        while self._running:
            if abort:
                await self._abort_all()
                if loop.time() > end:
                    self._give_up_holders(held_s)
            # Repeated every half second, because an abort may arrive before its request.
            tasks = [running.task for running in self._running.values()]
            if tasks:
                await asyncio.wait(tasks, timeout=0.5 if abort else None)
        self._is_stopping = False
        for proving in self._proving.values():
            proving.cancel()
        self._proving.clear()
        self._next = None
        self._failures.clear()
        self._requests.clear()
        self._dispatch.clear()
        self._failed_before = None
        replies: list[tuple[int, Generated]] = []
        while not self._replies.empty():
            reply = self._replies.get()
            if isinstance(reply, tuple):  # an error would recur at the next `submit`
                replies.append(reply)
        return replies

    def _taken(self, first: _Reply) -> list[tuple[int, Generated]]:
        replies: list[tuple[int, Generated]] = []
        reply: _Reply = first
        while True:
            if not isinstance(reply, tuple):
                if replies:
                    self._next = reply
                    return replies
                raise reply
            replies.append(reply)
            try:
                reply = self._replies.get_nowait()
            except queue.Empty:
                return replies

    def _add(self, requests: Mapping[int, Request], *, first: bool = False) -> None:
        self._known_failed()
        for key, request in requests.items():
            self._requests[key] = request
            if (why := self._suspicions.given_up.get(request.problem_id)) is not None:
                self._answer(key, _given_up(why))
            else:
                cached_at = "" if request.cached_at is None else request.cached_at.server
                self._dispatch.add(key, request.problem_id, first=first, cached_at=cached_at)
        self._begin()

    def _known_failed(self) -> set[str]:
        """The value of `_failed_before`, which is set if it was None."""
        if self._failed_before is None:
            self._failed_before = set(self._fleet.failed)
        return self._failed_before

    def _withdraw(self, keys: Collection[int]) -> None:
        """Drop these requests of `answer`, whose replies are not awaited any more."""
        for key in keys:
            del self._awaited[key]
            self._requests.pop(key, None)
        self._dispatch.withdraw(keys)
        self._cancel(keys)

    def _begin(self) -> None:
        """Start waiting requests at servers with capacity."""
        fleet, loop = self._fleet, asyncio.get_running_loop()
        while not self._is_stopping:
            clients = {client.name: client for client in fleet.serving}
            spare_last = not self._known_failed().issuperset(fleet.failed)
            routed = fleet.router is not None
            order = self._dispatch.next(list(clients), spare_last=spare_last, routed=routed)
            fleet.apart = self._dispatch.apart
            if order is None:
                break
            # The id ends with a dot because SGLang's scheduler aborts every request whose id starts with the given id.
            rid, client = f"{self._name}-{next(self._attempts)}.", clients[order.server]
            request, failures = self._requests[order.key], self._failures[order.key]
            group = None if order.is_test else self._group(client, request)
            work: Coroutine[Any, Any, Any]
            work = self._test(client, request, rid) if order.is_test else self._ask(client, request, rid, failures)
            task = loop.create_task(work)
            self._running[rid] = _Running(order.key, client, request, failures, failures.deaths, group, task)
            # Not done by the task itself, because a task that is cancelled before it has begun runs none of its code.
            task.add_done_callback(partial(self._end_test if order.is_test else self._end, rid))
        for problem in self._dispatch.unproved:
            if problem not in self._proving:
                self._proving[problem] = loop.create_task(self._prove(problem))
        if self._dispatch.waits and not self._running and not self._is_stopping:
            self._fail()

    def _group(self, client: ServerClient, request: Request) -> int | None:
        """The attention group for a request that goes to this server; see `AttentionGroups.enter`."""
        share = min(self._concurrency, -(-len(self._requests) // len(self._fleet.serving)))
        at = request.cached_at
        cached_in = at.group if at is not None and at.server == client.name else None
        return self._groups.enter(client.name, client.groups, request.problem_id, share=share, cached_in=cached_in)

    async def _prove(self, problem: str) -> None:
        """Let the problem's requests go to several servers if the server that has them is healthy after `_HARMLESS_S`."""
        try:
            await asyncio.sleep(_HARMLESS_S)
            at = [one.client for one in self._running.values() if self._problem_of(one.key) == problem]
            if at and await at[0].is_healthy(_ABORT_TIMEOUT_S) and at[0].name not in self._fleet.failed:
                self._dispatch.mark_harmless(problem)
        except Exception as error:  # a bug, which would recur
            self._tell(error)
            return
        finally:
            self._proving.pop(problem, None)
        self._begin()

    def _problem_of(self, key: int) -> str | None:
        return self._requests[key].problem_id if key in self._requests else None

    def _fail(self) -> None:
        """Raise the reason why no request can start, see `_tell`."""
        error: Exception
        try:
            self._fleet.refuse_if_gone()
            names = ", ".join(name for name in self._fleet.failed if name not in self._known_failed())
            error = NeedsSyncError(
                f"requests that {names} may have died of are not sent to the last server; another must be brought back first"
            )
        except EngineGoneError as gone:
            error = gone
        self._tell(error)

    def _tell(self, error: Exception) -> None:
        """Raise the error wherever a reply is awaited."""
        for future in self._awaited.values():
            if not future.done():
                future.set_exception(error)
        if any(key >= 0 for key in self._requests):
            self._replies.put(error)

    async def _ask(self, client: ServerClient, request: Request, rid: str, failures: Failures) -> Generated:
        return await self._fleet.ask(
            client,
            request,
            rid,
            failures=failures,
            may_abort=lambda: self._is_stopping,
            elsewhere=partial(self._move, rid),
            group=lambda: self._running[rid].group,
        )

    def _end(self, rid: str, task: asyncio.Task[Generated]) -> None:
        """Answer the request of an attempt that has ended, or let it wait again if its reply is still awaited."""
        key, client, request, failures, deaths, group, _ = self._running.pop(rid)
        outcome: Generated | Exception | None = None
        try:
            outcome = task.result()
        except GivenUpError as error:
            outcome = _given_up(str(error))
        except (ServerError, asyncio.CancelledError):
            pass
        except Exception as error:  # a refusal; anything else is a bug
            outcome = error
        self._groups.leave(client.name, request.problem_id, group)
        if failures.deaths > deaths:
            self._dispatch.suspect(request.problem_id, client.name if self._fleet.router is None else "")
        self._dispatch.ended(key)
        if outcome is None and key in self._requests:
            self._dispatch.again(key)
        else:
            self._dispatch.forget(key)
        if outcome is not None:
            if isinstance(outcome, Generated) and outcome.finish_reason != "abort":
                self._dispatch.clear_of_suspicion(request.problem_id)
            self._answer(key, replace(outcome, place=Place(client.name, group)) if isinstance(outcome, Generated) else outcome)
        self._suspicions.write(self._dispatch.deaths)
        self._begin()

    def _move(self, rid: str, others: Sequence[ServerClient]) -> ServerClient:
        """Choose another server for a request that one refused; aborts of the request go to that server from now on."""
        clients, left = {client.name: client for client in others}, self._running[rid]
        self._groups.leave(left.client.name, left.request.problem_id, left.group)
        client = clients[self._dispatch.move(left.key, clients)]
        self._running[rid] = left._replace(client=client, group=self._group(client, left.request))
        return client

    async def _test(self, client: ServerClient, request: Request, rid: str) -> bool | None:
        parameters = request.parameters
        if self._dispatch.deaths[request.problem_id] == 1:
            parameters = replace(parameters, max_new_tokens=min(_TEST_TOKENS, parameters.max_new_tokens))
        return await self._fleet.survives(client, replace(request, parameters=parameters), rid)

    def _end_test(self, rid: str, task: asyncio.Task[bool | None]) -> None:
        """Judge the problem of a test that has ended. A cancelled test is repeated."""
        key, client, request, *_ = self._running.pop(rid)
        survived: bool | None = None
        fault: Exception | None = None
        try:
            survived = task.result()
        except asyncio.CancelledError:
            pass
        except Exception as error:
            fault = error
        keys = self._dispatch.end_test(survived=None if survived and self._is_stopping else survived)
        if survived is False:
            lost = f"{client.name} died while it had only this request, and another server while it had it among others"
            why = f"problem {request.problem_id}, {request.size}: {lost}"
            self._suspicions.give_up(request.problem_id, why)
            for each in keys:
                self._answer(each, _given_up(why))
            self._cancel(keys)
        if fault is not None:
            self._dispatch.withdraw([key])
            self._answer(key, fault)
        self._suspicions.write(self._dispatch.deaths)
        self._begin()

    def _cancel(self, keys: Collection[int]) -> None:
        for running in self._running.values():
            if running.key in keys:
                running.task.cancel()

    def _answer(self, key: int, outcome: Generated | Exception) -> None:
        self._failures.pop(key, None)
        if self._requests.pop(key, None) is None:  # its reply is not awaited
            return
        if key >= 0:
            self._replies.put((key, outcome) if isinstance(outcome, Generated) else outcome)
        elif key in self._awaited and not self._awaited[key].done():
            if isinstance(outcome, Generated):
                self._awaited[key].set_result(outcome)
            else:
                self._awaited[key].set_exception(outcome)

    async def _abort_all(self) -> None:
        if not self._exclusive:
            await asyncio.gather(*(self._abort(rid, running) for rid, running in list(self._running.items())))
            return
        for running in list(self._running.values()):
            if running.client.name in self._fleet.failed:  # a failed server gets no requests, not even aborts
                running.task.cancel()
        if not await self._fleet.abort_all(_ABORT_TIMEOUT_S) and self._running:
            # Only the router knows which requests a hanging server has; the other servers return theirs at once.
            tasks = [running.task for running in self._running.values()]
            _, late = await asyncio.wait(tasks, timeout=_GIVE_BACK_S)
            for task in late:
                task.cancel()

    def _give_up_holders(self, held_s: float) -> None:
        """Mark servers that hold requests for too long. With a router these servers are not known; the router is given up."""
        why = f"accepted aborts, but did not return its requests within {held_s:g} s"
        router = self._fleet.router
        for running in list(self._running.values()):
            if router is None:
                self._fleet.mark_failed(running.client, why)
            else:
                router.give_up(f"a server {why}")
            running.task.cancel()

    async def _abort(self, rid: str, running: _Running) -> None:
        """Abort a request. If its server does not acknowledge, mark the server and cancel the request."""
        try:
            await running.client.abort(rid, timeout_s=_ABORT_TIMEOUT_S)
        except ServerError as error:
            self._fleet.mark_failed(running.client, str(error))
            running.task.cancel()


def _given_up(why: str) -> Generated:
    return Generated(array("i"), array("d"), "abort", "", why)
