"""A request that fails on every server is given up and does not take the fleet down with it. A broken connection does not count
as a failure."""

from __future__ import annotations

import asyncio
import re
from array import array
from collections.abc import Sequence
from dataclasses import replace

import pytest

from etr_megatron.rollout import EngineGoneError, NeedsSyncError, RefusedError
from etr_megatron.rollout.sglang.fleet import Request
from etr_megatron.rollout.sglang.replies import Generated
from etr_megatron.rollout.sglang.stream import RequestStream
from etr_megatron.rollout.sglang.suspicions import Suspicions
from tests.test_sglang_fleet import PARAMETERS, REQUESTS, fleet_of, generate, state_of, tokens_of
from tests.test_sglang_stream import answers

POISON = Request([100, 7, 7], replace(PARAMETERS, max_new_tokens=9))
OTHERS = REQUESTS[:12]
ALL = (*OTHERS[:6], POISON, *OTHERS[6:])
SIZE = "a request with 3 prompt tokens and up to 9 response tokens"


def why_given_up(found: Sequence[Generated], requests: Sequence[Request] = ALL) -> str:
    """The reason for the poison, of which all responses are given up; all other requests are answered."""
    for one, request in zip(found, requests, strict=True):
        assert list(one.ids) == ([] if request is POISON else tokens_of(request))
        assert bool(one.given_up) == (request is POISON) == (one.finish_reason == "abort")
    (why,) = {one.given_up for one in found if one.given_up}
    return why


@pytest.mark.parametrize(
    ("what", "said", "lost"),
    [("fail_prompt", "/generate answered 500: ", 0), ("abort_prompt", "aborted a request that it was not asked", 2)],
)
def test_a_request_that_servers_fail_at_and_are_well_after_is_given_to_two_of_them(what, said, lost):
    async def body():
        async with fleet_of(*[{what: 100}] * 3) as fleet:
            return await generate(fleet, ALL), fleet.failed

    found, failed = asyncio.run(body())
    why = why_given_up(found)
    assert why.startswith(f"{SIZE} failed 2 times: server ") and why.count(said) == 2
    assert len(set(re.findall(r"server \d", why))) == 2
    assert len(failed) == lost and all(f"{name}: {reason}" in why for name, reason in failed.items())


def test_a_server_that_answers_everything_with_an_error_has_failed_and_no_request_is_blamed():
    async def body():
        async with fleet_of({"fail_all": True}, {}) as fleet:
            return await generate(fleet, OTHERS), fleet.failed

    found, failed = asyncio.run(body())
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in OTHERS]
    assert list(failed) == ["server 0"] and "/generate answered 500" in failed["server 0"]


@pytest.mark.slow
def test_a_request_that_nobody_finishes_in_time_is_not_waited_for_at_every_server():
    async def body():
        async with fleet_of(*[{"hang_at": 0}] * 3, timeout_s=3.0) as fleet:
            return await generate(fleet, [POISON]), fleet.failed

    found, failed = asyncio.run(body())
    assert why_given_up(found, [POISON]).count("/generate completed no response within 3 s") == 2 and len(failed) == 2


def test_a_prompt_that_servers_die_of_costs_two_of_them_however_many_responses_to_it_there_are():
    """Its responses are never at two servers at once, and other prompts at the first server are not blamed."""
    requests = [*OTHERS[:4], *[POISON] * 6, *OTHERS[4:], *[POISON] * 2]

    async def body():
        async with fleet_of(*[{"die_prompt": 100, "seconds": 0.1}] * 4) as fleet:
            return await generate(fleet, requests), fleet.failed

    found, failed = asyncio.run(body())
    why = why_given_up(found, requests)
    assert why.startswith("problem 100 7 7, 3 prompt tokens and up to 9 response tokens: server ") and len(failed) == 2
    assert "died while it had only this request, and another server while it had it among others" in why


@pytest.mark.slow
def test_a_prompt_that_servers_die_of_late_is_given_up_when_it_is_alone_to_its_end():
    late = Request([100, 7, 7], replace(PARAMETERS, max_new_tokens=60))
    others = [Request([3, key], replace(PARAMETERS, max_new_tokens=60, seed=key)) for key in range(6)]

    async def body():
        async with fleet_of(*[{"tokens_per_s": 100, "die_late": 100}] * 4) as fleet:
            return await generate(fleet, [*others[:3], late, *others[3:]]), fleet.failed

    found, failed = asyncio.run(body())
    assert found[3].given_up and len(failed) == 3
    del found[3]
    assert [list(one.ids) for one in found] == [[(key + 1 + i) % 97 for i in range(60)] for key in range(6)]


def test_the_last_server_is_not_given_what_the_others_may_have_died_of():
    async def body():
        async with fleet_of({"die_prompt": 100}, {"die_prompt": 100}) as fleet:
            stream = RequestStream(fleet, concurrency=4, exclusive=True)
            await stream.submit(dict(enumerate([*ALL, *REQUESTS[12:]])))
            found = {}
            with pytest.raises(NeedsSyncError, match=r"requests that server [01] may have died of are not sent to the last"):
                while True:
                    found |= dict(await asyncio.to_thread(stream.wait))
            assert await stream.stop(abort=True) == []
            return found, fleet.failed

    found, failed = asyncio.run(body())
    assert len(failed) == 1 and 6 not in found
    assert all(list(reply.ids) == tokens_of([*ALL, *REQUESTS[12:]][key]) for key, reply in found.items())


