"""Memory and time of low-rank adapters (the config's section `lora`): numbers of elements from the weight map, and seconds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from etr_megatron.planner.hardware import Hardware
from etr_megatron.planner.parameters import RankParameters, counted_shards, counted_weights

if TYPE_CHECKING:
    from etr_megatron.weights import Adapter, Architecture, LowRank, Shard, TrainingLayout, Weight


@dataclass(frozen=True)
class RankAdapters:
    """Numbers of elements on a rank; all 0 without adapters.

    trained: of A and B, in full, for every adapted matrix of which the rank has a part. base: of the adapted matrices' shards.
    pinned: of the pinned memory for the base; torch rounds each shard up to a power of two (`allocate` in
    ATen/core/CachingHostAllocator.h). shard: of the largest shard. gradients: of the weight gradients that exist at once, at
    most: the gradient of one matrix or, with experts, of this matrix in all of the rank's experts of a layer (a grouped GEMM
    returns these together). parts: of the parts of shards that have an adapter. part: of the largest part. products: number of
    multiplications of B A in these parts.
    """

    trained: RankParameters = field(default_factory=RankParameters)
    base: int = 0
    pinned: int = 0
    shard: int = 0
    gradients: int = 0
    parts: int = 0
    part: int = 0
    products: int = 0

    def gradient_bytes(self, element: int) -> int:
        """Bytes in a backward pass until gradients are projected: the gradients, in the model's dtype, and the fp32 copy of a
        part. element: bytes of the model's dtype."""
        return element * self.gradients + (4 * self.part if element < 4 else 0)

    def merge_bytes(self, element: int, *, offloaded: bool) -> int:
        """Bytes that exist while a weight is merged: the result in the model's dtype, sums of some elements in fp64 and fp32,
        and with `offloaded`, where original values are in CPU memory, their copy on the GPU."""
        from etr_megatron.weights.low_rank import MERGED_AT_ONCE

        return self.shard * element * (2 if offloaded else 1) + (8 + 4) * min(self.part, MERGED_AT_ONCE)


def total_adapters(arch: Architecture, low_rank: LowRank | None) -> int:
    """Elements of all adapters of a model."""
    if low_rank is None:
        return 0
    counted = counted_weights(arch)
    return sum(count * adapter.elements for weight, count in counted for adapter in low_rank.adapters_of(weight))


@lru_cache(maxsize=8)  # see `parameters_by_rank`
def adapters_by_rank(arch: Architecture, layout: TrainingLayout, low_rank: LowRank | None) -> tuple[RankAdapters, ...]:
    """The adapters of every rank. Raises ValueError if the layout does not fit the architecture."""
    found = [RankAdapters()] * layout.world
    if low_rank is None:
        return tuple(found)
    at_once: list[dict[tuple[int | None, str], int]] = [{} for _ in found]
    for weight, count in counted_weights(arch):
        adapters = low_rank.adapters_of(weight)
        for placed, number in counted_shards(weight, count, layout, arch) if adapters else ():
            one = _times(number, _one(weight, placed.shard, adapters))
            for rank in placed.ranks:
                found[rank] = _together(found[rank], one)
                matrix = (weight.layer, weight.stored)  # the same for all experts of a layer
                at_once[rank][matrix] = at_once[rank].get(matrix, 0) + one.base
    return tuple(replace(rank, gradients=max(sums.values(), default=0)) for rank, sums in zip(found, at_once, strict=True))


def _one(weight: Weight, shard: Shard, adapters: tuple[Adapter, ...]) -> RankAdapters:
    """The numbers of one shard, without `gradients`."""
    ranks = {adapter.hf: adapter.rank for adapter in adapters}
    parts = [(ranks[piece.hf], prod(piece.size)) for piece in shard.pieces if piece.hf in ranks]
    elements, held = sum(adapter.elements for adapter in adapters), prod(shard.shape)
    return RankAdapters(
        trained=RankParameters(dense=elements) if weight.expert is None else RankParameters(expert=elements),
        base=held,
        pinned=1 << (held - 1).bit_length(),
        shard=held,
        parts=sum(size for _, size in parts),
        part=max((size for _, size in parts), default=0),
        products=sum(rank * size for rank, size in parts),
    )


def _times(number: int, one: RankAdapters) -> RankAdapters:
    """The numbers of `number` shards like this one, without `gradients`."""
    return replace(
        one,
        trained=RankParameters(number * one.trained.dense, number * one.trained.expert),
        base=number * one.base,
        pinned=number * one.pinned,
        parts=number * one.parts,
        products=number * one.products,
    )


def _together(one: RankAdapters, other: RankAdapters) -> RankAdapters:
    """The numbers of both together, without `gradients`."""
    return RankAdapters(
        trained=RankParameters(one.trained.dense + other.trained.dense, one.trained.expert + other.trained.expert),
        base=one.base + other.base,
        pinned=one.pinned + other.pinned,
        shard=max(one.shard, other.shard),
        parts=one.parts + other.parts,
        part=max(one.part, other.part),
        products=one.products + other.products,
    )


_ROUNDING = 4 + 8 + 8 + 8 + 5 + 9 + 12 + 8 + 6 + 4
"""Bytes read and written per element by the operators of `low_rank._rounded`, and by the copy of its result."""


def projection_seconds(rank: RankAdapters, element: int, gpu: Hardware) -> float:
    """Seconds to compute the gradients of A and B from the gradients of the weights, for one microbatch: every part is copied
    to fp32 and read twice. element: bytes of the model's dtype."""
    copies = (element + 4) * rank.parts if element < 4 else 0
    return copies / _memory(gpu) + max(2 * 4 * rank.parts / _memory(gpu), 2 * 2 * rank.products / _products(gpu))


def merge_seconds(rank: RankAdapters, element: int, gpu: Hardware, *, offloaded: bool) -> float:
    """Seconds to merge all of a rank's weights anew: original values are copied (from CPU memory if they are offloaded), parts
    with an adapter are summed in fp64 and rounded, and the result is copied into the parameters."""
    copied = base_seconds(rank, element, gpu) if offloaded else 0.0
    copies = 4 * element * rank.base + (element + 8 + 8 + 4) * rank.parts  # to the result and the parameters; to fp64, to fp32
    rounding = (element + 4 if element == 4 else _ROUNDING) * rank.parts
    products = max(2 * 8 * rank.parts / _memory(gpu), 2 * rank.products / _products(gpu))
    return copied + (copies + rounding) / _memory(gpu) + products


def base_seconds(rank: RankAdapters, element: int, gpu: Hardware, *, offloaded: bool = True) -> float:
    """Seconds to copy the original values of a rank's adapted matrices, from pinned CPU memory if they are offloaded."""
    return element * rank.base / gpu.pinned_rate if offloaded else 2 * element * rank.base / _memory(gpu)


def _memory(gpu: Hardware) -> float:
    return gpu.memory * gpu.decode_memory_efficiency


def _products(gpu: Hardware) -> float:
    return gpu.matmul_fp32 * gpu.decode_compute_efficiency
