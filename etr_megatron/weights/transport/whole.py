"""Full HF tensors from the shards of training ranks, a group of weights at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.file_tensor import Index
from etr_megatron.weights.layout import UnshardedLayout, WeightLayout
from etr_megatron.weights.map import Weight
from etr_megatron.weights.quantize import FP8, SCALE_SUFFIX, quantize_blocks, scale_shape
from etr_megatron.weights.reshard import make_reshard_plan
from etr_megatron.weights.transport.buckets import Shards
from etr_megatron.weights.transport.exchange import Exchange, Memory
from etr_megatron.weights.transport.wire import Wire


class Field(NamedTuple):
    """A tensor in a flat bucket. name: the HF tensor's or, in `WeightGroup.shards`, the weight's (scales: + SCALE_SUFFIX)."""

    name: str
    dtype: torch.dtype
    shape: Index
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        """The tensor in a uint8 bucket."""
        size = prod(self.shape) * self.dtype.itemsize
        return flat[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class WeightGroup:
    """Weights whose full tensors form one flat bucket of `nbytes`; tensors with larger elements come first.

    shards: per weight, its HF tensors stacked (`unsharded`). tensors: the HF tensors one by one, at the same bytes; the
    scales of `X.weight` are `X.weight_scale_inv`.
    """

    def __init__(self, weights: Sequence[Weight], dtype: torch.dtype, fp8_block: int | None) -> None:
        self.weights, self._fp8_block = tuple(weights), fp8_block
        wanted: list[tuple[Weight, int | None, torch.dtype]] = []
        for weight in weights:
            block = self.block_of(weight)
            wanted.append((weight, None, weight.type_in(dtype) if block is None else FP8))
            if block is not None:
                wanted.append((weight, block, torch.float32))
        self.shards: dict[str, Field] = {}
        self.tensors: list[Field] = []
        self.nbytes = 0
        for weight, scales_block, kind in sorted(wanted, key=lambda one: -one[2].itemsize):
            self._add(weight, scales_block, kind)

    def _add(self, weight: Weight, scales_block: int | None, dtype: torch.dtype) -> None:
        """Add the weight's tensors or, if `scales_block` is given, their scales."""
        suffix, start = "" if scales_block is None else SCALE_SUFFIX, self.nbytes
        shapes = [shape if scales_block is None else scale_shape(shape, scales_block) for shape in weight.shapes]
        for name, shape in zip(weight.hf, shapes, strict=True):
            self.tensors.append(Field(name + suffix, dtype, shape, self.nbytes))
            self.nbytes += prod(shape) * dtype.itemsize
        rows = sum(shape[0] for shape in shapes)
        self.shards[weight.megatron + suffix] = Field(weight.megatron + suffix, dtype, (rows, *shapes[0][1:]), start)

    def block_of(self, weight: Weight) -> int | None:
        """Rows and columns of the blocks in which the bucket holds a weight quantised; None if it does not."""
        return self._fp8_block if weight.fp8 else None

    def quantize(self, full: Shards, flat: Tensor) -> None:
        """Quantise full tensors (by weight, `unsharded`) into the bucket, one HF tensor at a time."""
        fields = {field.name: field for field in self.tensors}
        for weight in self.weights:
            block = self.block_of(weight)
            if block is None:
                continue
            rows = [shape[0] for shape in weight.shapes]
            for name, part in zip(weight.hf, full[weight.megatron].split(rows), strict=True):
                values, scales = quantize_blocks(part, block)
                fields[name].view(flat).copy_(values)
                fields[name + SCALE_SUFFIX].view(flat).copy_(scales)


def weight_groups(weights: Iterable[Weight], dtype: torch.dtype, fp8_block: int | None, limit: int) -> list[WeightGroup]:
    """Weights in order, in groups of at most `limit` bytes, or of one larger weight. Weights that share a parameter of the
    server stay together, at the position of the first: a server fuses the parts in one request, and drops single ones."""
    units: dict[str, list[Weight]] = {}
    for weight in weights:
        units.setdefault(weight.server if weight.expert is None else weight.megatron, []).append(weight)
    groups: list[list[Weight]] = []
    space = 0
    for unit in units.values():
        nbytes = WeightGroup(unit, dtype, fp8_block).nbytes
        if not groups or nbytes > space:
            groups.append([])
            space = limit
        groups[-1] += unit
        space -= nbytes
    return [WeightGroup(some, dtype, fp8_block) for some in groups]


class Gather:
    """Gathers groups of weights on their owners, whole and unquantised. Only parts that an owner does not hold are sent.

    groups: groups[number] are the groups that `run(number)` gathers at the same time, each on its own owner. memory: see
    `Exchange`. `run` is a collective of the source's ranks.
    """

    def __init__(
        self,
        source: WeightLayout,
        arch: Architecture,
        owner: Callable[[Weight], int],
        groups: Sequence[Sequence[WeightGroup]],
        wire: Wire,
        memory: Memory,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
    ) -> None:
        layout = UnshardedLayout(source.world, owner)
        plan = make_reshard_plan(source, layout, arch, destination_start=0, itemsize=dtype.itemsize)
        parts = plan.split([[weight.megatron for group in together for weight in group.weights] for together in groups])
        self._exchanges = [Exchange(part, wire, memory, dtype=dtype, bucket_bytes=bucket_bytes) for part in parts]
        self._dtype = dtype

    def run(self, number: int, sources: Shards, own: tuple[WeightGroup, Tensor] | None) -> None:
        """Gather; own: on an owner, its group and the flat bucket (uint8) to put it into."""
        if own is None:
            self._exchanges[number].run(sources, {})
            return
        group, flat = own
        full: dict[str, Tensor] = {}
        for weight in group.weights:
            field = group.shards[weight.megatron]
            if group.block_of(weight) is None:
                full[weight.megatron] = field.view(flat)
            else:
                full[weight.megatron] = torch.empty(field.shape, dtype=self._dtype, device=flat.device)
        self._exchanges[number].run(sources, full)
        group.quantize(full, flat)
