"""A request that fails wherever it goes: it ends in a sentence and does not take the fleet with it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from etr_megatron.rollout import EngineGoneError, RefusedError
from etr_megatron.rollout.sglang.client import Generated
from etr_megatron.rollout.sglang.fleet import Request
from etr_megatron.rollout.sglang.stream import RequestStream
from tests.test_sglang_fleet import PARAMETERS, REQUESTS, fleet_of, tokens_of
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
