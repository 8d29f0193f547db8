"""What servers report of their load while they generate, for the metrics of a step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from etr_megatron.rollout.sglang.client import ServerClient, ServerError

_ROUTE = "/v1/loads"
"""SGLang (0.5.21) answers it from shared memory; its scheduler, which generates, is not asked."""

_EVERY_S, _TIMEOUT_S = 2.0, 2.0


class _Load(NamedTuple):
    """One report. running, queued: requests. cache_used: share of the KV cache, in the fullest attention group. decoded: for
    each group, tokens and microseconds of all its decoding steps since the server's start."""

    server: str
    running: int
    queued: int
    cache_used: float
    decoded: Sequence[tuple[float, float]]


class LoadMonitor:
    """Asks servers for their load while responses are in flight. A server that does not report it is left out.

    serving: the servers that take requests. in_flight: whether there are requests in flight.
    """

    def __init__(self, serving: Callable[[], Sequence[ServerClient]], in_flight: Callable[[], object]) -> None:
        self._serving, self._in_flight = serving, in_flight
        self._loads: list[_Load] = []

    async def run(self) -> None:
        """Ask again and again, two seconds after the last reply, until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            if self._in_flight():
                await self.ask()

    async def ask(self) -> None:
        """Ask all servers once."""
        found = await asyncio.gather(*(_ask(client) for client in self._serving() if client.has(_ROUTE)))
        self._loads += [load for load in found if load is not None]

    def take(self) -> dict[str, float]:
        """Metrics of the reports since the last call, see `MetricsRow`; empty without one. May be called from any thread; a
        report that arrives at the same time may be lost."""
        loads, self._loads = [*self._loads], []
        if not loads:
            return {}
        found = {
            "server_running_mean": fmean(load.running for load in loads),
            "server_queued_mean": fmean(load.queued for load in loads),
            "server_queued_max": max(load.queued for load in loads),
            "server_cache_used_mean": fmean(load.cache_used for load in loads),
            "server_cache_used_max": max(load.cache_used for load in loads),
        }
        ends = {load.server: load for load in loads}
        begins = {load.server: load for load in reversed(loads)}
        rates = [rate for name in ends if (rate := _tokens_per_s(begins[name], ends[name])) > 0]
        return found | ({"server_tokens_per_s_mean": fmean(rates)} if rates else {})


async def _ask(client: ServerClient) -> _Load | None:
    try:
        groups = (await client.get(f"{_ROUTE}?include=core", timeout_s=_TIMEOUT_S))["loads"]
        return _Load(
            client.name,
            sum(int(group["num_running_reqs"]) for group in groups),
            sum(int(group["num_waiting_reqs"]) for group in groups),
            max(float(group["token_usage"]) for group in groups),
            [_decoded(group) for group in groups],
        )
    except (ServerError, KeyError, TypeError, ValueError, IndexError):
        return None


def _decoded(group: Mapping[str, Any]) -> tuple[float, float]:
    """Tokens and microseconds of its decoding steps (`_accumulate_decode_moment` in SGLang's scheduler.py)."""
    moments = group.get("decode_moments") or [0.0] * 6
    return float(moments[5]), float(moments[2])


def _tokens_per_s(begin: _Load, end: _Load) -> float:
    """Tokens that the server's groups decoded per second of decoding between two reports; 0 if there was none, or if the server
    was started again."""
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(begin.decoded, end.decoded, strict=False)]
    if any(tokens < 0 or us < 0 for tokens, us in steps):
        return 0.0
    return sum(tokens / us * 1e6 for tokens, us in steps if us > 0)
