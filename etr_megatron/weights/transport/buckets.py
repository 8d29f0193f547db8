"""Packs transfers into buckets of bounded size. Sender and receiver compute the same layout of transfers in messages.

Small tensors are packed into one flat message. Tensors with larger elements come first, so that no padding for alignment is
needed. A large tensor is a message of its own: on a side where it is contiguous, it is sent from, or received into, the shard
itself and never copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from etr_megatron.weights.file_tensor import Index
from etr_megatron.weights.plan import Plan, Transfer
from etr_megatron.weights.quantize import FP8, SCALE_SUFFIX, quantize_blocks, scale_shape
from etr_megatron.weights.shards import box

ALONE_BYTES = 1 << 18
"""Tensors of at least this size are messages of their own."""

Shards = Mapping[str, Tensor]
"""A rank's shards by `Weight.megatron`. A quantised destination also has the scales, under name + SCALE_SUFFIX."""


_ALIGNMENT = 64


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
    """Slots in a buffer of `nbytes` bytes: the first `packed` bytes are one message, each slot of `alone` is another."""

    slots: tuple[Slot, ...]
    alone: tuple[Slot, ...]
    packed: int
    nbytes: int


def _rows(transfer: Transfer, first: int, rows: int) -> Transfer:
    """Some rows of a transfer."""
    (source, *rest), (destination, *others) = transfer.source_at, transfer.destination_at
    return transfer._replace(
        source_at=(source + first, *rest), destination_at=(destination + first, *others), size=(rows, *transfer.size[1:])
    )


def _cut(plan: Plan, transfers: Sequence[Transfer], itemsize: int, limit: int) -> Iterator[list[Transfer]]:
    """Split transfers into buckets of `limit` bytes, in order. A row (or row of blocks) that is larger gets its own bucket."""
    filling: list[Transfer] = []
    space = limit
    for whole in transfers:
        step = plan.block_of(whole.weight) or 1
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
    """The transfers of one pair of ranks, in buckets of at most about `limit` bytes. dtype: of unquantised values."""
    buckets = []
    for parts in _cut(plan, transfers, dtype.itemsize, limit):
        tensors: list[tuple[Transfer, bool, torch.dtype, Index]] = []
        for part in parts:
            block = plan.block_of(part.weight)
            tensors.append((part, False, part.weight.type_in(dtype) if block is None else FP8, part.size))
            if block is not None:
                tensors.append((part, True, torch.float32, scale_shape(part.size, block)))
        buckets.append(_place(sorted(tensors, key=lambda one: -one[2].itemsize)))
    return buckets


def _place(tensors: Sequence[tuple[Transfer, bool, torch.dtype, Index]]) -> Bucket:
    packed, alone, offset = [], [], 0
    for tensor in tensors:
        slot = Slot(tensor[0], tensor[1], offset, *tensor[2:])
        if slot.nbytes >= ALONE_BYTES:
            alone.append(slot)
        else:
            packed.append(slot)
            offset += slot.nbytes
    end = offset
    for number, slot in enumerate(alone):
        end = -(-end // _ALIGNMENT) * _ALIGNMENT  # the gap is not sent
        alone[number] = slot._replace(offset=end)
        end += slot.nbytes
    return Bucket(tuple(packed), tuple(alone), offset, end)


def source_box(transfer: Transfer, shards: Shards) -> Tensor:
    """A view of the part of a source's shard that a transfer sends."""
    return box(shards[transfer.weight.megatron], transfer.source_at, transfer.size)


def destination_box(transfer: Transfer, shards: Shards, scales_block: int | None = None) -> Tensor:
    """A view of the part of a destination's shard, or of its scales if `scales_block` is given, that a transfer fills."""
    name, at = transfer.weight.megatron, transfer.destination_at
    if scales_block is None:
        return box(shards[name], at, transfer.size)
    return box(shards[name + SCALE_SUFFIX], tuple(i // scales_block for i in at), scale_shape(transfer.size, scales_block))


def _in_place(plan: Plan, slot: Slot, shards: Shards, device: torch.device, *, sending: bool) -> Tensor | None:
    """The bytes of a slot in the shard itself, if the shard holds them exactly as they are sent; else None."""
    if not sending:
        tensor = destination_box(slot.transfer, shards, plan.fp8_block if slot.scales else None).detach()
    elif plan.block_of(slot.transfer.weight) is None:
        tensor = source_box(slot.transfer, shards).detach()
    else:
        return None
    if tensor.dtype != slot.dtype or tensor.device != device or not tensor.is_contiguous():
        return None
    return tensor.view(-1).view(torch.uint8)


def messages(plan: Plan, bucket: Bucket, flat: Tensor, shards: Shards, *, sending: bool) -> list[Tensor]:
    """The bucket as flat uint8 tensors in the order in which they are sent: parts of `flat` (uint8) or of the shards."""
    found = [flat[: bucket.packed]] if bucket.packed else []
    for slot in bucket.alone:
        own = _in_place(plan, slot, shards, flat.device, sending=sending)
        found.append(flat[slot.offset : slot.offset + slot.nbytes] if own is None else own)
    return found


def _copied(plan: Plan, bucket: Bucket, flat: Tensor, shards: Shards, *, sending: bool) -> Iterator[Slot]:
    """Slots that are copied through the buffer."""
    yield from bucket.slots
    for slot in bucket.alone:
        if _in_place(plan, slot, shards, flat.device, sending=sending) is None:
            yield slot


@torch.no_grad()
def pack(plan: Plan, bucket: Bucket, flat: Tensor, shards: Shards, dtype: torch.dtype) -> None:
    """Fill `flat` (uint8) from a source's shards on the shards' device: cast to `dtype`, and then quantised where required.

    Values to be quantised are cast first as well, so that their bits do not depend on the transport or the source's own dtype.
    """
    quantised: dict[tuple[str, Index], Tensor] = {}
    # Scales have an earlier slot than their values. Quantising yields both, so the values are kept until their slot.
    for slot in _copied(plan, bucket, flat, shards, sending=True):
        target = slot.view(flat)
        key = slot.transfer.weight.megatron, slot.transfer.source_at
        block = plan.block_of(slot.transfer.weight)
        if block is None:
            target.copy_(source_box(slot.transfer, shards))
        elif slot.scales:
            quantised[key], scales = quantize_blocks(source_box(slot.transfer, shards).to(dtype), block)
            target.copy_(scales)
        else:
            target.copy_(quantised.pop(key))


@torch.no_grad()
def unpack(plan: Plan, bucket: Bucket, flat: Tensor, shards: Shards) -> None:
    """Copy a received bucket into a destination's shards."""
    for slot in _copied(plan, bucket, flat, shards, sending=False):
        destination_box(slot.transfer, shards, plan.fp8_block if slot.scales else None).copy_(slot.view(flat))


@torch.no_grad()
def copy_local(plan: Plan, transfer: Transfer, sources: Shards, destinations: Shards, dtype: torch.dtype) -> None:
    """Do a transfer within a process. The values are those that another process would receive; see `pack`."""
    values = source_box(transfer, sources).to(transfer.weight.type_in(dtype))
    if (block := plan.block_of(transfer.weight)) is not None:
        values, scales = quantize_blocks(values, block)
        destination_box(transfer, destinations, block).copy_(scales)
    destination_box(transfer, destinations).copy_(values)
