"""The processes of one conversion: this one alone, or those that torchrun started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from etr_megatron.platform.all_ranks import on_all_ranks
from etr_megatron.platform.files import path_errors

T = TypeVar("T")

_COLLECTIVE_TIMEOUT = datetime.timedelta(days=2)
"""Timeout of collectives. Ranks wait for each other's share of a conversion. A rank that dies is noticed at once, as its
connections close; a rank that hangs is noticed by `watch`."""


class Ranks:
    """Joins the world that torchrun describes in the environment, or uses an existing process group."""

    def __init__(self) -> None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo", timeout=_COLLECTIVE_TIMEOUT)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        # For one process None. The world's own group may use NCCL, and may have a short timeout.
        self.group = dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT) if self.world > 1 else None

    def on_all_ranks(self, work: Callable[[], T]) -> T:
        """As `all_ranks.on_all_ranks`, with `path_errors`; not a collective with one process."""

        def named() -> T:
            with path_errors():
                return work()

        return on_all_ranks(named, self.group) if self.group is not None else named()

    def on_rank0(self, work: Callable[[], T]) -> T | None:
        """Do `work` on rank 0 while the others wait; returns its result there. A collective, raises as `on_all_ranks`."""
        return self.on_all_ranks(lambda: work() if self.rank == 0 else None)

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank. A collective."""
        values = [value]
        if self.group is not None:
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def all_reduce_sum(self, number: int) -> int:
        """The sum of all ranks' numbers. A collective."""
        numbers = [number] * self.world
        if self.group is not None:
            dist.all_gather_object(numbers, number, group=self.group)
        return sum(numbers)

    def share(self, sizes: Sequence[int]) -> range:
        """Indices of this rank's items: a run of consecutive ones, with about as many bytes as any other rank's."""
        total, before = max(1, sum(sizes)), 0
        mine = []
        for number, size in enumerate(sizes):
            if min(self.world - 1, (before + size // 2) * self.world // total) == self.rank:
                mine.append(number)
            before += size
        return range(mine[0], mine[-1] + 1) if mine else range(0)
