"""Requests whose replies are not awaited any more: none of them is left in flight."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import replace

import pytest

from etr_megatron.rollout import RefusedError
from etr_megatron.rollout.sglang.client import ServerClient
from etr_megatron.rollout.sglang.fleet import Request
from etr_megatron.rollout.sglang.replies import Generated
from etr_megatron.rollout.sglang.stream import RequestStream
from tests.test_sglang_fleet import REQUESTS


class Replies:
    """In the place of a fleet with one server: each request is answered when a test says so."""

    router = apart = None

    def __init__(self) -> None:
        self.serving, self.failed = [ServerClient("server 0", "", None)], {}
        self.of: dict[Request, asyncio.Future] = {}

    async def ask(self, _client, request: Request, _rid, **_settings) -> Generated:
        self.of[request] = asyncio.get_running_loop().create_future()
        return await self.of[request]

    async def abort_all(self, _timeout_s: float) -> bool:
        return True


@pytest.mark.parametrize("is_refused", [True, False])
def test_a_request_that_is_withdrawn_before_it_has_begun_does_not_keep_a_stop_waiting(is_refused):
    requests = [replace(request, prompt_ids=tuple(request.prompt_ids)) for request in REQUESTS[:5]]

    async def body(delay: int):
        stream = RequestStream(fleet := Replies(), concurrency=2, exclusive=True)
        asking = asyncio.create_task(stream.answer(requests))
        while len(fleet.of) < 2:
            await asyncio.sleep(0)
        first, second = (fleet.of[request] for request in requests[:2])
        if is_refused:
            first.set_exception(RefusedError("too long"))
        else:
            asking.cancel()
        for _ in range(delay):
            await asyncio.sleep(0)
        if not second.done():
            second.set_result(Generated(array("i", [1]), array("d", [-0.5]), "stop", "1"))  # the next request gets a task
        with pytest.raises(RefusedError if is_refused else asyncio.CancelledError):
            await asking
        async with asyncio.timeout(10):
            return await stream.stop(abort=True), fleet.failed

    for delay in range(5):  # at one of them, the task is cancelled in the iteration of the event loop that has created it
        assert asyncio.run(body(delay)) == ([], {})
