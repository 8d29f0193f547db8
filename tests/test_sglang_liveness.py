"""Liveness checks of servers that fail by a fault of their own."""

from __future__ import annotations

import asyncio

import pytest

from etr_megatron.rollout.sglang.client import ServerError
from etr_megatron.rollout.sglang.liveness import LivenessMonitor

pytestmark = pytest.mark.usefixtures("deadline")


class Client:
    """A server that does not answer, by a client that fails at its first check."""

    name, checks = "server 3", 0

    async def is_alive(self, timeout_s: float) -> bool:
        self.checks += 1
        if self.checks == 1:
            raise ZeroDivisionError("a fault in the program")
        return False


def test_a_check_that_fails_by_its_own_fault_is_told_to_all_who_wait_and_checks_go_on_for_the_next():
    async def body():
        client, dead = Client(), []
        monitor = LivenessMonitor(0.1, lambda client, why: dead.append(client.name))

        async def wait() -> None:
            with monitor.watch([client]):
                await asyncio.sleep(3600)

        first = await asyncio.gather(wait(), wait(), return_exceptions=True)
        return first, list(dead), (await asyncio.gather(wait(), return_exceptions=True))[0], dead, monitor._looking

    first, none, then, dead, looking = asyncio.run(body())
    assert [type(error) for error in first] == [RuntimeError] * 2 and none == []
    assert all(isinstance(error.__cause__, ZeroDivisionError) for error in first)
    assert isinstance(then, ServerError) and str(then) == "server 3: gave no sign of life within 0.1 s"
    assert dead == ["server 3"] and looking is None
