"""Requests answered one by one, for as long as a fleet serves: what generation beside training stands on."""

from __future__ import annotations

import asyncio
import itertools
import queue
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etr_megatron.rollout.engine import EngineGoneError, RefusedError
from etr_megatron.rollout.sglang.client import Generated, ServerClient, ServerError
from etr_megatron.rollout.sglang.failures import Failures
from etr_megatron.rollout.sglang.fleet import Fleet, Request

_ABORT_TIMEOUT_S = 20.0
"""For a server to take note of an abort; one that is slower hangs."""

_GIVE_BACK_S = 5.0

_HELD_S = 60.0
"""For servers that take note of aborts to give back what they have; one that then still holds a request never will."""

_Reply = tuple[int, Generated] | EngineGoneError | RefusedError


class _Running(NamedTuple):
    client: ServerClient
    task: asyncio.Task[None]


class RequestStream:
    """Requests under way at the servers of a fleet, where least is under way first.

    Every key is answered once: with the whole reply, or at `stop` with what there was. A request whose server fails is done
    again elsewhere, from its beginning. All methods but `wait` run in the event loop of the fleet's clients.

    concurrency: requests under way per server. exclusive: nobody else has requests at the servers, so that one word to each
    cuts off whatever is under way; a fleet with a router must be.
    """

    def __init__(self, fleet: Fleet, *, concurrency: int, exclusive: bool) -> None:
        self._fleet, self._concurrency, self._exclusive = fleet, concurrency, exclusive
        self._requests: dict[int, Request] = {}
        self._failures: defaultdict[int, Failures] = defaultdict(Failures)
        self._waiting: deque[int] = deque()
        self._running: dict[str, _Running] = {}  # by request id, of which every attempt has its own
        self._load: Counter[str] = Counter()
        self._is_stopping = False
        self._name, self._attempts = uuid.uuid4().hex, itertools.count()
        self._replies: queue.SimpleQueue[_Reply] = queue.SimpleQueue()
        self._next: EngineGoneError | RefusedError | None = None  # it came right after the replies that `wait` returned

    async def submit(self, requests: Mapping[int, Request]) -> None:
        """Begin, in this order; keys are new."""
        self._requests |= requests
        self._waiting.extend(requests)
        self._dispatch()

    def wait(self, timeout_s: float | None = None) -> list[tuple[int, Generated]]:
        """Every reply that has come since the last call, at least one unless that takes longer; from any thread.

        Raises EngineGoneError when no server is left to answer, and RefusedError, after which that request is forgotten.
        """
        if self._next is not None:
            error, self._next = self._next, None
            raise error
        try:
            return self._taken(self._replies.get(timeout=timeout_s))
        except queue.Empty:
            return []

    async def stop(self, *, abort: bool) -> list[tuple[int, Generated]]:
        """Every reply since the last call; nothing is under way any more. abort: cut off what is, else wait for it.

        A key that has no reply then (its servers have failed, or it had not begun) is forgotten.
        """
        self._is_stopping = abort
        loop = asyncio.get_running_loop()
        end = loop.time() + _HELD_S
        while self._running:
            if abort:
                await self._abort_all()
                if loop.time() > end:
                    self._give_up_holders()
            # Once more after a while: an abort may have come before its request.
            tasks = [running.task for running in self._running.values()]
            if tasks:
                await asyncio.wait(tasks, timeout=0.5 if abort else None)
        self._is_stopping = False
        self._next = None
        self._failures.clear()
        self._requests.clear()
        self._waiting.clear()
        replies = []
        while not self._replies.empty():
            reply = self._replies.get()
            if isinstance(reply, tuple):  # an error the next `submit` will see for itself
                replies.append(reply)
        return replies

    def _taken(self, first: _Reply) -> list[tuple[int, Generated]]:
        replies = []
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

    def _dispatch(self) -> None:
        """Give waiting requests to servers that have room."""
        while self._waiting and not self._is_stopping:
            free = [client for client in self._fleet.serving if self._load[client.name] < self._concurrency]
            if not free:
                break
            client = self._least_loaded(free)
            # The dot: SGLang's scheduler cuts off every request whose id begins with what it is given.
            key, rid = self._waiting.popleft(), f"{self._name}-{next(self._attempts)}."
            self._load[client.name] += 1
            self._running[rid] = _Running(client, asyncio.get_running_loop().create_task(self._one(client, key, rid)))
        if self._waiting and not self._running:
            try:
                self._fleet.refuse_if_gone()
            except EngineGoneError as error:
                self._replies.put(error)

    def _least_loaded(self, clients: Sequence[ServerClient]) -> ServerClient:
        return min(clients, key=lambda one: self._load[one.name])

    async def _one(self, client: ServerClient, key: int, rid: str) -> None:
        request, failures = self._requests[key], self._failures[key]

        def elsewhere(others: Sequence[ServerClient]) -> ServerClient:
            """Where the request goes that a server called wrong: there it is to be cut off, and no longer here."""
            nonlocal client
            self._load[client.name] -= 1
            client = self._least_loaded(others)
            self._load[client.name] += 1
            self._running[rid] = self._running[rid]._replace(client=client)
            return client

        try:
            reply = await self._fleet.ask(
                client, request, rid, failures=failures, may_abort=lambda: self._is_stopping, elsewhere=elsewhere
            )
        except RefusedError as error:
            del self._requests[key], self._failures[key]
            self._replies.put(error)
        except (Exception, asyncio.CancelledError):  # whatever it was: a request that nobody answers is waited for
            self._waiting.appendleft(key)
        else:
            del self._requests[key], self._failures[key]
            self._replies.put((key, reply))
        self._load[client.name] -= 1
        del self._running[rid]
        self._dispatch()

    async def _abort_all(self) -> None:
        if not self._exclusive:
            await asyncio.gather(*(self._abort(rid, running) for rid, running in list(self._running.items())))
            return
        for running in list(self._running.values()):
            if running.client.name in self._fleet.failed:  # nobody asks it any more, not even to give back what it has
                running.task.cancel()
        if not await self._fleet.abort_all(_ABORT_TIMEOUT_S) and self._running:
            # Which requests a server that hangs has, only a router knows; what the others had they give back at once.
            tasks = [running.task for running in self._running.values()]
            _, late = await asyncio.wait(tasks, timeout=_GIVE_BACK_S)
            for task in late:
                task.cancel()

    def _give_up_holders(self) -> None:
        """Of requests that should have come back long ago. Behind a router it is not known who they are."""
        why = f"took note of aborts, and did not give back within {_HELD_S:g} s what it had"
        router = self._fleet.router
        for running in list(self._running.values()):
            if router is None:
                self._fleet.mark_failed(running.client, why)
            else:
                router.give_up(f"a server {why}")
            running.task.cancel()

    async def _abort(self, rid: str, running: _Running) -> None:
        """A server that does not take note has failed; its request is given up."""
        try:
            await running.client.abort(rid, timeout_s=_ABORT_TIMEOUT_S)
        except ServerError as error:
            self._fleet.mark_failed(running.client, str(error))
            running.task.cancel()
