"""Shard to shard: every byte is sent once, from a rank that holds it to one that needs it."""

from __future__ import annotations

import torch

from etr_megatron.weights.reshard import ReshardPlan
from etr_megatron.weights.transport.base import Transport
from etr_megatron.weights.transport.buckets import Shards
from etr_megatron.weights.transport.exchange import Exchange
from etr_megatron.weights.transport.verify import compare
from etr_megatron.weights.transport.wire import Wire


class ShardedTransport(Transport):
    """See `Transport`. The wire's ranks are the plan's processes.

    dtype: of values that are sent unquantised, the same on all ranks; shards of another dtype are cast. bucket_bytes: bound of
    a rank's buckets in each direction (at least 1 MiB per peer); during a sync it has two sets of them. checksums: compare
    every destination piece with its source after each sync. Raises ValueError when the wire has another number of ranks.
    """

    def __init__(
        self,
        plan: ReshardPlan,
        wire: Wire,
        *,
        dtype: torch.dtype = torch.bfloat16,
        bucket_bytes: int = 64 << 20,
        checksums: bool = False,
    ) -> None:
        super().__init__(wire, plan.arch, plan.source, plan.destination, plan.destination_start, plan.fp8_block)
        self._exchange = Exchange(plan, wire, self._memory, dtype=dtype, bucket_bytes=bucket_bytes)
        self._checksums = checksums

    def _transfer(self, version: int, sources: Shards, destinations: Shards) -> None:
        self._exchange.run(sources, destinations)
        if self._checksums:
            compare(self._exchange, sources, destinations)
