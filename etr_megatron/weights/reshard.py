"""Plans which rank sends which part of a weight to which rank, from two layouts. Pure arithmetic, the same on every rank.

plan = make_reshard_plan(TrainingLayout(tp=2, pp=2), ServerLayout(tp=2), arch)
for transfer in plan.pairs[(source_rank, destination_rank)]: ...

The boxes of an HF tensor that a destination needs are intersected with the boxes that every source holds. This is computed once
for all weights that are cut alike, and reused for every layer. Boxes that are adjacent on both sides are merged. Replicas share
the work, see `make_reshard_plan`.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from etr_megatron.errors import UserError
from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.file_tensor import Index
from etr_megatron.weights.layout import PlacedShard, WeightLayout
from etr_megatron.weights.map import Weight, weights_of
from etr_megatron.weights.quantize import scale_shape
from etr_megatron.weights.shards import Piece, Shard, moved, overlap

_GRAIN = 0.1
"""Largest transfer, as a fraction of a replica's mean load. It bounds every replica's load by (1 + this) x the mean."""


class Transfer(NamedTuple):
    """A box of `size`, sent from `source_at` in the source rank's shard to `destination_at` in the destination rank's shard."""

    source: int
    destination: int
    weight: Weight
    source_at: Index
    destination_at: Index
    size: Index


@dataclass(frozen=True)
class ReshardPlan:
    """All transfers of a sync.

    pairs: (source rank, destination rank) -> transfers, in the model's order. Source rank r is process r, destination rank r is
    process destination_start + r. fp8_block: rows and columns of a block where the destination holds quantised weights.
    """

    source: WeightLayout
    destination: WeightLayout
    arch: Architecture
    destination_start: int
    fp8_block: int | None
    pairs: dict[tuple[int, int], tuple[Transfer, ...]]

    @property
    def processes(self) -> int:
        """Number of processes that take part."""
        return max(self.source.world, self.destination_start + self.destination.world)

    def is_local(self, source: int, destination: int) -> bool:
        """Whether both ranks are the same process."""
        return source == self.destination_start + destination

    def block_of(self, weight: Weight) -> int | None:
        """Rows and columns of the blocks in which a weight is sent quantised; None if it is not."""
        return self.fp8_block if weight.fp8 else None

    def bytes(self, transfer: Transfer, itemsize: int) -> int:
        """Bytes of a transfer whose values have `itemsize` bytes if they are not quantised."""
        return _box_bytes(transfer.size, 4 if transfer.weight.fp32 else itemsize, self.block_of(transfer.weight))

    def split(self, parts: Sequence[Collection[str]]) -> list[ReshardPlan]:
        """The transfers of each part's weights (`Weight.megatron`); a weight is in at most one part."""
        part_of = {name: number for number, names in enumerate(parts) for name in names}
        found: list[dict[tuple[int, int], list[Transfer]]] = [defaultdict(list) for _ in parts]
        for pair, transfers in self.pairs.items():
            for transfer in transfers:
                if (number := part_of.get(transfer.weight.megatron)) is not None:
                    found[number][pair].append(transfer)
        return [replace(self, pairs={pair: tuple(some) for pair, some in pairs.items()}) for pairs in found]


def _box_bytes(size: Index, itemsize: int, block: int | None) -> int:
    if block is None:
        return prod(size) * itemsize
    return prod(size) + 4 * prod(scale_shape(size, block))


@dataclass(frozen=True)
class _Box:
    """A box in the destination's distinct shard number `shard`. holders: (number of a source shard, corner in it)."""

    shard: int
    at: Index
    size: Index
    holders: tuple[tuple[int, Index], ...]

    def follows(self, other: _Box) -> bool:
        """Whether this box is directly below `other` on both sides, with the same columns."""
        rows = other.size[0]

        def below(at: Index) -> Index:
            return (at[0] + rows, *at[1:])

        holders = tuple((shard, below(at)) for shard, at in other.holders)
        return (self.shard, self.at, self.size[1:], self.holders) == (other.shard, below(other.at), other.size[1:], holders)


