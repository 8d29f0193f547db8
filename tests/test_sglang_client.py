"""Requests to one server: their deadlines, without a process that answers them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from array import array
from dataclasses import replace

import httpx
import pytest

from etr_megatron.rollout.sglang.client import GenerateParameters, ServerClient, ServerError
from etr_megatron.rollout.sglang.connections import Connections
from etr_megatron.rollout.sglang.replies import of_expert_layers
from etr_megatron.weights import read_architecture

PARAMETERS = GenerateParameters(max_new_tokens=5, temperature=1.0, top_p=1.0, top_k=0, seed=1, stop_ids=(2,))


class OwnTime(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while anything is to be done, and otherwise jumps to the next timer. However slow
    the machine is, everything takes the time that it sleeps."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()


class LosesOne(httpx.AsyncBaseTransport):
    """Answers one request after another, and never the one of seed 0."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if json.loads(request.content)["sampling_params"]["sampling_seed"] == 0:
            await asyncio.sleep(3600)
        await asyncio.sleep(0.05)
        meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[-1.0, 5, None]], "weight_version": "1"}
        return httpx.Response(200, json={"output_ids": [5], "meta_info": meta})


def test_a_request_that_a_server_loses_is_late_although_others_are_completed():
    async def body():
        async with httpx.AsyncClient(transport=LosesOne()) as http:
            client = ServerClient("server", "http://nowhere", http)
            lost = asyncio.ensure_future(client.generate([3], replace(PARAMETERS, seed=0), timeout_s=0.3))
            completed = 0
            while not lost.done():
                await client.generate([3], replace(PARAMETERS, seed=1), timeout_s=60)
                completed += 1
            return completed, lost.exception()

    with asyncio.Runner(loop_factory=OwnTime) as runner:
        completed, error = runner.run(body())
    assert str(error) == "server: /generate completed no response within 0.3 s"
    assert 59 <= completed <= 61  # one each 0.05 s, for 10 x 0.3 s in all; without them it would be late after 0.3 s


def test_experts_of_dense_layers_are_left_out(hf_models):
    glm, qwen = (read_architecture(hf_models[name]) for name in ("glm4_moe", "qwen3_moe"))
    said = array("B", [number for token in range(2) for layer in range(4) for number in (layer, token, 5)])
    said[:3] = said[12:15] = array("B", [0, 0, 0])  # of the dense layer
    assert of_expert_layers(said, glm).tolist() == [1, 0, 5, 2, 0, 5, 3, 0, 5, 1, 1, 5, 2, 1, 5, 3, 1, 5]
    assert of_expert_layers(said, qwen) is said  # it has experts in all layers
    others = array("B", [1, 0, 5, 2, 0, 5, 3, 0, 5] * 4)  # four tokens in three layers, as many numbers as three in four
    assert of_expert_layers(others, glm) is others
    assert of_expert_layers(said[:-1], glm) == said[:-1]  # not of all layers: refused later, with the sample's name


def test_a_timeout_of_the_connection_is_a_servers_failure():
    async def times_out(_request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectTimeout("no route")

    async def body():
        async with httpx.AsyncClient(transport=httpx.MockTransport(times_out)) as http:
            await ServerClient("server", "http://nowhere", http).generate([3], PARAMETERS, timeout_s=60)

    with pytest.raises(ServerError, match=r"^server: /generate failed: no route$"):
        asyncio.run(body())


def test_a_reply_that_comes_in_drops_has_one_deadline_all_the_same():
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
            for _ in range(10000):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.1)

    async def body():
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        async with server, httpx.AsyncClient(transport=Connections()) as http:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await asyncio.wait_for(ServerClient("server 0", url, http).get("/model_info", timeout_s=0.5), 60)

    with pytest.raises(ServerError, match=r"server 0: /model_info did not answer within 0\.5 s"):
        asyncio.run(body())
