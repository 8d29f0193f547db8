"""Exchanges the buckets of a plan between ranks, in rounds.

Messages between two ranks are buckets. All ranks work through rounds: in round n every pair exchanges its bucket n. A rank
waits only for messages of its own round, and the rank that is furthest behind waits for no other, so there is no deadlock.
While a round is sent, the next one is packed and the previous one is unpacked.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from etr_megatron.weights.reshard import ReshardPlan
from etr_megatron.weights.transport.buckets import Bucket, Shards, Staged, buckets_of, copy_local, pack, stage, unpack
from etr_megatron.weights.transport.wire import Message, Wire

MIN_BUCKET_BYTES = 1 << 20
"""Minimum of the size limit of a pair's buckets, however many pairs there are."""

_Part = tuple[int, Staged, Tensor]
"""The peer of a bucket, this rank's side of it, and the part of the memory that it is copied through."""


class Memory:
    """Owns the buffers that buckets are copied through: two for each direction, because one round is sent or unpacked while the
    next one is packed or received. A buffer holds the buckets of all peers in a round.

    Exchanges that run one after the other share it, and buffers grow to the largest round: new memory for every round would be
    slow where pages must be mapped or pinned first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[bool, int], Tensor] = {}

    def of_round(self, number: int, nbytes: int, *, sending: bool) -> Tensor:
        """The buffer of a round, uint8 [nbytes]. It may be used until the round after next asks for its own."""
        key = sending, number % 2
        if key not in self._buffers or self._buffers[key].numel() < nbytes:
            self._buffers.pop(key, None)  # so that it is free before the larger one is allocated
            pinned = self._device.type == "cpu" and torch.cuda.is_available()
            self._buffers[key] = torch.empty(nbytes, dtype=torch.uint8, device=self._device, pin_memory=pinned)
        return self._buffers[key][:nbytes]

    def free(self) -> None:
        """Free the buffers."""
        self._buffers.clear()


class Exchange:
    """One rank's part of a plan. See `ShardedTransport` for the arguments; `run` is a collective without a `Board.barrier`.

    memory: for buckets; other exchanges may use it before and after a run.
    """

    def __init__(self, plan: ReshardPlan, wire: Wire, memory: Memory, *, dtype: torch.dtype, bucket_bytes: int) -> None:
        self.wire, self.dtype = wire, dtype
        self.source = wire.rank if wire.rank < plan.source.world else None
        place = wire.rank - plan.destination_start
        self.destination = place if 0 <= place < plan.destination.world else None
        self._outgoing, self._incoming = self._own_buckets(plan, bucket_bytes)
        self._memory = memory
        # Only this rank's part is kept: with many experts and servers, all transfers take hundreds of megabytes.
        own = {pair: some for pair, some in plan.pairs.items() if pair[0] == self.source or pair[1] == self.destination}
        self.plan = replace(plan, pairs=own)

    def _own_buckets(self, plan: ReshardPlan, bucket_bytes: int) -> tuple[dict[int, list[Bucket]], dict[int, list[Bucket]]]:
        """This rank's buckets by peer process. A pair's bucket size follows from the busier end's number of peers."""
        remote = [pair for pair in plan.pairs if not plan.is_local(*pair)]
        sources = Counter(destination for _, destination in remote)
        destinations = Counter(source for source, _ in remote)
        outgoing, incoming = {}, {}
        for source, destination in remote:
            if source != self.source and destination != self.destination:
                continue
            limit = max(MIN_BUCKET_BYTES, bucket_bytes // max(sources[destination], destinations[source]))
            buckets = buckets_of(plan, plan.pairs[source, destination], self.dtype, limit)
            if source == self.source:
                outgoing[plan.destination_start + destination] = buckets
            if destination == self.destination:
                incoming[source] = buckets
        return outgoing, incoming

    def run(self, sources: Shards, destinations: Shards) -> None:
        """Fill the destination shards of this rank from the source shards of all."""
        rounds = max((len(buckets) for buckets in (*self._outgoing.values(), *self._incoming.values())), default=0)
        sends, receives = self._pack(0, sources), self._stage(0, destinations, sending=False)
        works = self._post(sends, receives)
        self._copy_local(sources, destinations)
        for number in range(rounds):
            sends = self._pack(number + 1, sources)
            self.wire.wait(works)
            arrived, receives = receives, self._stage(number + 1, destinations, sending=False)
            works = self._post(sends, receives)
            for _, staged, flat in arrived:
                unpack(self.plan, staged, flat, destinations)

    def _stage(self, number: int, shards: Shards, *, sending: bool) -> list[_Part]:
        """A round's buckets in one direction."""
        own = self._outgoing if sending else self._incoming
        peers = [peer for peer, buckets in own.items() if number < len(buckets)]
        found = [stage(self.plan, own[peer][number], shards, self.wire.device, sending=sending) for peer in peers]
        sizes = [staged.nbytes for staged in found]
        flats = self._memory.of_round(number, sum(sizes), sending=sending).split(sizes)
        return list(zip(peers, found, flats, strict=True))

    def _pack(self, number: int, sources: Shards) -> list[_Part]:
        found = self._stage(number, sources, sending=True)
        for _, staged, flat in found:
            pack(self.plan, staged, flat, sources, self.dtype)
        return found

    def _post(self, sends: list[_Part], receives: list[_Part]) -> list[tuple[int, Any]]:
        """Start a round."""

        def messages(some: list[_Part]) -> list[Message]:
            return [(message, peer) for peer, staged, flat in some for message in staged.messages(flat)]

        return self.wire.exchange(messages(sends), messages(receives))

    def _copy_local(self, sources: Shards, destinations: Shards) -> None:
        """Copy the transfers within this process."""
        source, destination = self.source, self.destination
        if source is None or destination is None or not self.plan.is_local(source, destination):
            return
        for transfer in self.plan.pairs.get((source, destination), ()):
            copy_local(self.plan, transfer, sources, destinations, self.dtype)