class _Job(NamedTuple):
    """A box that one destination rank needs from one of several source ranks (rank -> corner of the box there).

    number: position of the weight in the model's order. block: see `ReshardPlan.block_of`.
    """

    number: int
    weight: Weight
    box: _Box
    destination: int
    holders: dict[int, Index]
    block: int | None


def _refuse_cut_blocks(weight: Weight, hf: int, begin: Index, size: Index, at: Index, block: int) -> None:
    """Raises UserError: a block is quantised from all of its values, so it must be in a single box on both sides."""
    for dim, (start, extent, place) in enumerate(zip(begin, size, at, strict=True)):
        end = start + extent
        if start % block or place % block or (end % block and end != weight.shapes[hf][dim]):
            kind = ("rows", "columns")[dim]
            raise UserError(
                f"{weight.hf[hf]}: {kind} {start} to {end} of a shard are not whole FP8 blocks of {block}; choose tensor "
                "parallelism that splits at multiples of the block, or leave the weights unquantised"
            )


def _piece_boxes(
    weight: Weight, shard: int, piece: Piece, source: Sequence[PlacedShard], fp8_block: int | None
) -> Iterator[_Box]:
    """The parts of a destination's piece that the sources hold. Raises ValueError when they do not make up all of it."""
    found: dict[tuple[Index, Index], list[tuple[int, Index]]] = {}
    for number, placed in enumerate(source):
        for held in placed.shard.pieces:
            common = overlap(piece.begin, piece.size, held.begin, held.size) if held.hf == piece.hf else None
            if common:
                found.setdefault(common, []).append((number, moved(held.at, common[0], held.begin)))
    if sum(prod(size) for _, size in found) != prod(piece.size):
        raise ValueError(f"{weight.hf[piece.hf]}: the source does not hold rows from {piece.begin[0]} exactly once")
    for begin, size in sorted(found):
        at = moved(piece.at, begin, piece.begin)
        if fp8_block is not None:
            _refuse_cut_blocks(weight, piece.hf, begin, size, at, fp8_block)
        yield _Box(shard, at, size, tuple(found[begin, size]))


def _boxes(
    weight: Weight, source: Sequence[PlacedShard], destination: Sequence[PlacedShard], fp8_block: int | None
) -> list[_Box]:
    """All boxes of a weight, merged where possible."""
    merged: list[_Box] = []
    for number, placed in enumerate(destination):
        for piece in placed.shard.pieces:
            for box in _piece_boxes(weight, number, piece, source, fp8_block):
                if merged and box.follows(merged[-1]):
                    last = merged.pop()
                    box = _Box(last.shard, last.at, (last.size[0] + box.size[0], *box.size[1:]), last.holders)
                merged.append(box)
    return merged


def _jobs(source: WeightLayout, destination: WeightLayout, arch: Architecture, fp8_block: int | None) -> Iterator[_Job]:
    """Every box that every destination rank needs."""
    known: dict[tuple[object, ...], tuple[list[Shard], list[Shard], list[_Box]]] = {}
    for number, weight in enumerate(weights_of(arch)):
        held, needed = source.placed_shards(weight, arch), destination.placed_shards(weight, arch)
        shards = [h.shard for h in held], [h.shard for h in needed]
        block = fp8_block if weight.fp8 else None
        key = (weight.split, weight.shapes, weight.expert is None, block)
        if key not in known or known[key][:2] != shards:
            known[key] = (*shards, _boxes(weight, held, needed, block))
        for box in known[key][2]:
            holders = {rank: at for shard, at in box.holders for rank in held[shard].ranks}
            for rank in needed[box.shard].ranks:
                yield _Job(number, weight, box, rank, holders, block)


