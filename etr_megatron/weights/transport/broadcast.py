"""Sends full HF tensors in flat buckets to every receiver, as a stock server takes them; each receiver cuts its own shard.

The shards of a bucket's weights are gathered on process 0 (only what it does not hold itself), quantised there if asked for,
and broadcast. While a bucket is sent, the next one is gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.layout import Placement, WholeLayout
from etr_megatron.weights.map import weights_of
from etr_megatron.weights.plan import Plan, Transfer, make_plan
from etr_megatron.weights.transport.buckets import Shards, destination_box, source_box
from etr_megatron.weights.transport.collective import CollectiveTransport
from etr_megatron.weights.transport.verify import compare, destination_checksum, piece_checksum, refuse_differing
from etr_megatron.weights.transport.whole import Gather, groups_of
from etr_megatron.weights.transport.wire import Part, Wire


class BroadcastTransport(CollectiveTransport):
    """See `Transport`. The source is the wire's processes from 0 on, the destination those from `destination_start` on (by
    default after the source).

    groups: the buckets; `Group.tensors` is what a server must be told about one. bucket_bytes: bound of a bucket (or the
    largest weight), of which there are two, and of the gather's buckets. The other arguments are those of `ShardedTransport`
    and `make_plan`. Raises as they do, except that the source may cut FP8 blocks; the destination may not.
    """

    def __init__(
        self,
        source: Placement,
        destination: Placement,
        arch: Architecture,
        wire: Wire,
        *,
        destination_start: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        fp8_block: int | None = None,
        bucket_bytes: int = 64 << 20,
        checksums: bool = False,
    ) -> None:
        start = source.world if destination_start is None else destination_start
        super().__init__(wire, arch, source, destination, start, fp8_block)
        self.groups = list(groups_of(list(weights_of(arch)), dtype, fp8_block, bucket_bytes))
        self._cut = make_plan(WholeLayout(1, _first), destination, arch, itemsize=dtype.itemsize, fp8_block=fp8_block)
        self._cut_groups = [self._cut.only({weight.megatron for weight in group.weights}) for group in self.groups]
        self._gather = None
        if self.source is not None:
            together = [[group] for group in self.groups]
            self._gather = Gather(source, arch, _first, together, wire, dtype=dtype, bucket_bytes=bucket_bytes)
        self._receivers = wire.part(sorted({0, *range(start, start + destination.world)}))
        self._memory: list[Tensor] = []
        self._dtype, self._checksums = dtype, checksums

    def _transfer(self, sources: Shards, destinations: Shards) -> None:
        works: list[tuple[int, Any]] = []
        for number in range(len(self.groups)):
            flat = self._flat(number)
            self._gather_group(number, sources, flat)
            before, works = works, self.wire.broadcast(flat, self._receivers) if flat is not None else []
            if number:
                self.wire.wait(before)
                self._finish(number - 1, destinations)
        self.wire.wait(works)
        self._finish(len(self.groups) - 1, destinations)

    def _flat(self, number: int) -> Tensor | None:
        """The bucket of a group, one of two; None on ranks that only help to gather."""
        if self._receivers.group is None:
            return None
        if not self._memory:
            size, device = max(group.nbytes for group in self.groups), self.wire.device
            self._memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        return self._memory[number % 2][: self.groups[number].nbytes]

    def _gather_group(self, number: int, sources: Shards, flat: Tensor | None) -> None:
        if self._gather is None:
            return
        own = (self.groups[number], flat) if self.wire.rank == 0 and flat is not None else None
        full = self._gather.group(number, sources, own)
        if self._checksums:
            compare(self._gather.exchanges[number], sources, full)

    def _finish(self, number: int, destinations: Shards) -> None:
        """Cut this rank's shards out of a bucket that has arrived."""
        flat, plan = self._flat(number), self._cut_groups[number]
        if flat is None:
            return
        found = {name: field.view(flat) for name, field in self.groups[number].shards.items()}
        own = () if self.destination is None else plan.pairs.get((0, self.destination), ())
        for transfer in own:
            for block in (None, plan.fp8_block) if plan.is_fp8(transfer.weight) else (None,):
                destination_box(transfer, destinations, block).copy_(source_box(transfer, found, block))
        if self._checksums:
            self._compare(plan, found, own, destinations)

    def _compare(self, plan: Plan, found: Shards, own: tuple[Transfer, ...], destinations: Shards) -> None:
        """Compare every receiver's pieces with what process 0 has in the bucket."""
        counts = {destination: len(transfers) for (_, destination), transfers in plan.pairs.items()}
        sums = torch.zeros(sum(counts.values()), dtype=torch.int64, device=self.wire.device)
        if self.wire.rank == 0:
            transfers = [transfer for some in plan.pairs.values() for transfer in some]
            sums.copy_(torch.tensor([_bucket_checksum(plan, transfer, found) for transfer in transfers], dtype=torch.int64))
        self.wire.wait(self.wire.broadcast(sums, self._receivers))
        of_rank: dict[int | None, Tensor] = dict(zip(counts, sums.split(list(counts.values())), strict=True))
        wanted = of_rank.get(self.destination, sums[:0]).tolist()
        refuse_differing(
            self.wire,
            [t for t, one in zip(own, wanted, strict=True) if destination_checksum(plan, t, destinations, self._dtype) != one],
        )

    def close(self) -> None:
        """See `Transport.close`."""
        self._receivers = Part((), None)
        super().close()
        self._memory.clear()
        if self._gather is not None:
            self._gather.forget()


def _first(_weight: object) -> int:
    return 0


def _bucket_checksum(plan: Plan, transfer: Transfer, bucket: Shards) -> int:
    scales = source_box(transfer, bucket, plan.fp8_block) if plan.is_fp8(transfer.weight) else None
    return piece_checksum(source_box(transfer, bucket), scales)
