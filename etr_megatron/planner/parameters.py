"""The exact number of parameters on each rank, from the weight map and the layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture, ServerLayout, TrainingLayout, Weight
    from etr_megatron.weights.layout import PlacedShard


@dataclass(frozen=True)
class RankParameters:
    """Number of parameter elements on a rank, including padding of the vocabulary, routers' biases and frozen routers. (The
    last two have neither gradients nor optimizer state, but are so few that plans make no difference.)

    dense, expert: outside and inside experts, which have separate data-parallel groups. matrices: the elements that FP8
    quantizes.
    """

    dense: int = 0
    expert: int = 0
    matrices: int = 0

    @property
    def total(self) -> int:
        """All elements of the rank."""
        return self.dense + self.expert


@lru_cache(maxsize=4)
def counted_weights(arch: Architecture) -> tuple[tuple[Weight, int], ...]:
    """Every weight of the model with the number of weights that it represents. The experts of a layer are alike, so the first
    represents all of them. (DeepSeek-V3 has 30,000 weights, which would otherwise all be built and cut for every plan.)"""
    from etr_megatron.weights import weights_of

    experts = 1 if arch.experts is None else arch.experts.count
    return tuple((one, 1 if one.expert is None else experts) for one in weights_of(arch, first_expert=True))


def counted_shards(
    weight: Weight, count: int, layout: TrainingLayout | ServerLayout, arch: Architecture
) -> Iterator[tuple[PlacedShard, int]]:
    """The placed shards of a weight from `counted_weights`, which represents `count` weights, each with the number of shards
    that it represents: the experts of an expert-parallel rank. Raises ValueError if the layout does not fit the
    architecture."""
    each = 1 if weight.expert is None else max(1, count // layout.ep)
    for first in range(0, count, each):
        one = weight if weight.expert is None else replace(weight, expert=first)
        yield from ((placed, each) for placed in layout.placed_shards(one, arch))


@lru_cache(maxsize=8)  # advice plans many configs of the same layout
def parameters_by_rank(
    arch: Architecture, layout: TrainingLayout | ServerLayout, *, unquantised: tuple[int, ...] = ()
) -> tuple[RankParameters, ...]:
    """The parameters of every rank of a layout. unquantised: layers whose matrices FP8 does not quantize. Raises ValueError if
    the layout does not fit the architecture."""
    dense, expert, matrices = ([0] * layout.world for _ in range(3))
    for weight, count in counted_weights(arch):
        kind = dense if weight.expert is None else expert
        is_quantised = weight.fp8 and weight.layer not in unquantised
        for placed, number in counted_shards(weight, count, layout, arch):
            elements = number * prod(placed.shard.shape)
            for rank in placed.ranks:
                kind[rank] += elements
                matrices[rank] += elements if is_quantised else 0
    return tuple(RankParameters(*counts) for counts in zip(dense, expert, matrices, strict=True))


@lru_cache(maxsize=4)
def total_parameters(arch: Architecture) -> int:
    """Elements of the HuggingFace checkpoint, without padding or duplicates."""
    return sum(count * _elements(weight) for weight, count in counted_weights(arch))


def total_matrices(arch: Architecture) -> int:
    """Elements of the matrices in the checkpoint that FP8 servers quantize."""
    return sum(count * _elements(weight) for weight, count in counted_weights(arch) if weight.fp8)


def largest_weight(arch: Architecture) -> int:
    """Elements of the largest weight, which exists in full while weights are exported."""
    return max(_elements(weight) for weight, _ in counted_weights(arch))


def _elements(weight: Weight) -> int:
    return sum(prod(shape) for shape in weight.shapes)
