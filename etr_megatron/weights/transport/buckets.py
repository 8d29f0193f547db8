"""Flat buckets of bounded size: which part of which transfer lies at which byte, the same on both sides.

Values with more bytes come first in a bucket, so nothing needs to be aligned and every byte is payload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from etr_megatron.weights.plan import Plan, Transfer
from etr_megatron.weights.quantize import FP8, quantize_blocks, scale_shape
from etr_megatron.weights.shards import Index, box

SCALE_SUFFIX = "_scale_inv"
"""A quantised weight's scales stand under the weight's name with this behind it."""

Shards = Mapping[str, Tensor]
"""A rank's shards by `Weight.megatron`; of a quantised destination the scales as well, under name + SCALE_SUFFIX."""


class Slot(NamedTuple):
    """A tensor of a transfer in a bucket: its values, or (`scales`) the scales of its blocks."""

    transfer: Transfer
    scales: bool
    offset: int
    dtype: torch.dtype
    size: Index

    @property
    def nbytes(self) -> int:
        """Bytes in the bucket."""
        return prod(self.size) * self.dtype.itemsize

    def view(self, flat: Tensor) -> Tensor:
        """The slot as a tensor of its shape in a uint8 bucket."""
        return flat[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.size)


@dataclass(frozen=True)
class Bucket:
    """Slots behind each other in `nbytes` bytes."""

    slots: tuple[Slot, ...]
    nbytes: int


def _rows(transfer: Transfer, first: int, rows: int) -> Transfer:
    """Some rows of a transfer."""
    (source, *rest), (destination, *others) = transfer.source_at, transfer.destination_at
    return transfer._replace(
        source_at=(source + first, *rest), destination_at=(destination + first, *others), size=(rows, *transfer.size[1:])
    )


def _cut(plan: Plan, transfers: Sequence[Transfer], itemsize: int, limit: int) -> Iterator[list[Transfer]]:
    """Fill one bucket of `limit` bytes after the other; a row (or row of blocks) that is larger has a bucket for itself."""
    filling: list[Transfer] = []
    space = limit
    for whole in transfers:
        step = plan.fp8_block if plan.is_fp8(whole.weight) else 1
        done, total = 0, whole.size[0]
        while done < total:
            row_bytes = plan.bytes(_rows(whole, done, min(step, total - done)), itemsize)
            rows = min(space // row_bytes * step, total - done)
            if rows == 0 and filling:
                yield filling
                filling, space = [], limit
                continue
            part = _rows(whole, done, rows or min(step, total - done))
            filling.append(part)
            space -= plan.bytes(part, itemsize)
            done += part.size[0]
    if filling:
        yield filling


def buckets_of(plan: Plan, transfers: Sequence[Transfer], dtype: torch.dtype, limit: int) -> list[Bucket]:
    """The transfers of one pair of ranks in buckets of about `limit` bytes at most. dtype: of what travels unquantised."""
    buckets = []
    for parts in _cut(plan, transfers, dtype.itemsize, limit):
        tensors: list[tuple[Transfer, bool, torch.dtype, Index]] = []
        for part in parts:
            quantised = plan.is_fp8(part.weight)
            tensors.append((part, False, FP8 if quantised else dtype, part.size))
            if quantised:
                tensors.append((part, True, torch.float32, scale_shape(*part.size, plan.fp8_block)))
        slots, offset = [], 0
        for transfer, scales, kind, size in sorted(tensors, key=lambda one: -one[2].itemsize):
            slots.append(Slot(transfer, scales, offset, kind, size))
            offset += slots[-1].nbytes
        buckets.append(Bucket(tuple(slots), offset))
    return buckets


def _box(transfer: Transfer, shards: Shards, at: Index, scales_block: int | None) -> Tensor:
    name = transfer.weight.megatron
    if scales_block is None:
        return box(shards[name], at, transfer.size)
    return box(shards[name + SCALE_SUFFIX], tuple(i // scales_block for i in at), scale_shape(*transfer.size, scales_block))


def source_box(transfer: Transfer, shards: Shards, scales_block: int | None = None) -> Tensor:
    """A view of what a transfer takes from a source's shard, or from its scales where `scales_block` is given."""
    return _box(transfer, shards, transfer.source_at, scales_block)


def destination_box(transfer: Transfer, shards: Shards, scales_block: int | None = None) -> Tensor:
    """A view of what a transfer fills in a destination's shard, or in its scales where `scales_block` is given."""
    return _box(transfer, shards, transfer.destination_at, scales_block)


@torch.no_grad()
def pack(plan: Plan, bucket: Bucket, flat: Tensor, shards: Shards) -> None:
    """Fill the first `bucket.nbytes` of `flat` (uint8) from a source's shards, casting or quantising on the shards' device."""
    quantised: dict[tuple[str, Index], Tensor] = {}
    # Scales lie in front of their values, so both are there when the values' turn comes.
    for slot in bucket.slots:
        target = slot.view(flat)
        key = slot.transfer.weight.megatron, slot.transfer.source_at
        if slot.scales:
            quantised[key], scales = quantize_blocks(source_box(slot.transfer, shards), plan.fp8_block)
            target.copy_(scales)
        elif slot.dtype == FP8:
            target.copy_(quantised.pop(key))
        else:
            target.copy_(source_box(slot.transfer, shards))


@torch.no_grad()
def unpack(plan: Plan, bucket: Bucket, flat: Tensor, shards: Shards) -> None:
    """Copy a received bucket to where it belongs in a destination's shards."""
    for slot in bucket.slots:
        destination_box(slot.transfer, shards, plan.fp8_block if slot.scales else None).copy_(slot.view(flat))


@torch.no_grad()
def copy_local(plan: Plan, transfer: Transfer, sources: Shards, destinations: Shards) -> None:
    """A transfer within a process."""
    values = source_box(transfer, sources)
    if plan.is_fp8(transfer.weight):
        values, scales = quantize_blocks(values, plan.fp8_block)
        destination_box(transfer, destinations, plan.fp8_block).copy_(scales)
    destination_box(transfer, destinations).copy_(values)
