"""Broadcasts of weights whose connections are lost."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from etr_megatron.rollout.sglang.sync import Transaction
from tests.fake_servers import impatient_with
from tests.test_sglang_fleet import broadcast, fleet_of, one_by_one, state_of


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1, 2])  # gloo notices it before, between or after the broadcast's other messages
def test_servers_that_wait_in_a_broadcast_which_failed_at_once_are_told_and_not_lost(lost):
    async def body():
        async with fleet_of({}, {}, {}) as fleet:
            delivery, (first, second, *_) = broadcast(fleet), one_by_one()
            await Transaction(fleet, 120.0).begin()
            await delivery.deliver(first)
            client, group = fleet.clients[lost], delivery._group.name
            await client.call("/destroy_weights_update_group", {"group_name": group}, timeout_s=120)
            os.kill((await state_of(client))["pid"], signal.SIGSTOP)
            await asyncio.sleep(0.3)  # the broadcast fails before the request does
            with impatient_with(client, 1.0):
                await delivery.deliver(second)
            await delivery.close()
            return fleet.failed, [await state_of(client) for client in fleet.serving]

    failed, states = asyncio.run(asyncio.wait_for(body(), 100))  # less than the time that a server may take to answer
    assert list(failed) == [f"server {lost}"]
    assert all(state["sums"].keys() == {"a.weight", "b.weight"} for state in states) and len(states) == 2