def test_the_only_server_is_asked_twice_and_serves_on_if_it_is_well():
    async def body(**behaviour):
        async with fleet_of({"fail_prompt": 100, **behaviour}) as fleet:
            return await generate(fleet, ALL), fleet.failed

    found, failed = asyncio.run(body())
    why = why_given_up(found)
    assert why.startswith(f"{SIZE} failed 2 times") and why.count("server 0: /generate answered 500") == 2 and not failed
    with pytest.raises(EngineGoneError, match="no SGLang server is left: server 0: /generate answered 500"):
        asyncio.run(body(unwell=True))


def test_a_stream_answers_such_a_request_with_the_reason_and_all_others():
    requests = [*OTHERS[:3], POISON, *REQUESTS]

    async def body():
        async with fleet_of(*[{"fail_prompt": 100}] * 2) as fleet:
            stream = RequestStream(fleet, concurrency=4, exclusive=False)
            await stream.submit(dict(enumerate(requests)))
            found = await answers(stream, len(requests))
            return [found[key] for key in range(len(requests))], await stream.stop(abort=True)

    found, rest = asyncio.run(body())
    assert why_given_up(found, requests).startswith(f"{SIZE} failed 2 times") and rest == []


@pytest.mark.slow
def test_what_was_found_out_about_prompts_is_known_to_a_fleet_that_is_started_again(tmp_path):
    """With one server, which dies of the poison first among other prompts, then alone, and then no more."""
    file = tmp_path / "new" / "suspicions.json"

    async def body():
        async with fleet_of({"die_prompt": 100, "seconds": 0.1}) as fleet:
            stream = RequestStream(fleet, concurrency=4, exclusive=True, suspicions=Suspicions.read(file))
            return await stream.answer(ALL[4:9])

    for deaths, given_up in (({"100 7 7"}, set()), (set(), {"100 7 7"})):
        with pytest.raises(EngineGoneError):
            asyncio.run(body())
        kept = Suspicions.read(file)
        assert deaths <= kept.deaths.keys() and kept.given_up.keys() == given_up
    assert "died while it had only this request" in why_given_up(asyncio.run(body()), ALL[4:9])
    assert Suspicions.read(file).deaths == {}


def test_a_file_of_suspicions_that_cannot_be_read_or_written_ends_nothing(tmp_path, caplog):
    file = tmp_path / "suspicions.json"
    for text in ("", "[]", '{"deaths": 3, "given_up": {}}'):
        file.write_text(text)
        assert Suspicions.read(file) == Suspicions(file)
    Suspicions(file / "below").write({"p": 1})
    said = [record.getMessage() for record in caplog.records]
    assert [one.partition(": ")[0] for one in said] == [
        *[f"{file} is ignored, so problems that killed servers before may be requested again"] * 3,
        "problems that may have killed servers are not saved, and a restart would request them again",
    ]


def test_errors_of_a_stream_come_in_their_order_after_the_replies_before_them():
    stream = RequestStream(None, concurrency=1, exclusive=False)
    reply = (0, Generated(array("i"), array("d"), "stop", "1"))
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
            first = await generate(fleet, OTHERS)
            assert not fleet.failed
            await fleet.clients[0].call("/behave", {"drop_at": 20}, timeout_s=120)
            stream = RequestStream(fleet, concurrency=4, exclusive=True)
            await stream.submit(dict(enumerate(OTHERS)))
            found = await answers(stream, len(OTHERS))
            return first, [found[key] for key in range(len(OTHERS))], await state_of(fleet.clients[0]), fleet.failed

    first, then, state, failed = asyncio.run(body())
    wanted = [tokens_of(request) for request in OTHERS]
    assert [list(one.ids) for one in first] == wanted == [list(one.ids) for one in then] and not failed
    assert len(set(state["rids"])) == len(state["rids"]) == 2 * len(OTHERS) + 2
    assert set(state["aborted"]) == {state["rids"][5], state["rids"][20]}
    dropped = [state["prompts"][5], state["prompts"][20]]  # may be the same, as requests overtake each other
    assert state["prompts"].count(dropped[1]) == 2 + dropped.count(dropped[1])


def test_a_connection_to_a_server_that_is_not_well_breaks_and_the_server_has_failed():
    async def body():
        async with fleet_of({"drop_at": 3, "unwell": True}, {}, {}) as fleet:
            return await generate(fleet, REQUESTS), fleet.failed

    found, failed = asyncio.run(body())
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in REQUESTS] and list(failed) == ["server 0"]


def test_no_request_of_a_stream_has_a_name_that_another_begins_with():
    async def body():
        async with fleet_of({}) as fleet:
            stream = RequestStream(fleet, concurrency=4, exclusive=False)
            await stream.submit(dict(enumerate(OTHERS)))
            await answers(stream, len(OTHERS))
            return (await state_of(fleet.clients[0]))["rids"]

    rids = asyncio.run(body())
    assert len(set(rids)) == len(OTHERS) and not any(a != b and b.startswith(a) for a in rids for b in rids)
