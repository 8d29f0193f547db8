"""A request that fails wherever it goes: it ends in a sentence and does not take the fleet with it. A connection that breaks is
no failure."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from etr_megatron.rollout import EngineGoneError, RefusedError
from etr_megatron.rollout.sglang.client import Generated
from etr_megatron.rollout.sglang.fleet import Request
from etr_megatron.rollout.sglang.stream import RequestStream
from tests.test_sglang_fleet import PARAMETERS, REQUESTS, fleet_of, state_of, tokens_of
from tests.test_sglang_stream import answers

POISON = Request([100, 7, 7], replace(PARAMETERS, max_new_tokens=9))
OTHERS = REQUESTS[:12]
SIZE = "a request with 3 prompt tokens and up to 9 to follow"


async def refusal_of(fleet, requests=(*OTHERS[:6], POISON, *OTHERS[6:])) -> str:
    with pytest.raises(RefusedError) as refusal:
        await fleet.generate(requests)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("what", "said"), [("fail_prompt", "/generate answered 500: "), ("abort_prompt", "aborted a request that nobody asked")]
)
def test_a_request_that_servers_fail_at_and_are_well_after_is_given_to_two_of_them(what, said):
    async def body():
        async with fleet_of(*[{what: 100}] * 3) as fleet:
            return await refusal_of(fleet), fleet.failed, await fleet.generate(OTHERS)

    refusal, failed, found = asyncio.run(body())
    assert refusal.startswith(f"{SIZE} failed 2 times and is not tried again: server ") and refusal.count(said) == 2
    assert len(failed) == 2 and all(f"{name}: {why}" in refusal for name, why in failed.items())
    assert [one.ids for one in found] == [tokens_of(request) for request in OTHERS]


@pytest.mark.slow
def test_a_request_that_nobody_finishes_in_time_is_not_waited_for_at_every_server():
    async def body():
        async with fleet_of(*[{"hang_at": 0}] * 3, timeout_s=3.0) as fleet:
            return await refusal_of(fleet, [POISON]), fleet.failed

    refusal, failed = asyncio.run(body())
    assert refusal.count("/generate gave no answer within 3 s") == 2 and len(failed) == 2


@pytest.mark.slow
def test_a_request_that_servers_die_of_is_given_to_three_of_them():
    async def body():
        async with fleet_of(*[{"die_prompt": 100}] * 4) as fleet:
            return await refusal_of(fleet), fleet.failed, await fleet.generate(OTHERS)

    refusal, failed, found = asyncio.run(body())
    assert refusal.startswith(f"{SIZE} failed 3 times") and len(failed) == 3
    assert [one.ids for one in found] == [tokens_of(request) for request in OTHERS]


def test_the_only_server_is_asked_twice_and_serves_on_if_it_is_well():
    async def body(**behaviour):
        async with fleet_of({"fail_prompt": 100, **behaviour}) as fleet:
            return await refusal_of(fleet), fleet.failed, await fleet.generate(OTHERS)

    refusal, failed, found = asyncio.run(body())
    assert refusal.startswith(f"{SIZE} failed 2 times") and refusal.count("server 0: /generate answered 500") == 2
    assert not failed
    assert [one.ids for one in found] == [tokens_of(request) for request in OTHERS]
    with pytest.raises(EngineGoneError, match="no SGLang server is left: server 0: /generate answered 500"):
        asyncio.run(body(unwell=True))


def test_a_stream_says_of_such_a_request_that_it_failed_and_not_that_no_server_is_left():
    async def body():
        async with fleet_of(*[{"fail_prompt": 100}] * 2) as fleet:
            stream = RequestStream(fleet, concurrency=4, exclusive=False)
            await stream.submit(dict(enumerate([*OTHERS[:3], POISON, *REQUESTS])))
            with pytest.raises(RefusedError) as refusal:
                await answers(stream, len(REQUESTS) + 4)
            await stream.stop(abort=True)
            return str(refusal.value), fleet.failed

    refusal, failed = asyncio.run(body())
    assert refusal.startswith(f"{SIZE} failed 2 times")
    assert len(failed) <= 1 or all(f"{name}: {why}" in refusal for name, why in failed.items())


def test_errors_of_a_stream_come_in_their_order_after_the_replies_before_them():
    stream = RequestStream(None, concurrency=1, exclusive=False)
    reply = (0, Generated([], [], "stop", "1"))
    for one in (reply, RefusedError("first"), EngineGoneError("second"), reply):
        stream._replies.put(one)
    assert stream.wait() == [reply]
    with pytest.raises(RefusedError, match="first"):
        stream.wait()
    with pytest.raises(EngineGoneError, match="second"):
        stream.wait()
    assert stream.wait() == [reply]


def test_a_connection_that_breaks_once_costs_no_server_and_what_it_was_for_is_cut_off_and_done_again():
    async def body():
        async with fleet_of({"drop_at": 5}) as fleet:
            first = await fleet.generate(OTHERS)
            await fleet.clients[0].call("/behave", {"drop_at": 20}, timeout_s=10)
            stream = RequestStream(fleet, concurrency=4, exclusive=True)
            await stream.submit(dict(enumerate(OTHERS)))
            found = await answers(stream, len(OTHERS))
            return first, [found[key] for key in range(len(OTHERS))], await state_of(fleet.clients[0]), fleet.failed

    first, then, state, failed = asyncio.run(body())
    wanted = [tokens_of(request) for request in OTHERS]
    assert [one.ids for one in first] == wanted == [one.ids for one in then] and not failed
    dropped = state["prompts"][20]
    given = [rid for rid, prompt in zip(state["rids"], state["prompts"], strict=True) if prompt == dropped and rid is not None]
    assert len(set(given)) == 2 and state["aborted"] == [given[0]]


def test_a_connection_to_a_server_that_is_not_well_breaks_and_the_server_has_failed():
    async def body():
        async with fleet_of({"drop_at": 5, "unwell": True}, {}) as fleet:
            return await fleet.generate(REQUESTS), fleet.failed

    found, failed = asyncio.run(body())
    assert [one.ids for one in found] == [tokens_of(request) for request in REQUESTS] and list(failed) == ["server 0"]


def test_no_request_of_a_stream_has_a_name_that_another_begins_with():
    async def body():
        async with fleet_of({}) as fleet:
            stream = RequestStream(fleet, concurrency=4, exclusive=False)
            await stream.submit(dict(enumerate(OTHERS)))
            await answers(stream, len(OTHERS))
            return (await state_of(fleet.clients[0]))["rids"]

    rids = asyncio.run(body())
    assert len(set(rids)) == len(OTHERS) and not any(a != b and b.startswith(a) for a in rids for b in rids)
