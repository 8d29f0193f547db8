"""A server without a model, for the rollout benchmark: speaks SGLang's protocol; a response's length depends only on its seed.

    python -m benchmarks.rollout_server '{"tokens": 16}'

It prints its port. tokens: per response. tail: tokens of long responses, a share `tail_share` of all. rate: tokens per second
of each response; 0 means at once. limit: if set, requests with a lower `max_new_tokens` resume a response that was cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from etr_megatron.platform.lifetime import die_with_parent

_ROUTES = (
    *("/generate", "/abort_request", "/model_info", "/server_info", "/health", "/flush_cache", "/update_weight_version"),
    *("/pause_generation", "/continue_generation", "/init_weights_update_group", "/update_weights_from_distributed"),
)
_OPENAPI = json.dumps({"paths": {route: {} for route in _ROUTES}}).encode()


@lru_cache(maxsize=4096)
def reply(tokens: int, finish: str) -> bytes:
    """Reply of `/generate` with this many tokens. Log-probs are printed with the digits of a float32."""
    ids = [3 + number % 251 for number in range(tokens)]
    pairs = [[-0.7310585975646973 - token / 1024, token, None] for token in ids]
    meta = {"output_token_logprobs": pairs, "finish_reason": {"type": finish}, "weight_version": "0"}
    return json.dumps({"output_ids": ids, "meta_info": meta}, separators=(",", ":")).encode()  # as SGLang writes it


@dataclass
class Responses:
    """Lengths and durations of responses."""

    tokens: int
    tail: int = 0
    tail_share: float = 0.0
    rate: float = 0.0
    limit: int = 0
    _cuts: dict[str, asyncio.Event] = field(default_factory=dict)

    def length(self, seed: int) -> int:
        """Tokens of the whole response with this seed."""
        # Knuth's multiplicative hash, which spreads similar seeds.
        return self.tail if (seed * 2654435761) % (1 << 32) < self.tail_share * (1 << 32) else self.tokens

    async def generate(self, body: dict[str, Any]) -> bytes:
        """The rest of a response, or the part generated before it was cut off."""
        sampling = body["sampling_params"]
        begun = self.limit - sampling["max_new_tokens"] if self.limit else 0
        left = self.length(sampling["sampling_seed"]) - begun
        if not self.rate:
            return reply(left, "stop")
        loop, cut = asyncio.get_running_loop(), self._cuts.setdefault(body.get("rid", ""), asyncio.Event())
        started = loop.time()
        try:
            await asyncio.wait_for(cut.wait(), left / self.rate)
        except TimeoutError:
            return reply(left, "stop")
        finally:
            self._cuts.pop(body.get("rid", ""), None)
        return reply(min(left, int((loop.time() - started) * self.rate)), "abort")

    async def answer(self, route: str, body: bytes) -> bytes:
        """The reply to a request."""
        if route == "/generate":
            return await self.generate(json.loads(body))
        if route == "/abort_request":
            with contextlib.suppress(KeyError):
                self._cuts[json.loads(body)["rid"]].set()
        return _OPENAPI if route == "/openapi.json" else b"{}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it is closed."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
                lengths = [line.split(b":")[1] for line in head if line.lower().startswith(b"content-length:")]
                body = await reader.readexactly(int(lengths[0])) if lengths else b""
                found = await self.answer(head[0].split()[1].decode(), body)
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(found) + found
                )
                await writer.drain()


async def _main() -> None:
    responses = Responses(**json.loads(sys.argv[1]))
    server = await asyncio.start_server(responses.serve, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(_main())
