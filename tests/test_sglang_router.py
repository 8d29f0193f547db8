"""SGLang's real router in front of servers that speak SGLang's protocol (tests/fake_sglang.py)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from etr_megatron.config import SglangConfig
from etr_megatron.errors import UserError
from etr_megatron.rollout import RefusedError
from etr_megatron.rollout.sglang import server
from etr_megatron.rollout.sglang.fleet import Fleet, Request
from etr_megatron.rollout.sglang.router import NAME, Router
from etr_megatron.rollout.sglang.server import free_port
from etr_megatron.rollout.sglang.stream import RequestStream
from tests.fake_servers import patient_with
from tests.runs import REPO, gone
from tests.test_sglang_fleet import ASKED, PARAMETERS, experts_of, fleet_of, generate, state_of, sync, tokens_of
from tests.test_sglang_ports import answering
from tests.test_sglang_stream import are_waiting, goes_on

PYTHON = REPO / ".venv-sglang" / "bin" / "python"
LAUNCH = (str(REPO / "tests" / "sglang_cpu" / "router.py"),)
GROUPS, SAMPLES = 12, 4
# Prompts of different lengths and prefixes, each for a whole group, which stays at one server. The router may give a server a
# single group: faults come at a request before its fifth.
REQUESTS = [Request([group * 7 + i for i in range(30 + group)], PARAMETERS) for group in range(GROUPS) for _ in range(SAMPLES)]
SETTINGS = SglangConfig(python=str(PYTHON), launch=(), router="cache_aware", router_launch=LAUNCH, update_timeout_s=30.0)


@contextlib.contextmanager
def router_before(fleet: Fleet, logs: Path):
    """Start a router and attach it to the fleet; on exit, end it and check that nothing of it is left."""
    router = Router(SETTINGS, fleet.clients[0]._http, api_key="s3cret", logs=logs)
    try:
        router.start()
        fleet.router = router
        yield router
    finally:
        pid = pid_of(router) if router._host is not None else None
        router.stop()
    assert pid is None or gone(pid)


def pid_of(router: Router) -> int:
    watchdog = router._host._processes[NAME]._watchdog.pid
    return int(Path(f"/proc/{watchdog}/task/{watchdog}/children").read_text().split()[0])


async def prompts_of(fleet: Fleet, number: int) -> list[list[int]]:
    return (await state_of(fleet.clients[number]))["prompts"]


async def generate_until_server_1_fails(fleet: Fleet, **options) -> tuple[list[Request], list]:
    """(requests, replies): REQUESTS again and again, with prompts that no server has cached, until server 1 has failed. The
    router may give it too few of them for its fault, above all on a busy machine."""
    requests, replies = [], []
    for times in range(8):
        new = [replace(one, prompt_ids=[1000 * times + token for token in one.prompt_ids]) for one in REQUESTS]
        replies += await generate(fleet, new, **options)
        requests += new
        if "server 1" in fleet.failed:
            break
    return requests, replies


def requires_router(test):
    has = list(PYTHON.parent.parent.glob("lib/python*/site-packages/sglang_router"))
    skip = pytest.mark.skipif(not has, reason="no .venv-sglang with the router: `bash tools/setup_env.sh --sglang` makes it")
    return pytest.mark.slow(skip(test))


@requires_router
def test_a_group_stays_at_one_server_and_servers_that_are_lost_and_come_back_leave_and_join_the_router(tmp_path):
    others = [replace(one, prompt_ids=[500 + token for token in one.prompt_ids]) for one in REQUESTS]  # not cached anywhere

    async def body():
        async with fleet_of({}, {"die_at": 3}, {}, {}, timeout_s=60.0) as fleet:
            third = fleet.clients[2]
            fleet.mark_failed(third, "not yet")
            with router_before(fleet, tmp_path) as router:
                asked, first = await generate_until_server_1_fails(fleet, concurrency=8)
                failed, lonely = fleet.failed, await prompts_of(fleet, 2)
                fleet.rejoin(third)  # as after a restart
                again = await generate(fleet, others, concurrency=8)
                states = [await prompts_of(fleet, number) for number in (0, 2)]
                key = "s3cret" in (tmp_path / "sglang_router.log").read_text()
                return asked, first, again, failed, lonely, states, router.is_up, key

    asked, first, again, failed, lonely, states, is_up, key = asyncio.run(body())
    assert [list(one.ids) for one in first] == [tokens_of(request) for request in asked]
    assert [list(one.ids) for one in again] == [tokens_of(request) for request in others]
    assert failed == {"server 1": "does not answer", "server 2": "not yet"} and lonely == []
    assert is_up and not key
    assert states[1] and len(states[1]) % SAMPLES == 0  # the server that rejoined gets requests, in whole groups
    assert all(states[1].count(prompt) == SAMPLES for prompt in states[1])


@requires_router
def test_the_router_does_not_pass_on_that_experts_are_asked_for_and_the_servers_are_asked_themselves(tmp_path):
    """The reason why `train.routing_replay` refuses `sglang.router`."""
    requests = [replace(one, parameters=ASKED) for one in REQUESTS[:6]]

    async def body():
        async with fleet_of({}, {}, timeout_s=60.0) as fleet:
            with router_before(fleet, tmp_path) as router:
                return await generate(fleet, requests), router.is_up, fleet.failed

    found, is_up, failed = asyncio.run(body())
    assert [one.routing.tolist() for one in found] == [experts_of(one) for one in requests]
    assert not is_up and not failed


@requires_router
def test_behind_the_router_a_prompt_that_servers_die_of_is_found_alone_and_given_up(tmp_path):
    poison = Request([100, 7, 7], PARAMETERS)

    async def body():
        async with fleet_of(*[{"die_prompt": 100, "seconds": 0.05}] * 4, timeout_s=60.0) as fleet:
            with router_before(fleet, tmp_path) as router:
                found = await generate(fleet, [*REQUESTS[:20], *[poison] * 3, *REQUESTS[20:]], concurrency=8)
                return found, fleet.failed, router.is_up

    found, failed, is_up = asyncio.run(body())
    assert all("died while it had only this request" in one.given_up for one in found[20:23])
    assert [list(one.ids) for one in found[:20] + found[23:]] == [tokens_of(request) for request in REQUESTS]
    assert 2 <= len(failed) <= 3 and is_up  # the router may have sent it to two at once


@requires_router
def test_a_server_that_hangs_behind_the_router_is_known_long_before_the_deadline_of_its_requests(tmp_path):
    async def body():
        async with fleet_of({}, {"stop_at": 3}, {}, timeout_s=600.0, hang_timeout_s=2.0) as fleet:
            patient_with([fleet.clients[0], fleet.clients[2]])
            with router_before(fleet, tmp_path) as router:
                return *await generate_until_server_1_fails(fleet), fleet.failed, router.is_up

    asked, found, failed, is_up = asyncio.run(body())
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in asked]
    assert failed == {"server 1": "gave no sign of life within 2 s"} and is_up


@requires_router
def test_behind_the_router_a_server_that_was_started_anew_is_found_by_its_weights(tmp_path):
    async def body():
        async with fleet_of({}, {"forget_at": 3}, {}, timeout_s=60.0) as fleet:
            await sync(fleet, 3)
            with router_before(fleet, tmp_path) as router:
                return *await generate_until_server_1_fails(fleet), fleet.failed, router.is_up

    asked, found, failed, is_up = asyncio.run(body())
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in asked] and is_up
    assert {one.version for one in found} == {"3"} and failed == {"server 1": "has weights of version default instead of 3"}


@requires_router
def test_without_its_router_a_fleet_goes_on_and_has_it_back_when_it_is_started_again(tmp_path):
    async def body():
        async with fleet_of(*[{"tokens_per_s": 400, "pause_at": 1}] * 2) as fleet:
            with router_before(fleet, tmp_path) as router:
                generating = asyncio.create_task(generate(fleet, REQUESTS))
                await are_waiting(fleet.clients, 1)
                os.kill(pid_of(router), signal.SIGKILL)
                for client in fleet.clients:
                    await goes_on(client)
                first, was_up = await generating, router.is_up
                await asyncio.to_thread(router.restart_if_down)
                again = await generate(fleet, REQUESTS[:8])
                return first, was_up, again, router.is_up, fleet.failed

    first, was_up, again, is_up, failed = asyncio.run(body())
    chains = [[(one.prompt_ids[-1] + 1 + i) % 97 for i in range(5)] for one in [*REQUESTS, *REQUESTS[:8]]]
    assert [list(one.ids) for one in [*first, *again]] == chains
    assert (was_up, is_up, failed) == (False, True, {})


@requires_router
def test_what_the_router_has_given_out_is_cut_off_at_every_server(tmp_path):
    requests = {key: Request([3 + key, key], replace(PARAMETERS, max_new_tokens=90, seed=key)) for key in range(6)}

    async def body():
        async with fleet_of(*[{"tokens_per_s": 400, "pause_at": 20}] * 2) as fleet:
            with router_before(fleet, tmp_path):
                stream = RequestStream(fleet, concurrency=4, exclusive=True)
                await stream.submit(requests)
                await are_waiting(fleet.clients, len(requests))
                return dict(await stream.stop(abort=True))

    found = asyncio.run(body())
    assert found.keys() == requests.keys()
    for key, reply in found.items():
        assert reply.finish_reason == "abort" and list(reply.ids) == [(key + 1 + i) % 97 for i in range(20)]


def test_what_a_router_refuses_and_a_server_takes_is_no_wrong_request():
    """For example a request that is too long for the router, which is given up, as it would refuse the next as well."""

    class Refusing:
        def __init__(self, client):
            self.client, self.is_up, self.why = client, True, ""

        async def leads_to(self, urls):
            return self.is_up

        def give_up(self, why):
            self.is_up, self.why = False, why

    async def body(**server):
        async with fleet_of(server, {"refuse_all": True}, timeout_s=60.0) as fleet:
            fleet.router = Refusing(fleet.clients.pop())
            return await generate(fleet, REQUESTS[:6]), fleet.router.why, fleet.failed

    found, why, failed = asyncio.run(body())
    assert [list(one.ids) for one in found] == [tokens_of(request) for request in REQUESTS[:6]]
    assert "server 1: /generate answered 400" in why and not failed
    with pytest.raises(RefusedError, match="server 0: /generate answered 400"):
        asyncio.run(body(refuse_all=True))


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ({"servers": []}, r"unexpected reply \(KeyError\('workers'\)\): \{'servers': \[\]\}"),
        ({"workers": [{"url": "http://one", "id": "1", "healthy": True}]}, r"KeyError\('is_healthy'\)"),
        ({"workers": ["http://one"]}, "TypeError"),
        (["http://one"], r'answered 200: \["http://one"\]'),
    ],
)
def test_a_router_of_a_version_with_other_replies_is_given_up(caplog, reply, why):
    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={} if request.method == "POST" else reply)

    async def body():
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http:
            router = Router(SETTINGS, http, api_key=None, logs=Path())
            router.client.url, router.is_up = "http://router", True
            return await router.leads_to(["http://one"]), await router.leads_to(["http://one"])

    assert asyncio.run(body()) == (False, False)
    (warning,) = caplog.messages
    assert re.search(rf"directly: SGLang router: GET /workers .*{why}", warning)


@requires_router
@pytest.mark.parametrize("who", ["a router of another job", "something that answers everything"])
def test_what_answers_at_its_port_is_not_taken_for_the_router(tmp_path, monkeypatch, who):
    with contextlib.ExitStack() as stack:
        if who == "a router of another job":
            other = Router(SETTINGS, None, api_key=None, logs=tmp_path / "other")
            stack.callback(other.stop)
            other.start()
            taken = int(other.client.url.rsplit(":", 1)[1])
        else:
            taken = stack.enter_context(answering({"/health": (200, b"OK")}))
        ports = [taken]
        monkeypatch.setattr(server, "free_port", lambda host: ports.pop() if ports else free_port(host))
        router = Router(SETTINGS, None, api_key=None, logs=tmp_path)
        stack.callback(router.stop)
        router.start()
        assert not ports and router.is_up and not router.client.url.endswith(f":{taken}")


def test_a_router_that_is_not_installed_is_one_sentence(tmp_path):
    config = replace(SETTINGS, python=str(REPO / ".venv" / "bin" / "python"), router_launch=("-m", "sglang_router.nothing"))
    with pytest.raises(UserError, match=r"sglang\.router: SGLang router ended while it started[^$]*sglang_router"):
        Router(config, None, api_key=None, logs=tmp_path).start()
