"""A transport for comparison, made of the product's parts: full HF tensors in flat buckets, gathered on process 0 and broadcast
to every receiver, which cuts its own shard. While a bucket is sent, the next one is gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etr_megatron.weights import Architecture, WeightLayout, make_reshard_plan, weights_of
from etr_megatron.weights.layout import UnshardedLayout
from etr_megatron.weights.transport import Shards, Transport, Wire
from etr_megatron.weights.transport.buckets import destination_box, source_box
from etr_megatron.weights.transport.whole import Gather, weight_groups

BUCKET_BYTES = 64 << 20


class BroadcastTransport(Transport):
    """start: the process of the destination's first rank."""

    def __init__(
        self, source: WeightLayout, destination: WeightLayout, arch: Architecture, wire: Wire, start: int, dtype: torch.dtype
    ) -> None:
        super().__init__(wire, arch, source, destination, start)
        self._groups = weight_groups(weights_of(arch), dtype, None, BUCKET_BYTES)
        cut = make_reshard_plan(UnshardedLayout(1, lambda weight: 0), destination, arch, itemsize=dtype.itemsize)
        self._cuts = cut.split([[weight.megatron for weight in group.weights] for group in self._groups])
        self._gather = None
        if self.source is not None:
            together = [[group] for group in self._groups]
            owner, sizes = (lambda weight: 0), dict(dtype=dtype, bucket_bytes=BUCKET_BYTES)
            self._gather = Gather(source, arch, owner, together, wire, self._memory, **sizes)
        self._receivers = wire.subgroup(sorted({0, *range(start, start + destination.world)}))
        self._flats: list[Tensor] = []
        if self._receivers.group is not None:
            size = max(group.nbytes for group in self._groups)
            self._flats = [torch.empty(size, dtype=torch.uint8, device=wire.device) for _ in range(2)]

    def _transfer(self, version: int, sources: Shards, destinations: Shards) -> None:
        works: list[tuple[int, Any]] = []
        for number, group in enumerate(self._groups):
            flat = self._flat(number)
            if self._gather is not None:
                self._gather.run(number, sources, (group, flat) if self.wire.rank == 0 else None)
            before, works = works, self.wire.broadcast(flat, self._receivers) if flat is not None else []
            if number:
                self.wire.wait(before)
                self._cut(number - 1, destinations)
        self.wire.wait(works)
        self._cut(len(self._groups) - 1, destinations)

    def _flat(self, number: int) -> Tensor | None:
        """The bucket of a group, one of two; None on ranks that only help to gather."""
        return self._flats[number % 2][: self._groups[number].nbytes] if self._flats else None

    def _cut(self, number: int, destinations: Shards) -> None:
        """Cut this rank's shards out of a bucket that has arrived."""
        if self.destination is None:
            return
        found = {name: field.view(self._flat(number)) for name, field in self._groups[number].shards.items()}
        for transfer in self._cuts[number].pairs.get((0, self.destination), ()):
            destination_box(transfer, destinations).copy_(source_box(transfer, found))
