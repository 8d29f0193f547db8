"""Packs transfers into buckets of bounded size. Sender and receiver compute the same messages.

Small tensors are packed into one flat message. Tensors with larger elements come first, so that no padding for alignment is
needed. A large tensor is a message of its own: on a side where it is contiguous, it is sent from, or received into, the shard
itself and never copied. On the other side it needs space in a buffer, see `stage`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from etr_megatron.weights.file_tensor import Index
from etr_megatron.weights.quantize import FP8, SCALE_SUFFIX, quantize_blocks, scale_shape
from etr_megatron.weights.reshard import ReshardPlan, Transfer
from etr_megatron.weights.shards import box

ALONE_BYTES = 1 << 18
"""Tensors of at least this size are messages of their own."""

Shards = Mapping[str, Tensor]
"""A rank's shards by `Weight.megatron`. A quantised destination also has the scales, under name + SCALE_SUFFIX."""


_ALIGNMENT = 64


class Slot(NamedTuple):
    """A tensor of a transfer in a bucket: its values, or (`scales`) the scales of its blocks. offset: in a side's buffer."""

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
    """The messages between two ranks in a round: `slots` are one of `packed` bytes, each slot of `alone` is another.

    The offsets of `alone` are not yet set: `stage` decides them, for each side on its own.
    """

    slots: tuple[Slot, ...]
    alone: tuple[Slot, ...]
    packed: int


@dataclass(frozen=True)
class Staged:
    """One side of a bucket. A buffer of `nbytes` bytes (a multiple of the alignment) holds what is copied: the slots `copied`.

    alone: the bucket's messages after the packed one. A tensor is the bytes in the shard itself, so it belongs to the shard's
    owner; a slot is in the buffer.
    """

    copied: tuple[Slot, ...]
    alone: tuple[Slot | Tensor, ...]
    packed: int
    nbytes: int

    def messages(self, flat: Tensor) -> list[Tensor]:
        """Flat uint8 tensors in the order in which they are sent: views of the buffer `flat` (uint8 [nbytes]) or of shards."""
        found = [flat[: self.packed]] if self.packed else []
        return found + [one if isinstance(one, Tensor) else flat[one.offset : one.offset + one.nbytes] for one in self.alone]


def _rows(transfer: Transfer, first: int, rows: int) -> Transfer:
    """Some rows of a transfer."""
    (source, *rest), (destination, *others) = transfer.source_at, transfer.destination_at
    return transfer._replace(
        source_at=(source + first, *rest), destination_at=(destination + first, *others), size=(rows, *transfer.size[1:])
    )


def _cut(plan: ReshardPlan, transfers: Sequence[Transfer], itemsize: int, limit: int) -> Iterator[list[Transfer]]:
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


def buckets_of(plan: ReshardPlan, transfers: Sequence[Transfer], dtype: torch.dtype, limit: int) -> list[Bucket]:
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
    return Bucket(tuple(packed), tuple(alone), offset)


def source_box(transfer: Transfer, shards: Shards) -> Tensor:
    """A view of the part of a source's shard that a transfer sends."""
    return box(shards[transfer.weight.megatron], transfer.source_at, transfer.size)


def destination_box(transfer: Transfer, shards: Shards, scales_block: int | None = None) -> Tensor:
    """A view of the part of a destination's shard, or of its scales if `scales_block` is given, that a transfer fills."""
    name, at = transfer.weight.megatron, transfer.destination_at
    if scales_block is None:
        return box(shards[name], at, transfer.size)
    return box(shards[name + SCALE_SUFFIX], tuple(i // scales_block for i in at), scale_shape(transfer.size, scales_block))


def _in_place(plan: ReshardPlan, slot: Slot, shards: Shards, device: torch.device, *, sending: bool) -> Tensor | None:
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


def stage(plan: ReshardPlan, bucket: Bucket, shards: Shards, device: torch.device, *, sending: bool) -> Staged:
    """The sender's or receiver's side of a bucket, from its shards. device: of the messages."""
    copied, alone, end = list(bucket.slots), [], bucket.packed
    for slot in bucket.alone:
        message: Slot | Tensor | None = _in_place(plan, slot, shards, device, sending=sending)
        if message is None:
            message = slot._replace(offset=_aligned(end))  # the gap is not sent
            end = message.offset + message.nbytes
            copied.append(message)
        alone.append(message)
    return Staged(tuple(copied), tuple(alone), bucket.packed, _aligned(end))


def _aligned(end: int) -> int:
    return -(-end // _ALIGNMENT) * _ALIGNMENT


@torch.no_grad()
def pack(plan: ReshardPlan, staged: Staged, flat: Tensor, shards: Shards, dtype: torch.dtype) -> None:
    """Fill the caller's buffer `flat` (uint8 [nbytes]) from a source's shards on the shards' device: cast to `dtype`, and then
    quantised where required.

    Values to be quantised are cast first as well, so that their bits do not depend on the transport or the source's own dtype.
    """
    quantised: dict[tuple[str, Index], Tensor] = {}
    # Scales have an earlier slot than their values. Quantising yields both, so the values are kept until their slot.
    for slot in staged.copied:
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
def unpack(plan: ReshardPlan, staged: Staged, flat: Tensor, shards: Shards) -> None:
    """Copy what was received into the buffer `flat` into a destination's shards."""
    for slot in staged.copied:
        destination_box(slot.transfer, shards, plan.fp8_block if slot.scales else None).copy_(slot.view(flat))


@torch.no_grad()
def copy_local(plan: ReshardPlan, transfer: Transfer, sources: Shards, destinations: Shards, dtype: torch.dtype) -> None:
    """Do a transfer within a process. The values are those that another process would receive; see `pack`."""
    values = source_box(transfer, sources).to(transfer.weight.type_in(dtype))
    if (block := plan.block_of(transfer.weight)) is not None:
        values, scales = quantize_blocks(values, block)
        destination_box(transfer, destinations, block).copy_(scales)
    destination_box(transfer, destinations).copy_(values)
