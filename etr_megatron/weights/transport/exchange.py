"""Exchanges the buckets of a plan between ranks, in rounds.

Messages between two ranks are buckets. All ranks work through rounds: in round n every pair exchanges its bucket n. A rank
waits only for messages of its own round, and the rank that is furthest behind waits for no other, so there is no deadlock.
While a round is sent, the next one is packed and the previous one is unpacked.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from etr_megatron.weights.plan import Plan
from etr_megatron.weights.transport.buckets import Bucket, Shards, buckets_of, copy_local, messages, pack, unpack
from etr_megatron.weights.transport.wire import Message, Wire

SMALLEST_BUCKET = 1 << 20
"""Minimum of the size limit of a pair's buckets, however many pairs there are."""

Memory = dict[tuple[bool, int, int], Tensor]
"""(sending, peer, parity of the round) -> uint8 buffer; exchanges that run one after the other may share it."""


class Exchange:
    """One rank's part of a plan. See `ShardedTransport` for the arguments; `run` is a collective without a `Board.meet`."""

    def __init__(self, plan: Plan, wire: Wire, *, dtype: torch.dtype, bucket_bytes: int, memory: Memory | None = None) -> None:
        self.plan, self.wire, self.dtype = plan, wire, dtype
        self.source = wire.rank if wire.rank < plan.source.world else None
        place = wire.rank - plan.destination_start
        self.destination = place if 0 <= place < plan.destination.world else None
        self._outgoing, self._incoming = self._own_buckets(bucket_bytes)
        self._memory: Memory = {} if memory is None else memory

    def _own_buckets(self, bucket_bytes: int) -> tuple[dict[int, list[Bucket]], dict[int, list[Bucket]]]:
        """This rank's buckets by peer process. A pair's bucket size follows from the busier end's number of peers."""
        plan = self.plan
        remote = [pair for pair in plan.pairs if not plan.is_local(*pair)]
        sources = Counter(destination for _, destination in remote)
        destinations = Counter(source for source, _ in remote)
        outgoing, incoming = {}, {}
        for source, destination in remote:
            if source != self.source and destination != self.destination:
                continue
            limit = max(SMALLEST_BUCKET, bucket_bytes // max(sources[destination], destinations[source]))
            buckets = buckets_of(plan, plan.pairs[source, destination], self.dtype, limit)
            if source == self.source:
                outgoing[plan.destination_start + destination] = buckets
            if destination == self.destination:
                incoming[source] = buckets
        return outgoing, incoming

    def run(self, sources: Shards, destinations: Shards) -> None:
        """Fill the destination shards of this rank from the source shards of all."""
        rounds = max((len(buckets) for buckets in (*self._outgoing.values(), *self._incoming.values())), default=0)
        self._pack(0, sources)
        works = self._post(0, sources, destinations)
        self._copy_what_is_here(sources, destinations)
        for number in range(rounds):
            self._pack(number + 1, sources)
            self.wire.wait(works)
            works = self._post(number + 1, sources, destinations)
            for source, buckets in self._incoming.items():
                if number < len(buckets):
                    unpack(self.plan, buckets[number], self._buffer(False, source, number), destinations)

    def forget(self) -> None:
        """Free the buckets' memory."""
        self._memory.clear()

    def _pack(self, number: int, sources: Shards) -> None:
        for destination, buckets in self._outgoing.items():
            if number < len(buckets):
                pack(self.plan, buckets[number], self._buffer(True, destination, number), sources, self.dtype)

    def _post(self, number: int, sources: Shards, destinations: Shards) -> list[tuple[int, Any]]:
        """Start a round."""

        def of_all(own: dict[int, list[Bucket]], shards: Shards, sending: bool) -> list[Message]:
            return [
                (message, peer)
                for peer, buckets in own.items()
                if number < len(buckets)
                for message in messages(
                    self.plan, buckets[number], self._buffer(sending, peer, number), shards, sending=sending
                )
            ]

        return self.wire.exchange(of_all(self._outgoing, sources, True), of_all(self._incoming, destinations, False))

    def _buffer(self, sending: bool, peer: int, number: int) -> Tensor:
        """Memory for bucket `number` of a peer. There are two: one is sent while the other is packed or unpacked."""
        key = sending, peer, number % 2
        size = max(bucket.nbytes for bucket in (self._outgoing if sending else self._incoming)[peer])
        if key not in self._memory or self._memory[key].numel() < size:
            pinned = self.wire.device.type == "cpu" and torch.cuda.is_available()
            self._memory[key] = torch.empty(size, dtype=torch.uint8, device=self.wire.device, pin_memory=pinned)
        return self._memory[key]

    def _copy_what_is_here(self, sources: Shards, destinations: Shards) -> None:
        """Copy the transfers within this process."""
        source, destination = self.source, self.destination
        if source is None or destination is None or not self.plan.is_local(source, destination):
            return
        for transfer in self.plan.pairs.get((source, destination), ()):
            copy_local(self.plan, transfer, sources, destinations, self.dtype)
