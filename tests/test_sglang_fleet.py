"""A fleet of servers that die, hang, refuse and misreport: no sample is lost or duplicated, no stale weights are used. The
servers are processes that speak SGLang's protocol (tests/fake_sglang.py); the real one is in test_sglang_server.py."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import httpx
import pytest
import torch

from etr_megatron.rollout import EngineGoneError, RefusedError
from etr_megatron.rollout.sglang.client import GenerateParameters, ServerClient, ServerError
from etr_megatron.rollout.sglang.delivery import BroadcastDelivery, Bucket, Delivery
from etr_megatron.rollout.sglang.failures import Failures
from etr_megatron.rollout.sglang.fleet import Fleet, Request
from etr_megatron.rollout.sglang.replies import Generated
from etr_megatron.rollout.sglang.stream import RequestStream
from etr_megatron.rollout.sglang.sync import Transaction
from etr_megatron.rollout.sglang.update_group import UpdateGroup
from etr_megatron.weights.transport.whole import Field
from tests.fake_servers import impatient_with, patient_with, servers

CONTEXT = 512  # of a fake server, in tokens

PARAMETERS = GenerateParameters(max_new_tokens=5, temperature=1.0, top_p=1.0, top_k=0, seed=1, stop_ids=(2,))
REQUESTS = [Request([number, 7], PARAMETERS) for number in range(40)]
"""A slow server may get only as many of these as are under way at once, four: faults come at a request before its fifth."""
TENSORS = {"a.weight": torch.randn(3, 5), "b.weight": torch.randn(11).bfloat16(), "c.weight": torch.randn(2, 7, 3)}


def tokens_of(request: Request) -> list[int]:
    return [(sum(request.prompt_ids) + i) % 97 for i in range(5)]


@contextlib.asynccontextmanager
async def fleet_of(*behaviours: dict, **timeouts: float):
    """A fleet of one server per behaviour."""
    with servers(*behaviours) as urls:
        async with httpx.AsyncClient() as http:
            clients = [ServerClient(f"server {i}", url, http) for i, url in enumerate(urls)]
            for client in clients:
                await client.learn_routes((), timeout_s=120)
            with mock.patch("etr_megatron.rollout.sglang.fleet._WELL_S", 120.0):  # one that is well may be slow to show it
                yield Fleet(clients, **{"timeout_s": 120.0, "hang_timeout_s": 120.0, **timeouts})


async def generate(fleet: Fleet, requests: Sequence[Request], concurrency: int = 4) -> list[Generated]:
    return await RequestStream(fleet, concurrency=concurrency, exclusive=False).answer(requests)


def one_by_one(tensors=TENSORS) -> list[Bucket]:
    """One bucket per tensor, then one with two tensors of different dtypes."""
    found = [Bucket([Field(name, t.dtype, tuple(t.shape), 0)], t.flatten().view(torch.uint8)) for name, t in tensors.items()]
    a, b = (tensors[name] for name in ("a.weight", "b.weight"))
    fields = [Field("a.weight", a.dtype, tuple(a.shape), 0), Field("b.weight", b.dtype, tuple(b.shape), a.nbytes)]
    return [*found, Bucket(fields, torch.cat([a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)]))]


def broadcast(fleet: Fleet, timeout_s: float = 120.0) -> Delivery:
    return BroadcastDelivery(fleet, workers=1, host="127.0.0.1", backend="gloo", timeout_s=timeout_s)


async def sync(
    fleet: Fleet, version: int, delivery: Delivery | None = None, timeout_s: float = 120.0, tensors: dict = TENSORS
) -> None:
    transaction, delivery = Transaction(fleet, timeout_s), delivery or broadcast(fleet, timeout_s)
    try:
        await transaction.begin()
        for bucket in one_by_one(tensors):
            await delivery.deliver(bucket)
        await transaction.finish(version)
    finally:
        await delivery.close()


async def state_of(client: ServerClient) -> dict:
    return await client.get("/state", timeout_s=120)


async def has_asked(client: ServerClient, count: int) -> None:
    """Wait until the server has had this many requests."""
    while len((await state_of(client))["prompts"]) < count:
        await asyncio.sleep(0.05)


def has_all(state: dict, tensors=TENSORS) -> bool:
    return state["sums"] == {name: tensor.double().sum().item() for name, tensor in tensors.items()}


ASKED = replace(PARAMETERS, routing=True)


def experts_of(request: Request) -> list[int]:
    """Experts that a fake server reports for all tokens but the last, two per token."""
    tokens = [*request.prompt_ids, *tokens_of(request)][:-1]
    return [number for token in tokens for number in (token % 4, 4 + token % 3)]


def test_experts_are_those_that_the_server_says_where_it_is_asked():
    requests = [Request([3, 7], ASKED), Request([4, 7], PARAMETERS), Request([50, 9, 8], ASKED)]

    async def body():
        async with fleet_of({}) as fleet:
            return await generate(fleet, requests)

    found = asyncio.run(body())
    assert [one.routing.tolist() for one in found] == [experts_of(requests[0]), [], experts_of(requests[2])]


def test_a_server_that_does_not_say_which_experts_it_chose_is_left_out():
    requests = [Request([3, 7], ASKED), Request([50, 9, 8], ASKED)]

    async def body():
        async with fleet_of({"says_no_experts": True}, {}) as fleet:
            return await generate(fleet, requests), fleet.failed

    found, failed = asyncio.run(body())
    assert [one.routing.tolist() for one in found] == [experts_of(one) for one in requests]
    assert list(failed) == ["server 0"] and "unexpected reply (KeyError('routed_experts'))" in failed["server 0"]


def test_responses_come_back_in_the_order_of_the_requests():
    async def body():
        async with fleet_of({}, {}) as fleet:
            return await generate(fleet, REQUESTS), fleet.failed

    found, failed = asyncio.run(body())
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in REQUESTS]
    assert list(found[0].logprobs) == [-0.5] * 5 and found[0].finish_reason == "length" and not failed


@pytest.mark.slow
@pytest.mark.parametrize("what", ["die_at", "fail_at", "abort_at"])  # hang_at: see test_sglang_stream.py
def test_requests_of_a_server_that_fails_are_done_again_elsewhere_exactly_once(what):
    async def body():
        async with fleet_of({what: 3}, {}, {}, timeout_s=3.0) as fleet:
            patient_with(fleet.clients[1:])
            return await generate(fleet, REQUESTS), fleet.failed

    found, failed = asyncio.run(body())
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in REQUESTS]
    assert set(failed) == (set() if what == "fail_at" else {"server 0"})  # a single error of a healthy server is no failure


@pytest.mark.slow
def test_a_server_that_is_only_slow_is_left_alone_and_a_cancelled_request_stays_cancelled():
    async def body():
        async with fleet_of({"seconds": 3.0, "hang_at": 2}, hang_timeout_s=1.0) as fleet:
            patient_with(fleet.clients)
            slow = await generate(fleet, REQUESTS[:2])
            asking = asyncio.create_task(fleet.ask(fleet.clients[0], REQUESTS[2]))
            await has_asked(fleet.clients[0], 3)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            return slow, fleet.failed, fleet._liveness._looking

    found, failed, looking = asyncio.run(body())
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in REQUESTS[:2]]
    assert not failed and looking is None


@pytest.mark.slow
def test_a_server_that_says_nothing_of_itself_while_a_batch_is_computed_is_left_alone(monkeypatch):
    monkeypatch.setattr("etr_megatron.rollout.sglang.liveness._LOOKS", 150)  # in 120 s: one in every batch

    async def body():
        async with fleet_of({"seconds": 1.0, "busy": True}) as fleet:
            return await generate(fleet, REQUESTS[:4], concurrency=1), fleet.failed

    found, failed = asyncio.run(body())
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in REQUESTS[:4]] and not failed


@pytest.mark.slow
def test_requests_that_wait_in_the_queue_of_a_busy_server_are_not_late_while_it_completes_others():
    async def body():
        async with fleet_of({"seconds": 0.3, "busy": True}, {"seconds": 0.3, "busy": True}, timeout_s=6.0) as fleet:
            requests = [Request([at, 7], replace(PARAMETERS, seed=seed)) for at in (3, 4) for seed in range(24)]  # one at each
            return requests, await generate(fleet, requests, concurrency=24), fleet.failed

    requests, found, failed = asyncio.run(body())
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in requests] and not failed


def test_a_request_that_is_called_wrong_ends_the_generation_and_is_no_servers_failure():
    too_long = Request([3, 7], replace(PARAMETERS, max_new_tokens=CONTEXT - 1))

    async def body():
        async with fleet_of({}, {}) as fleet:
            with pytest.raises(RefusedError) as refusal:
                await generate(fleet, [*REQUESTS[:5], too_long, *REQUESTS[5:]])
            return str(refusal.value), fleet.failed, await generate(fleet, REQUESTS)

    said, failed, found = asyncio.run(body())
    assert re.match(r"server [01]: /generate answered 400: .+maximum context length", said)
    assert said.endswith(f"(a request with 2 prompt tokens and up to {CONTEXT - 1} response tokens)")
    assert not failed and [list(one.ids) for one in found] == [tokens_of(request) for request in REQUESTS]


def test_a_server_that_alone_calls_a_request_wrong_has_failed_and_the_request_is_answered():
    """A server at `sglang.urls` may have been started with a shorter context than the others."""

    async def body(*others: dict):
        async with fleet_of({"refuse_at": 0}, *others) as fleet:
            return await generate(fleet, REQUESTS[:5], concurrency=1), fleet.failed

    found, failed = asyncio.run(body({}))
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in REQUESTS[:5]]
    assert list(failed) == ["server 0"] and "answered 400" in failed["server 0"]
    with pytest.raises(RefusedError, match="server 0: /generate answered 400"):  # no other server is left to ask
        asyncio.run(body({"die_at": 0}))


def test_a_request_that_has_killed_a_server_is_not_passed_on_in_the_same_attempt():
    async def body():
        async with fleet_of({"fail_at": 0}, {"die_at": 0}, {}) as fleet:
            (first, _, third), failures = fleet.serving, Failures()
            with pytest.raises(ServerError):
                await fleet.ask(first, REQUESTS[0], failures=failures)
            return failures.deaths, list(fleet.failed), (await state_of(third))["prompts"]

    assert asyncio.run(body()) == (1, ["server 1"], [])


def test_a_server_that_was_started_anew_by_somebody_else_serves_no_more_until_it_has_the_weights():
    async def body():
        async with fleet_of({"forget_at": 3}, {}, {}) as fleet:
            await sync(fleet, 3)
            found, failed = await generate(fleet, REQUESTS), fleet.failed
            fleet.rejoin(fleet.clients[0])
            await sync(fleet, 4)
            return found, failed, await generate(fleet, REQUESTS), fleet.failed

    found, failed, again, then = asyncio.run(body())
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in REQUESTS]
    assert {one.version for one in found} == {"3"} and {one.version for one in again} == {"4"}
    assert failed == {"server 0": "generated with weights of version default instead of 3"} and not then


def test_the_last_request_of_a_dying_server_is_not_lost_when_the_others_are_done():
    async def body():
        async with fleet_of({"die_at": 0, "seconds": 0.0}, {}, {}) as fleet:
            return await generate(fleet, REQUESTS[:3], concurrency=64)

    assert [list(one.ids) for one in asyncio.run(body())] == [tokens_of(request) for request in REQUESTS[:3]]


def test_when_no_server_is_left_the_error_names_each_with_its_reason():
    async def body():
        async with fleet_of({"die_at": 2}, {"fail_at": 1, "unwell": True}) as fleet:
            await generate(fleet, REQUESTS)

    with pytest.raises(EngineGoneError, match=r"server 0: /generate failed: .+; server 1: /generate answered 500"):
        asyncio.run(body())


def test_a_weight_update_is_paused_for_flushed_and_versioned_in_order():
    async def body():
        async with fleet_of({}, {}) as fleet:
            await sync(fleet, 7)
            return [await state_of(client) for client in fleet.clients], (await generate(fleet, REQUESTS[:1]))[0].version

    states, version = asyncio.run(body())
    for state in states:
        assert has_all(state) and not state["paused"] and version == "7"
        transport = ("/init_weights_update_group", "/update_weights_from_distributed", "/destroy_weights_update_group")
        steps = [route for route in state["log"] if route not in transport]
        assert steps == [
            "/pause_generation",
            "/begin_weight_update",
            "/end_weight_update",
            "/flush_cache",
            "/update_weight_version",
            "/continue_generation",
        ]


def test_servers_without_begin_and_end_of_an_update_take_one_as_well():
    async def body():
        async with fleet_of({"old": True}, {}) as fleet:
            await sync(fleet, 1)
            return [await state_of(client) for client in fleet.clients], fleet.failed

    states, failed = asyncio.run(body())
    assert all(map(has_all, states)) and not failed


def test_an_update_that_a_job_left_open_is_closed_first():
    async def body():
        async with fleet_of({}) as fleet:
            await fleet.clients[0].call("/begin_weight_update", {}, timeout_s=120)
            await sync(fleet, 5)
            return await state_of(fleet.clients[0]), fleet.failed

    state, failed = asyncio.run(body())
    assert has_all(state) and not failed


def test_a_server_that_lacks_what_a_sync_needs_is_refused_by_name():
    async def body():
        async with fleet_of({"lacks": ["/flush_cache"]}) as fleet:
            await fleet.clients[0].learn_routes(("/generate", "/flush_cache"), timeout_s=10)

    with pytest.raises(ServerError, match=r"server 0 at http://127\.0\.0\.1:\d+ has no route /flush_cache, which"):
        asyncio.run(body())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["die_at_bucket", "hang_at_bucket"])
def test_a_server_lost_in_the_middle_of_an_update_does_not_cost_the_others_theirs(what):
    async def body():
        async with fleet_of({}, {what: 1}, {}) as fleet:
            with impatient_with(fleet.clients[1], 2.0, broadcast=1):
                await sync(fleet, 3)
            return [await state_of(fleet.clients[i]) for i in (0, 2)], fleet.failed

    states, failed = asyncio.run(body())
    assert set(failed) == {"server 1"}
    assert all(has_all(state) and state["version"] == "3" and not state["paused"] for state in states)


def test_a_server_that_keeps_its_old_version_takes_no_more_requests():
    async def body():
        async with fleet_of({"stale": True}, {}) as fleet:
            await sync(fleet, 4)
            return await generate(fleet, REQUESTS[:6]), fleet.failed, await state_of(fleet.clients[0])

    found, failed, state = asyncio.run(body())
    assert {one.version for one in found} == {"4"} and not state["paused"]
    assert failed == {"server 0": "reports weight version default after it was sent 4"}


def test_after_an_update_that_was_given_up_servers_go_on_but_get_no_requests():
    async def body():
        async with fleet_of({}) as fleet:
            transaction, delivery = Transaction(fleet, 120.0), broadcast(fleet)
            await transaction.begin()
            await delivery.deliver(one_by_one()[0])
            await transaction.abandon("the export failed")
            await delivery.close()
            return await state_of(fleet.clients[0]), fleet.failed

    state, failed = asyncio.run(body())
    assert not state["paused"] and failed == {"server 0": "the export failed"}


def test_a_reply_whose_logprobs_belong_to_other_tokens_is_refused():
    async def reply(request: httpx.Request) -> httpx.Response:
        meta = {"output_token_logprobs": [[-0.5, 4, None]], "finish_reason": {"type": "stop"}, "weight_version": "1"}
        return httpx.Response(200, json={"output_ids": [3], "meta_info": meta})

    async def body():
        async with httpx.AsyncClient(transport=httpx.MockTransport(reply)) as http:
            await ServerClient("server 0", "http://server", http).generate([1], PARAMETERS, timeout_s=1)

    with pytest.raises(ServerError, match="log-probs of other tokens"):
        asyncio.run(body())


@pytest.mark.slow
def test_a_server_that_dies_while_the_weight_group_is_formed_does_not_keep_the_others_waiting():
    async def body():
        async with fleet_of({}, {"die_at_join": True}, {}) as fleet:
            began = time.monotonic()
            await sync(fleet, 3, timeout_s=200.0)
            return [await state_of(fleet.clients[i]) for i in (0, 2)], fleet.failed, time.monotonic() - began

    states, failed, seconds = asyncio.run(body())
    assert set(failed) == {"server 1"} and seconds < 150
    assert all(has_all(state) and state["version"] == "3" and not state["paused"] for state in states)


def test_a_group_that_never_connects_costs_its_servers_and_not_the_run(monkeypatch):
    monkeypatch.setattr(UpdateGroup, "broadcast", lambda *_: time.sleep(3600))  # as NCCL while a worker is missing
    monkeypatch.setattr("etr_megatron.rollout.sglang.delivery.LIVENESS_S", 2.0)

    async def body():
        async with fleet_of({"die_at_bucket": 0}) as fleet:
            patient_with(fleet.clients)
            with pytest.raises(EngineGoneError, match=r"no SGLang server is left: server 0: /update_weights_from_distributed"):
                await asyncio.wait_for(sync(fleet, 1), 100)

    asyncio.run(body())
