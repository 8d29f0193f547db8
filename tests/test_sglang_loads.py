"""Loads that servers report, from replies like SGLang's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from etr_megatron.rollout.sglang import loads
from etr_megatron.rollout.sglang.client import ServerClient
from etr_megatron.rollout.sglang.loads import LoadMonitor


def load(running: int, queued: int, used: float, tokens: float = 0, us: float = 0) -> dict:
    moments = [1.0, 2.0, us, 4.0, 5.0, tokens] if us else None
    return {"num_running_reqs": running, "num_waiting_reqs": queued, "token_usage": used, "decode_moments": moments}


def clients_of(http: httpx.AsyncClient, names: str) -> list[ServerClient]:
    return [ServerClient(name, f"http://{name}", http) for name in names]


def test_loads_are_summed_up_over_servers_and_reports_since_the_last_time():
    said: dict[str, Iterator] = {
        "a": iter([[load(5, 2, 0.25, 1000, 4e6)], [load(3, 0, 0.5, 1600, 6e6)], [load(1, 0, 0.1)]]),
        "b": iter([[load(4, 1, 0.25), load(2, 9, 1.0)], [load(4, 0, 0.0, 100, 1e6), load(2, 0, 0.75, 900, 2e6)]]),  # two groups
    }

    async def reply(request: httpx.Request) -> httpx.Response:
        assert (request.url.path, request.url.query) == ("/v1/loads", b"include=core")
        found = next(said.get(request.url.host, iter(())), None)
        return httpx.Response(200, json={"loads": found}) if found else httpx.Response(404)

    async def body():
        async with httpx.AsyncClient(transport=httpx.MockTransport(reply)) as http:
            monitor = LoadMonitor(lambda: clients_of(http, "abc"), lambda: True)
            before = monitor.take()
            await monitor.ask()
            await monitor.ask()
            first = monitor.take()
            await monitor.ask()
            return before, first, monitor.take()

    before, first, then = asyncio.run(body())
    rates = (1600 - 1000) / 2.0, 100 / 1.0 + 900 / 2.0
    assert before == {} and first == pytest.approx(
        {
            "server_running_mean": (5 + 6 + 3 + 6) / 4,
            "server_queued_mean": (2 + 10) / 4,
            "server_queued_max": 10,
            "server_cache_used_mean": (0.25 + 1.0 + 0.5 + 0.75) / 4,
            "server_cache_used_max": 1.0,
            "server_tokens_per_s_mean": sum(rates) / 2,
        }
    )
    assert then["server_running_mean"] == 1 and "server_tokens_per_s_mean" not in then


def test_a_server_that_was_started_again_between_two_reports_has_no_rate():
    before = loads._Load("a", 1, 0, 0.5, [(1000, 4e6), (0, 0)])
    assert loads._tokens_per_s(before, before._replace(decoded=[(10, 5e6), (300, 3e6)])) == 0.0
    assert loads._tokens_per_s(before, before._replace(decoded=[(1500, 5e6), (300, 3e6)])) == 500 + 100


@pytest.mark.parametrize("wrong", [{}, {"loads": []}, {"loads": [{}]}, {"loads": 3}, {"loads": [load(1, None, 0.5)]}, []])
def test_a_server_that_reports_something_else_is_left_out(wrong):
    async def body():
        transport = httpx.MockTransport(lambda _: httpx.Response(200, json=wrong))
        async with httpx.AsyncClient(transport=transport) as http:
            monitor = LoadMonitor(lambda: clients_of(http, "a"), lambda: True)
            await monitor.ask()
            return monitor.take()

    assert asyncio.run(body()) == {}


def test_servers_are_asked_while_requests_are_in_flight_and_one_that_hangs_does_not_keep_the_others_out(monkeypatch):
    monkeypatch.setattr(loads, "_EVERY_S", 0.01)
    monkeypatch.setattr(loads, "_TIMEOUT_S", 0.05)
    in_flight, asked = [], []

    async def reply(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.host == "b":
            await asyncio.sleep(3600)
        return httpx.Response(200, json={"loads": [load(7, 0, 0.5)]})

    async def body():
        async with httpx.AsyncClient(transport=httpx.MockTransport(reply)) as http:
            monitor = LoadMonitor(lambda: clients_of(http, "ab"), lambda: in_flight)
            running = asyncio.ensure_future(monitor.run())
            await asyncio.sleep(0.1)
            idle = list(asked)
            in_flight.append(1)
            while asked.count("a") < 3:
                await asyncio.sleep(0.01)
            running.cancel()
            return idle, monitor.take()

    idle, found = asyncio.run(asyncio.wait_for(body(), 60))
    assert idle == [] and found["server_running_mean"] == 7