class _Assignment:
    """Assigns every box to one of the ranks that hold it."""

    def __init__(self, sources: int, itemsize: int) -> None:
        self.pairs: dict[tuple[int, int], list[tuple[int, Transfer]]] = defaultdict(list)
        self._itemsize = itemsize
        self._total = [0] * sources

    def add(self, job: _Job, source: int, row: int = 0, rows: int | None = None) -> None:
        """Let `source` send `rows` rows (None: all) of the job's box, from `row` on."""
        box, at = job.box, job.holders[source]
        transfer = Transfer(
            source,
            job.destination,
            job.weight,
            (at[0] + row, *at[1:]),
            (box.at[0] + row, *box.at[1:]),
            (box.size[0] if rows is None else rows, *box.size[1:]),
        )
        self.pairs[source, job.destination].append((job.number, transfer))

    def share(self, ranks: tuple[int, ...], jobs: list[_Job]) -> None:
        """Spread the boxes that exactly `ranks` hold over these ranks, cut into parts small enough to balance the load. A part
        goes to the least loaded rank. Ranks that send to the destination anyway are preferred while they are below the mean
        load, which keeps the number of connections low.
        """
        mean = sum(_box_bytes(job.box.size, self._itemsize, job.block) for job in jobs) / len(ranks)
        loads = dict.fromkeys(ranks, 0)
        for job in jobs:
            size, block = job.box.size, job.block
            for row, rows in _parts(size, _box_bytes(size, self._itemsize, block), _GRAIN * mean, len(ranks), block or 1):
                part = _box_bytes((rows, *size[1:]), self._itemsize, block)
                friends = [rank for rank in ranks if (rank, job.destination) in self.pairs and loads[rank] + part <= mean]
                source = min(friends or ranks, key=lambda rank: (loads[rank], self._total[rank], rank))
                loads[source] += part
                self._total[source] += part
                self.add(job, source, row, rows)


def _parts(size: Index, box_bytes: int, limit: float, ranks: int, step: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of parts of at most about `limit` bytes, cut at multiples of `step`; one part for a single rank."""
    rows = size[0]
    per_part = rows if ranks == 1 else max(1, int(limit * rows / box_bytes) // step) * step
    for row in range(0, rows, per_part):
        yield row, min(per_part, rows - row)


def make_reshard_plan(
    source: WeightLayout,
    destination: WeightLayout,
    arch: Architecture,
    *,
    destination_start: int | None = None,
    itemsize: int = 2,
    fp8_block: int | None = None,
) -> ReshardPlan:
    """Plan the transfer of all weights of `arch` between two layouts.

    destination_start: process of the destination's rank 0; default is the one after the source's ranks. With 0 the destination
    shares the source's processes, and a process copies what it already holds. itemsize: bytes of a value that is sent
    unquantised; loads are counted in bytes. fp8_block: quantise the weights that the map's `fp8` column marks.

    Of the ranks that hold the same shards, none sends more than 1.1 x their mean, if a row of each box (128 rows with FP8) is
    at most a tenth of that mean; otherwise the excess is at most one row. Raises ValueError when a layout does not fit the
    architecture or the source lacks something, UserError when FP8 blocks would be cut.
    """
    start = source.world if destination_start is None else destination_start
    with _no_collection():
        return _plan(source, destination, arch, start, itemsize, fp8_block)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector: it would look again and again at a million new transfers, for a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _plan(
    source: WeightLayout, destination: WeightLayout, arch: Architecture, start: int, itemsize: int, fp8_block: int | None
) -> ReshardPlan:
    assignment = _Assignment(source.world, itemsize)
    shared: dict[tuple[int, ...], list[_Job]] = defaultdict(list)
    for job in _jobs(source, destination, arch, fp8_block):
        if start + job.destination in job.holders:
            assignment.add(job, start + job.destination)
        else:
            shared[tuple(sorted(job.holders))].append(job)
    for ranks in sorted(shared, key=lambda ranks: (len(ranks), ranks)):
        assignment.share(ranks, shared[ranks])
    pairs = {
        pair: tuple(transfer for _, transfer in sorted(found, key=lambda one: (one[0], one[1].destination_at)))
        for pair, found in sorted(assignment.pairs.items())
    }
    return ReshardPlan(source, destination, arch, start, fp8_block, pairs)
