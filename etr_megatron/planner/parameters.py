"""The exact number of parameters on each rank, from the weight map and the layout."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture, Placement


@dataclass(frozen=True)
class RankParameters:
    """Number of parameter elements on a rank, including padding of the vocabulary and routers' biases. (These have neither
    gradients nor optimizer state, but are so few that plans make no difference.)

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


def parameters_by_rank(
    arch: Architecture, placement: Placement, *, unquantised: Container[int | None] = ()
) -> list[RankParameters]:
    """The parameters of every rank of a placement. unquantised: layers whose matrices FP8 does not quantize. Raises ValueError
    if the placement does not fit the architecture."""
    from etr_megatron.weights import weights_of

    dense, expert, matrices = ([0] * placement.world for _ in range(3))
    for weight in weights_of(arch):
        kind = dense if weight.expert is None else expert
        for holding in placement.holdings(weight, arch):
            elements = prod(holding.shard.shape)
            for rank in holding.ranks:
                kind[rank] += elements
                matrices[rank] += elements if weight.fp8 and weight.layer not in unquantised else 0
    return [RankParameters(*counts) for counts in zip(dense, expert, matrices, strict=True)]


def total_parameters(arch: Architecture) -> int:
    """Elements of the HuggingFace checkpoint, without padding or duplicates."""
    from etr_megatron.weights import weights_of

    return sum(prod(shape) for weight in weights_of(arch) for shape in weight.shapes)


def total_matrices(arch: Architecture) -> int:
    """Elements of the matrices in the checkpoint that FP8 servers quantize."""
    from etr_megatron.weights import weights_of

    return sum(prod(shape) for weight in weights_of(arch) if weight.fp8 for shape in weight.shapes)


def largest_weight(arch: Architecture) -> int:
    """Elements of the largest weight, which exists in full while weights are exported."""
    from etr_megatron.weights import weights_of

    return max(sum(prod(shape) for shape in weight.shapes) for weight in weights_of(arch))
