"""Measure the all-reduce bandwidth of every pair of nodes and of all ranks together. A collective."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from etr_megatron.preflight.findings import Finding

SLOW = 0.5
"""A pair of nodes below this fraction of the median is reported as slow."""


def measure(nodes: Sequence[int], *, device: torch.device, size: int, timeout_s: float) -> list[Finding]:
    """All-reduce `size` bytes between the first ranks of every two nodes, in rounds of disjoint pairs, then over the world.

    nodes: torchrun's node number of every rank. Returns the findings on every rank. A pair that does not finish within
    `timeout_s` is reported if the process survives: with gloo it does; NCCL aborts it with its own message. The other nodes
    wait for the pair, so the world's timeout must be longer.
    """
    firsts = [nodes.index(number) for number in sorted(set(nodes))]
    speeds: dict[tuple[int, int], float | str] = {}
    for pairs in rounds(len(firsts)):
        own = next(((a, b) for a, b in pairs if dist.get_rank() in (firsts[a], firsts[b])), None)
        speed = None if own is None else _pair((firsts[own[0]], firsts[own[1]]), device, size, timeout_s)
        found: list[tuple[tuple[int, int] | None, float | str | None]] = [(None, None)] * len(nodes)
        dist.all_gather_object(found, (own, speed))
        for pair, result in found:
            # A pair may have failed on only one side.
            if pair is not None and result is not None and not isinstance(speeds.get(pair), str):
                speeds[pair] = result
    speeds = dict(sorted(speeds.items()))
    whole = _all_reduce(None, device, size) if all(isinstance(speed, float) for speed in speeds.values()) else "not measured"
    return [*_pairs(speeds), _finding("all-reduce of all ranks", whole)]


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `count` numbers once, as (smaller, larger), in the fewest rounds of disjoint pairs. One place is fixed, and
    the others rotate (Kirkman 1847)."""
    places: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    for _ in range(len(places) - 1):
        couples = zip(places[: len(places) // 2], reversed(places), strict=False)
        yield [(min(a, b), max(a, b)) for a, b in couples if a is not None and b is not None]
        places[1:] = [places[-1], *places[1:-1]]


def _pair(ranks: tuple[int, int], device: torch.device, size: int, timeout_s: float) -> float | str:
    """Bytes per second between this rank and another one of `ranks`, or an error message."""
    try:
        group = dist.new_group(sorted(ranks), datetime.timedelta(seconds=timeout_s), use_local_synchronization=True)
        try:
            return _all_reduce(group, device, size)
        finally:
            dist.destroy_process_group(group)
    except RuntimeError as error:
        return str(error).splitlines()[0]


def _all_reduce(group: dist.ProcessGroup | None, device: torch.device, size: int, rounds: int = 3) -> float:
    """Buffer bytes per second, median of `rounds` after a warmup round. Raises RuntimeError for a wrong sum."""
    ranks, seconds = dist.get_world_size(group), []
    for _ in range(rounds + 1):
        buffer = torch.ones(size // 4, device=device)
        start = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        if not bool((buffer == ranks).all()):  # also synchronizes with the device
            raise RuntimeError(f"a sum of ones over {ranks} ranks came out wrong")
        seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds[1:])


def _pairs(speeds: dict[tuple[int, int], float | str]) -> list[Finding]:
    if not speeds:
        return [Finding("all-reduce between nodes", "ok", "one node")]
    measured = {pair: speed for pair, speed in speeds.items() if isinstance(speed, float)}
    found = [
        Finding(f"all-reduce of nodes {a} and {b}", "FAILED", speed)
        for (a, b), speed in speeds.items()
        if isinstance(speed, str)
    ]
    if measured:
        middle = statistics.median(measured.values())
        slow = {pair: speed for pair, speed in measured.items() if speed < SLOW * middle}
        found += [
            Finding(f"all-reduce of nodes {a} and {b}", "warning", f"{_speed(speed)}, the median pair has {_speed(middle)}")
            for (a, b), speed in slow.items()
        ]
        found.append(Finding("all-reduce between nodes", "ok", f"{len(measured)} pairs, median {_speed(middle)}"))
    return found


def _finding(check: str, speed: float | str) -> Finding:
    return Finding(check, "FAILED", speed) if isinstance(speed, str) else Finding(check, "ok", _speed(speed))


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
