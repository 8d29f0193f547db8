"""Implementations that bring weights from one layout to another. Each has a `run`; buffers are made before timing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.reshard_broadcast import BroadcastTransport
from benchmarks.reshard_problem import Case
from etr_megatron.weights import Architecture, Weight, join_shards, read_shard, weights_of
from etr_megatron.weights.layout import shards_of
from etr_megatron.weights.reshard import make_reshard_plan
from etr_megatron.weights.shards import box
from etr_megatron.weights.transport import ShardedTransport, Wire

Shards = dict[str, Tensor]


class Sharded:
    """Ours: every byte is sent once, in buckets."""

    def __init__(self, case: Case, arch: Architecture, sources: Shards, destinations: Shards, dtype: torch.dtype) -> None:
        plan = make_reshard_plan(case.source, case.destination, arch, destination_start=case.start, itemsize=dtype.itemsize)
        self.wire = Wire.in_world(timeout_s=300)
        self._transport = ShardedTransport(plan, self.wire, dtype=dtype)
        self._shards = sources or None, destinations or None
        self._version = 0

    def run(self) -> None:
        self._version += 1
        self._transport.sync(self._version, *self._shards)

    @property
    def bytes_sent(self) -> int:
        return self.wire.bytes_sent


class Broadcast(Sharded):
    """Made of our parts: full tensors gathered on rank 0 and broadcast, in buckets; gather and broadcast overlap."""

    def __init__(self, case: Case, arch: Architecture, sources: Shards, destinations: Shards, dtype: torch.dtype) -> None:
        self.wire = Wire.in_world(timeout_s=300)
        self._transport = BroadcastTransport(case.source, case.destination, arch, self.wire, case.start, dtype)
        self._shards = sources or None, destinations or None
        self._version = 0


class GatherBroadcast:
    """The usual way, by plain torch.distributed: shards are sent to rank 0 and joined there; buckets of about 64 MiB are
    broadcast to all receivers, which cut their shards from them."""

    BUCKET_BYTES = 64 << 20

    def __init__(self, case: Case, arch: Architecture, sources: Shards, destinations: Shards, dtype: torch.dtype) -> None:
        rank = dist.get_rank()
        self._sources, self._destinations, self._dtype, self._rank = sources, destinations, dtype, rank
        # One replica of each shard is enough.
        self._steps = [
            (weight, [(placed.shard, placed.ranks[0]) for placed in case.source.placed_shards(weight, arch)])
            for weight in weights_of(arch)
        ]
        place = rank - case.start
        self._own = {}
        if 0 <= place < case.destination.world:
            self._own = {weight.megatron: shard for weight, shard in shards_of(case.destination, arch, place)}
        receivers = sorted({0, *range(case.start, case.start + case.destination.world)})
        group = dist.new_group(receivers)
        self._group = group if rank in receivers else None
        self._receivers = len(receivers) - 1
        self.bytes_sent = 0

    def run(self) -> None:
        filling: list[tuple[Weight, dict[str, Tensor]]] = []
        nbytes = 0
        for weight, holders in self._steps:
            full = self._gather(weight, holders)
            filling.append((weight, full))
            nbytes += sum(torch.Size(shape).numel() for shape in weight.shapes) * self._dtype.itemsize
            if nbytes >= self.BUCKET_BYTES:
                self._broadcast(filling)
                filling, nbytes = [], 0
        self._broadcast(filling)

    def _gather(self, weight: Weight, holders: list) -> dict[str, Tensor]:
        """The full HF tensors on rank 0."""
        parts = []
        for shard, holder in holders:
            if self._rank == holder == 0:
                parts.append((shard, self._sources[weight.megatron]))
            elif self._rank == 0:
                parts.append((shard, torch.empty(shard.shape, dtype=self._dtype)))
                dist.recv(parts[-1][1], holder)
            elif self._rank == holder:
                dist.send(self._sources[weight.megatron], 0)
                self.bytes_sent += self._sources[weight.megatron].nbytes
        return join_shards(weight, parts) if self._rank == 0 else {}

    def _broadcast(self, bucket: list[tuple[Weight, dict[str, Tensor]]]) -> None:
        if self._group is None or not bucket:
            return
        shapes = [(name, shape) for weight, _ in bucket for name, shape in zip(weight.hf, weight.shapes, strict=True)]
        sizes = [torch.Size(shape).numel() for _, shape in shapes]
        if self._rank == 0:
            flat = torch.cat([full[name].flatten() for weight, full in bucket for name in weight.hf])
            self.bytes_sent += flat.nbytes * self._receivers
        else:
            flat = torch.empty(sum(sizes), dtype=self._dtype)
        dist.broadcast(flat, 0, group=self._group)
        found = {name: part.view(shape) for (name, shape), part in zip(shapes, flat.split(sizes), strict=True)}
        for weight, _ in bucket:
            if weight.megatron in self._own:
                read: Any = lambda name, begin, size: box(found[name], begin, size)  # noqa: E731
                self._destinations[weight.megatron].copy_(read_shard(weight, self._own[weight.megatron], read))


class BareCopy:
    """The floor: as many bytes as `Sharded` sends between the same ranks, one flat message per pair, and as many bytes copied
    within a process, from one flat buffer to another."""

    def __init__(self, case: Case, arch: Architecture, sources: Shards, destinations: Shards, dtype: torch.dtype) -> None:
        plan = make_reshard_plan(case.source, case.destination, arch, destination_start=case.start, itemsize=dtype.itemsize)
        rank = dist.get_rank()
        self._sends, self._receives, self._copies = [], [], []
        for (source, destination), transfers in plan.pairs.items():
            nbytes = sum(plan.bytes(transfer, dtype.itemsize) for transfer in transfers)
            there = case.start + destination
            if rank in (source, there):
                flat = torch.ones(nbytes, dtype=torch.uint8)
                if source == there:
                    self._copies.append((torch.zeros_like(flat), flat))
                elif rank == source:
                    self._sends.append((flat, there))
                else:
                    self._receives.append((flat, source))
        self.bytes_sent = 0

    def run(self) -> None:
        works = [dist.irecv(flat, source) for flat, source in self._receives]
        works += [dist.isend(flat, destination) for flat, destination in self._sends]
        for target, flat in self._copies:
            target.copy_(flat)
        for work in works:
            work.wait()
        self.bytes_sent += sum(flat.nbytes for flat, _ in self._sends)


class MegatronCore:
    """megatron-core's `resharding` over gloo, between two GPTModels in the same processes."""

    def __init__(self, source_model: Any, destination_model: Any) -> None:
        self._models = [source_model], [destination_model]
        self.bytes_sent = 0

    def run(self) -> None:
        from megatron.core.resharding.refit import swap_model_weights

        swap_model_weights(*self._models, "gloo")


OURS_AND_PLAIN = {
    "sharded": Sharded,
    "broadcast": Broadcast,
    "gather_broadcast": GatherBroadcast,
    "bare_copy": BareCopy,
}
