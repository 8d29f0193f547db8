"""Requests answered one by one: cut off with what they have so far, redone when a server fails, each exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import httpx
import pytest

from etr_megatron.rollout import EngineGoneError, RefusedError
from etr_megatron.rollout.sglang import connections
from etr_megatron.rollout.sglang.client import ServerClient
from etr_megatron.rollout.sglang.connections import Connections
from etr_megatron.rollout.sglang.fleet import Fleet, Request
from etr_megatron.rollout.sglang.stream import RequestStream
from etr_megatron.rollout.sglang.suspicions import Suspicions
from tests.fake_servers import patient_with
from tests.test_sglang_fleet import CONTEXT, PARAMETERS, REQUESTS, fleet_of, has_asked, state_of, tokens_of


async def are_waiting(clients: Sequence[ServerClient], count: int) -> None:
    """Wait until the servers have drawn as much of this many responses as `pause_at` lets them."""
    async with asyncio.timeout(300):
        while sum([(await state_of(client))["waiting"] for client in clients]) < count:
            await asyncio.sleep(0.05)


async def goes_on(client: ServerClient) -> None:
    """`pause_at` is taken back."""
    await client.call("/behave", {"pause_at": None}, timeout_s=120)


async def answers(stream: RequestStream, count: int) -> dict:
    found = {}
    while len(found) < count:
        for key, reply in await asyncio.to_thread(stream.wait):
            assert key not in found
            found[key] = reply
    return found


def test_the_responses_to_one_prompt_are_spread_over_idle_servers_when_the_first_one_is_well_with_it(monkeypatch):
    monkeypatch.setattr("etr_megatron.rollout.sglang.stream._HARMLESS_S", 0.1)
    requests = {key: Request([3, 7], replace(PARAMETERS, max_new_tokens=90, seed=key)) for key in range(6)}

    async def body():
        async with fleet_of(*[{"tokens_per_s": 300, "pause_at": 30}] * 3) as fleet:
            stream = RequestStream(fleet, concurrency=8, exclusive=True)
            await stream.submit(requests)
            await are_waiting(fleet.clients, 6)
            for client in fleet.clients:
                await goes_on(client)
            found = await answers(stream, 6)
            return found, [(await state_of(client))["prompts"] for client in fleet.clients]

    found, prompts = asyncio.run(body())
    assert prompts == [[[3, 7]] * 2] * 3
    assert Counter(reply.place.server for reply in found.values()) == {"server 0": 2, "server 1": 2, "server 2": 2}


def test_a_fault_of_the_look_whether_a_prompt_is_harmless_ends_the_wait(monkeypatch):
    monkeypatch.setattr("etr_megatron.rollout.sglang.stream._HARMLESS_S", 0.1)

    async def fault(_client, _timeout_s):
        raise KeyError("no such name")

    async def body():
        async with fleet_of({"tokens_per_s": 300, "pause_at": 30}, {}) as fleet:
            stream = RequestStream(fleet, concurrency=8, exclusive=True)
            monkeypatch.setattr(ServerClient, "is_healthy", fault)
            await stream.submit({key: Request([3, 7], replace(PARAMETERS, max_new_tokens=90, seed=key)) for key in range(4)})
            with pytest.raises(KeyError, match="no such name"):
                await asyncio.to_thread(stream.wait, 60.0)
            await goes_on(fleet.clients[0])
            await stream.stop(abort=True)

    asyncio.run(body())


@pytest.mark.slow
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("what", ["die_at", "fail_at", "hang_at", "abort_at"])
def test_requests_of_a_server_that_fails_are_answered_by_another_exactly_once(what, exclusive):
    async def body():
        async with fleet_of({what: 3}, {}, {}, timeout_s=3.0) as fleet:
            patient_with(fleet.clients[1:])
            stream = RequestStream(fleet, concurrency=4, exclusive=exclusive)
            await stream.submit(dict(enumerate(REQUESTS)))
            found = await answers(stream, len(REQUESTS))
            return found, await stream.stop(abort=False), fleet.failed

    found, rest, failed = asyncio.run(body())
    assert {key: list(reply.ids) for key, reply in found.items()} == dict(enumerate(map(tokens_of, REQUESTS)))
    assert rest == [] and set(failed) == (set() if what == "fail_at" else {"server 0"})


@pytest.mark.slow
def test_a_server_that_hangs_is_known_long_before_the_deadline_of_its_requests():
    async def body():
        async with fleet_of({"stop_at": 3}, {}, {}, timeout_s=600.0, hang_timeout_s=2.0) as fleet:
            patient_with(fleet.clients[1:])
            stream = RequestStream(fleet, concurrency=4, exclusive=True)
            await stream.submit(dict(enumerate(REQUESTS)))
            return await answers(stream, len(REQUESTS)), fleet.failed

    found, failed = asyncio.run(body())
    assert {key: list(reply.ids) for key, reply in found.items()} == dict(enumerate(map(tokens_of, REQUESTS)))
    assert failed == {"server 0": "gave no sign of life within 2 s"}


def test_a_request_that_is_called_wrong_is_an_error_once_and_the_others_are_answered():
    too_long = Request([3, 7], replace(PARAMETERS, max_new_tokens=CONTEXT - 1))
    requests = [*REQUESTS[:5], too_long, *REQUESTS[5:]]

    async def body():
        async with fleet_of({}, {}) as fleet:
            stream = RequestStream(fleet, concurrency=4, exclusive=True)
            await stream.submit(dict(enumerate(requests)))
            found, refusals = {}, []
            while len(found) + len(refusals) < len(requests):
                try:
                    found |= dict(await asyncio.to_thread(stream.wait))
                except RefusedError as error:
                    refusals.append(str(error))
            return found, refusals, await stream.stop(abort=False), fleet.failed

    found, refusals, rest, failed = asyncio.run(body())
    assert len(refusals) == 1 and "/generate answered 400: " in refusals[0] and not failed and rest == []
    assert {key: list(reply.ids) for key, reply in found.items()} == {key: tokens_of(requests[key]) for key in found}
    assert set(found) == set(range(len(requests))) - {5}


def faulty_fleet(is_test: bool) -> Fleet:
    """Of servers that are not reached: asking them, or testing one with a suspect prompt, fails by a fault of the program."""

    async def fail(*_arguments: object, **_settings: object) -> None:
        raise ZeroDivisionError("a fault in the program")

    fleet = Fleet([ServerClient(name, "", None) for name in ("server 0", "server 1")], timeout_s=1.0, hang_timeout_s=1.0)
    setattr(fleet, "survives" if is_test else "ask", fail)
    return fleet


@pytest.mark.parametrize("is_test", [False, True])
def test_a_fault_of_the_program_ends_the_wait_instead_of_being_repeated(is_test):
    suspicions = Suspicions(None, {request.problem_id: 1 for request in REQUESTS[:2]} if is_test else {})

    async def body():
        stream = RequestStream(faulty_fleet(is_test), concurrency=4, exclusive=True, suspicions=suspicions)
        await stream.submit({5: REQUESTS[0]})
        with pytest.raises(ZeroDivisionError) as caught:
            await asyncio.to_thread(stream.wait, 60.0)
        async with asyncio.timeout(60):
            with pytest.raises(ZeroDivisionError):
                await stream.answer([REQUESTS[1]])
            return caught.traceback[-1].name, await stream.stop(abort=True), stream._fleet.failed

    assert asyncio.run(body()) == ("fail", [], {})


def test_without_servers_waiting_is_an_error_and_stopping_is_not():
    async def body():
        async with fleet_of({"die_at": 2}, timeout_s=3.0) as fleet:
            stream = RequestStream(fleet, concurrency=4, exclusive=False)
            await stream.submit(dict(enumerate(REQUESTS)))
            with pytest.raises(EngineGoneError, match="server 0"):
                await answers(stream, len(REQUESTS))
            return await stream.stop(abort=True)

    assert asyncio.run(body()) == []


@pytest.mark.parametrize("exclusive", [True, False])
def test_what_is_cut_off_comes_back_with_its_tokens_and_goes_on_from_there(exclusive):
    requests = {key: Request([3, key], replace(PARAMETERS, max_new_tokens=40, seed=key)) for key in range(6)}

    async def body():
        async with fleet_of({"tokens_per_s": 400, "pause_at": 15}, {"tokens_per_s": 400}) as fleet:
            stream = RequestStream(fleet, concurrency=2, exclusive=exclusive)  # the last two wait for a free slot
            await stream.submit(requests)
            await are_waiting(fleet.clients[:1], 2)
            first = dict(await stream.stop(abort=True))
            assert await stream.stop(abort=True) == []
            await goes_on(fleet.clients[0])
            rest = {
                key: Request([3, key, *first[key].ids], replace(one.parameters, max_new_tokens=40 - len(first[key].ids)))
                for key, one in requests.items()
                if key in first and first[key].finish_reason == "abort"
            }
            await stream.submit({100 + key: one for key, one in rest.items()})
            return first, await answers(stream, len(rest))

    first, then = asyncio.run(body())
    cut_off = {key: reply for key, reply in first.items() if reply.finish_reason == "abort"}
    assert any(len(reply.ids) == 15 for reply in cut_off.values())
    for key, reply in cut_off.items():
        assert len(reply.logprobs) == len(reply.ids)
        assert list(reply.ids + then[100 + key].ids) == [(key + 1 + i) % 97 for i in range(40)]


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_request_that_went_on_to_another_server_is_cut_off_there(exclusive):
    request = Request([3, 0], replace(PARAMETERS, max_new_tokens=60))

    async def body():
        async with fleet_of({"refuse_at": 0}, {"tokens_per_s": 400, "pause_at": 9}) as fleet:
            stream = RequestStream(fleet, concurrency=4, exclusive=exclusive)
            await stream.submit({0: request})
            await are_waiting(fleet.clients[1:], 1)
            return dict(await asyncio.wait_for(stream.stop(abort=True), 100)), fleet.failed

    found, failed = asyncio.run(body())
    assert found[0].finish_reason == "abort" and len(found[0].ids) == 9
    assert list(failed) == ["server 0"] and "answered 400" in failed["server 0"]


def test_requests_that_one_server_refuses_are_shared_by_all_the_others():
    requests = {key: Request([3, key], replace(PARAMETERS, max_new_tokens=20, seed=key)) for key in range(6)}

    async def body():
        busy = {"tokens_per_s": 400, "pause_at": 5}
        async with fleet_of({"refuse_all": True}, busy, busy) as fleet:
            stream = RequestStream(fleet, concurrency=2, exclusive=False)
            await stream.submit(requests)
            for client in fleet.clients[1:]:
                await are_waiting([client], 3)
            for client in fleet.clients[1:]:
                await goes_on(client)
            return await answers(stream, len(requests))

    assert asyncio.run(body()).keys() == requests.keys()


@pytest.mark.slow
@pytest.mark.parametrize("exclusive", [True, False])
def test_a_server_that_hangs_at_an_abort_is_given_up(monkeypatch, exclusive):
    monkeypatch.setattr("etr_megatron.rollout.sglang.stream._ABORT_TIMEOUT_S", 1.0)
    monkeypatch.setattr("etr_megatron.rollout.sglang.stream._GIVE_BACK_S", 1.0)

    async def body():
        async with fleet_of({"hang_at": 0, "hang_at_abort": True}, timeout_s=60.0) as fleet:
            stream = RequestStream(fleet, concurrency=4, exclusive=exclusive)
            await stream.submit({0: REQUESTS[0]})
            await has_asked(fleet.clients[0], 1)
            return await asyncio.wait_for(stream.stop(abort=True), 300), fleet.failed

    found, failed = asyncio.run(body())
    assert found == [] and "/abort_request did not answer" in failed["server 0"]


@pytest.mark.slow
@pytest.mark.parametrize("exclusive", [True, False])
def test_a_server_that_takes_note_of_aborts_and_gives_nothing_back_is_given_up(monkeypatch, exclusive):
    monkeypatch.setattr("etr_megatron.rollout.sglang.stream._HELD_S", 2.0)

    async def body():
        async with fleet_of({"hang_at": 0}, {}, timeout_s=90.0) as fleet:
            stream = RequestStream(fleet, concurrency=4, exclusive=exclusive)
            await stream.submit({0: REQUESTS[0], 1: REQUESTS[1]})
            found = await answers(stream, 1)
            rest = await asyncio.wait_for(stream.stop(abort=True), 300)
            return found, rest, fleet.failed

    found, rest, failed = asyncio.run(body())
    assert (
        found.keys() == {1}
        and rest == []
        and failed == {"server 0": "accepted aborts, but did not return its requests within 2 s"}
    )


@pytest.mark.parametrize("exclusive", [True, False])
def test_what_a_failed_server_still_has_does_not_keep_a_stop_waiting(exclusive):
    requests = {key: Request([3, key], replace(PARAMETERS, max_new_tokens=60, seed=key)) for key in range(4)}

    async def body():
        fails = {"tokens_per_s": 0.1, "fail_at": 1, "unwell": True}
        async with fleet_of(fails, {"tokens_per_s": 400}, timeout_s=600.0) as fleet:
            stream = RequestStream(fleet, concurrency=2, exclusive=exclusive)
            await stream.submit(requests)
            while not fleet.failed:
                await asyncio.sleep(0.05)
            return dict(await asyncio.wait_for(stream.stop(abort=True), 300))

    found = asyncio.run(body())
    assert all(list(reply.ids) == [(key + 1 + i) % 97 for i in range(len(reply.ids))] for key, reply in found.items())


def test_connections_are_used_again_and_one_that_breaks_is_replaced():
    opened, all_five = [], asyncio.Barrier(5)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError), contextlib.closing(writer):
            while b"/drop" not in await reader.readuntil(b"\r\n\r\n"):
                await all_five.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async def body():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with server, httpx.AsyncClient(transport=Connections()) as http:

            async def five() -> int:
                replies = await asyncio.gather(*(http.get(url) for _ in range(5)))
                assert [reply.json() for reply in replies] == [{}] * 5
                used = replies[0].extensions["network_stream"].get_extra_info("socket")
                assert used.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert used.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
                return len(opened)

            first = [await five() for _ in range(3)]
            with pytest.raises(httpx.RemoteProtocolError):
                await http.get(f"{url}drop")
            return [*first, await five()]

    assert asyncio.run(body()) == [5, 5, 5, 6]


def test_connections_that_nobody_has_used_for_long_are_closed(monkeypatch):
    """Otherwise those of the peak concurrency would stay, half closed, to the end of the run."""
    monkeypatch.setattr(connections, "_IDLE_S", 0.2)
    opened, closed = [], []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError), contextlib.closing(writer):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        closed.append(writer)

    async def body():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with server, httpx.AsyncClient(transport=Connections()) as http:
            await asyncio.gather(*(http.get(url) for _ in range(5)))
            await asyncio.sleep(0.3)
            await http.get(url)
            async with asyncio.timeout(300):
                while len(closed) < len(opened) - 1:
                    await asyncio.sleep(0.01)

    asyncio.run(body())


def test_a_request_that_is_cancelled_while_it_closes_idle_connections_leaves_its_own_to_the_next(monkeypatch):
    opened, both, closing = [], asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError), contextlib.closing(writer):
            while await reader.readuntil(b"\r\n\r\n"):
                if len(opened) == 2:
                    both.set()
                await both.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async def close_slowly(_connection: httpx.AsyncHTTPTransport) -> None:
        closing.set()
        await asyncio.sleep(3600)

    async def body():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        monkeypatch.setattr(connections, "_IDLE_S", 3600.0)
        async with server, httpx.AsyncClient(transport=Connections()) as http:
            await asyncio.gather(http.get(url), http.get(url))
            with monkeypatch.context() as late:
                late.setattr(connections, "_IDLE_S", -1.0)  # all have been idle for too long
                late.setattr(httpx.AsyncHTTPTransport, "aclose", close_slowly)
                asking = asyncio.create_task(http.get(url))
                await closing.wait()
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
            await http.get(url)
            return len(opened)

    assert asyncio.run(body()) == 2


def test_what_goes_first_is_asked_before_all_that_waits_in_its_own_order():
    async def body():
        async with fleet_of({"tokens_per_s": 400, "pause_at": 2}) as fleet:
            stream = RequestStream(fleet, concurrency=1, exclusive=True)
            await stream.submit(dict(enumerate(REQUESTS[:3])))
            await are_waiting(fleet.clients, 1)
            await stream.submit({8: REQUESTS[3], 7: REQUESTS[4]}, first=True)
            await goes_on(fleet.clients[0])
            return list(await answers(stream, 5))

    assert asyncio.run(body()) == [0, 8, 7, 1, 2]
