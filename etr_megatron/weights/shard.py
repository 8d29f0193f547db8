"""One weight between its HuggingFace tensors and a tensor-parallel rank's shard, by the split kinds of `map`.

Tensors returned are new; nothing here writes into what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.map import Weight, padded_vocab_size

Read = Callable[[str, int, int, int], Tensor]
"""read(hf name, dim, begin, end): that range of the tensor along `dim`, nothing else is touched."""


def shard_shape(weight: Weight, arch: Architecture, tp: int) -> tuple[int, ...]:
    """Shape of a rank's shard."""
    first = weight.shapes[0]
    rows = sum(shape[0] for shape in weight.shapes)
    if weight.split == "replicated":
        return first
    if weight.split == "row":
        return (first[0], first[1] // tp)
    if weight.split == "vocab":
        rows = padded_vocab_size(arch.vocab_size, tp)
    return (rows // tp, *first[1:])


def read_shard(weight: Weight, arch: Architecture, tp: int, rank: int, read: Read) -> Tensor:
    """This rank's shard, reading only the ranges that it is made of. Raises ValueError for an unknown split kind."""

    def rows(index: int) -> Tensor:
        total = weight.shapes[index][0]
        return read(weight.hf[index], 0, rank * total // tp, (rank + 1) * total // tp)

    if weight.split == "replicated":
        return read(weight.hf[0], 0, 0, weight.shapes[0][0]).clone()
    if weight.split == "row":
        total = weight.shapes[0][1]
        return read(weight.hf[0], 1, rank * total // tp, (rank + 1) * total // tp).contiguous()
    if weight.split == "column":
        return rows(0).clone()
    if weight.split == "gate_up":
        return torch.cat([rows(0), rows(1)])
    if weight.split == "qkv":
        groups = arch.kv_heads // tp
        parts = [part.reshape(groups, -1, *part.shape[1:]) for part in (rows(0), rows(1), rows(2))]
        return torch.cat(parts, dim=1).flatten(0, 1)
    if weight.split == "vocab":
        size = padded_vocab_size(arch.vocab_size, tp) // tp
        begin, end = min(rank * size, arch.vocab_size), min((rank + 1) * size, arch.vocab_size)
        part = read(weight.hf[0], 0, begin, end)
        return torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
    raise ValueError(f"{weight.megatron}: unknown split kind {weight.split!r}")


def join_shards(weight: Weight, arch: Architecture, shards: Sequence[Tensor]) -> dict[str, Tensor]:
    """The full HF tensors from the shards of all tensor-parallel ranks, in rank order: the inverse of `read_shard`."""
    tp = len(shards)
    if weight.split == "replicated":
        return {weight.hf[0]: shards[0]}
    if weight.split == "row":
        return {weight.hf[0]: torch.cat(list(shards), dim=1)}
    if weight.split == "column":
        return {weight.hf[0]: torch.cat(list(shards))}
    if weight.split == "vocab":
        return {weight.hf[0]: torch.cat(list(shards))[: arch.vocab_size]}
    if weight.split == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return {name: torch.cat([half[i] for half in halves]) for i, name in enumerate(weight.hf)}
    if weight.split == "qkv":
        groups = arch.kv_heads // tp
        sizes = [shape[0] // arch.kv_heads for shape in weight.shapes]
        split = [shard.reshape(groups, -1, *shard.shape[1:]).split(sizes, dim=1) for shard in shards]
        return {name: torch.cat([part[i].flatten(0, 1) for part in split]) for i, name in enumerate(weight.hf)}
    raise ValueError(f"{weight.megatron}: unknown split kind {weight.split!r}")
