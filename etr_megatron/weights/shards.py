"""How a weight is cut: which boxes of which HF tensors make up a rank's shard, and where they are in it.

A shard is a list of pieces. Reading a shard from a checkpoint, joining shards to full tensors, planning a transfer between two
layouts and quantising a part of a tensor all iterate over pieces; only this module knows the split kinds of `map`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.file_tensor import Index
from etr_megatron.weights.map import Weight

VOCAB_MULTIPLE = 128
"""Megatron's padded vocabulary is a multiple of this times TP."""

SERVER_VOCAB_MULTIPLE = 64
"""SGLang pads the vocabulary to a multiple of this (`DEFAULT_VOCAB_PADDING_SIZE`) for any TP, and then divides it."""

Read = Callable[[str, Index, Index], Tensor]
"""read(hf name, begin, size): that box of the tensor; nothing else is touched. The result is not written to."""


@dataclass(frozen=True)
class Piece:
    """A box of an HF tensor in a shard. hf: number of the tensor in its weight. begin: corner there. at: in the shard."""

    hf: int
    begin: Index
    at: Index
    size: Index


@dataclass(frozen=True)
class Shard:
    """A rank's part of a weight. Rows that no piece covers (a vocabulary's padding) are zero."""

    shape: Index
    pieces: tuple[Piece, ...]


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Vp: the smallest multiple of `VOCAB_MULTIPLE * tp` that holds the vocabulary."""
    step = VOCAB_MULTIPLE * tp
    return -(-vocab_size // step) * step


def _rows(weight: Weight, hf: int, begin: int, end: int) -> Piece:
    """Rows [begin, end) of an HF tensor, at the top of the shard."""
    rest = weight.shapes[hf][1:]
    zeros = (0,) * len(rest)
    return Piece(hf, (begin, *zeros), (0, *zeros), (end - begin, *rest))


def _stack(pieces: Sequence[Piece]) -> Shard:
    """Pieces of full width, stacked along the rows in order."""
    placed, row = [], 0
    for piece in pieces:
        placed.append(Piece(piece.hf, piece.begin, (row, *piece.at[1:]), piece.size))
        row += piece.size[0]
    return Shard((row, *pieces[0].size[1:]), tuple(placed))


def _even(weight: Weight, hf: int, dim: int, tp: int, rank: int) -> tuple[int, int]:
    """The rank's range of a dimension. Raises ValueError when it cannot be cut evenly."""
    total = weight.shapes[hf][dim]
    if total % tp:
        raise ValueError(
            f"{weight.hf[hf]} has {total} rows or columns to split, which tensor parallelism of {tp} does not divide"
        )
    return rank * total // tp, (rank + 1) * total // tp


def _vocab(weight: Weight, arch: Architecture, size: int, rank: int) -> Shard:
    begin, end = min(rank * size, arch.vocab_size), min((rank + 1) * size, arch.vocab_size)
    pieces = (_rows(weight, 0, begin, end),) if end > begin else ()
    return Shard((size, *weight.shapes[0][1:]), pieces)


def _plain(weight: Weight, tp: int, rank: int) -> Shard:
    """The shard for a split kind that is the same in Megatron and in the server."""
    if weight.split == "replicated":
        return _stack([_rows(weight, 0, 0, weight.shapes[0][0])])
    if weight.split == "column":
        return _stack([_rows(weight, 0, *_even(weight, 0, 0, tp, rank))])
    if weight.split == "gate_up":
        return _stack([_rows(weight, hf, *_even(weight, hf, 0, tp, rank)) for hf in (0, 1)])
    if weight.split == "row":
        (rows, _), (begin, end) = weight.shapes[0], _even(weight, 0, 1, tp, rank)
        size = (rows, end - begin)
        return Shard(size, (Piece(0, (0, begin), (0, 0), size),))
    raise ValueError(f"{weight.megatron}: unknown split kind {weight.split!r}")


def _query_groups(weight: Weight, arch: Architecture, tp: int, rank: int) -> Shard:
    """The rank's even part of all query groups, stacked. A query group is its query heads, its key head and its value head.

    With more ranks than groups, a rank has a part of a group, with any boundaries: Megatron gathers the outputs of all ranks.
    """
    if arch.kv_heads % tp and tp % arch.kv_heads:
        raise ValueError(f"{arch.kv_heads} query groups cannot be split over tensor parallelism of {tp}")
    total = sum(shape[0] for shape in weight.shapes)
    if total % tp:
        raise ValueError(f"{weight.megatron} has {total} rows to split, which tensor parallelism of {tp} does not divide")
    begin, end = rank * total // tp, (rank + 1) * total // tp
    pieces, row = [], 0
    for group in range(arch.kv_heads):
        for hf, shape in enumerate(weight.shapes):
            height = shape[0] // arch.kv_heads
            first, last = max(begin - row, 0), min(end - row, height)
            if first < last:
                pieces.append(_rows(weight, hf, group * height + first, group * height + last))
            row += height
    return _stack(pieces)


def megatron_shard(weight: Weight, arch: Architecture, tp: int, rank: int) -> Shard:
    """The shard of tensor-parallel rank `rank` of `tp` in Megatron.

    For an expert's weight these are the expert-tensor-parallel rank and size. Raises ValueError when `tp` does not fit.
    """
    if weight.split == "vocab":
        return _vocab(weight, arch, padded_vocab_size(arch.vocab_size, tp) // tp, rank)
    if weight.split == "qkv":
        return _query_groups(weight, arch, tp, rank)
    return _plain(weight, tp, rank)


def server_shard(weight: Weight, arch: Architecture, tp: int, rank: int) -> Shard:
    """The shard of tensor-parallel rank `rank` of `tp` in SGLang (for an expert: its part of the slot in the fused parameter).

    With fewer key/value heads than ranks, neighbouring ranks hold the same head. Raises ValueError when `tp` does not fit.
    """
    if weight.split == "vocab":
        padded = -(-arch.vocab_size // SERVER_VOCAB_MULTIPLE) * SERVER_VOCAB_MULTIPLE
        if padded % tp:
            raise ValueError(f"the server's padded vocabulary of {padded} cannot be split over tensor parallelism of {tp}")
        return _vocab(weight, arch, padded // tp, rank)
    if weight.split == "qkv":
        q = _rows(weight, 0, *_even(weight, 0, 0, tp, rank))
        if arch.kv_heads >= tp:
            return _stack([q, *(_rows(weight, hf, *_even(weight, hf, 0, tp, rank)) for hf in (1, 2))])
        if tp % arch.kv_heads:
            raise ValueError(f"{arch.kv_heads} key/value heads cannot be spread over tensor parallelism of {tp}")
        head, height = rank // (tp // arch.kv_heads), weight.shapes[1][0] // arch.kv_heads
        return _stack([q, *(_rows(weight, hf, head * height, (head + 1) * height) for hf in (1, 2))])
    return _plain(weight, tp, rank)


def unsharded(weight: Weight) -> Shard:
    """The whole weight: its HF tensors stacked along the rows, so that each is a contiguous part."""
    return _stack([_rows(weight, hf, 0, shape[0]) for hf, shape in enumerate(weight.shapes)])


def overlap(begin: Index, size: Index, other_begin: Index, other_size: Index) -> tuple[Index, Index] | None:
    """(begin, size) of the intersection of two boxes, None if it is empty."""
    low = tuple(map(max, begin, other_begin))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(begin, size, other_begin, other_size, strict=True))
    common = tuple(h - w for h, w in zip(high, low, strict=True))
    return (low, common) if min(common) > 0 else None


def moved(at: Index, begin: Index, origin: Index) -> Index:
    """at + begin - origin: the position of `begin` in coordinates in which `origin` is at `at`."""
    return tuple(a + b - o for a, b, o in zip(at, begin, origin, strict=True))


def box(tensor: Tensor, begin: Index, size: Index) -> Tensor:
    """A view of that box of `tensor`."""
    return tensor[tuple(slice(b, b + s) for b, s in zip(begin, size, strict=True))]


def read_shard(weight: Weight, shard: Shard, read: Read) -> Tensor:
    """The shard as a new tensor, reading only the boxes that it is made of. `read` decides dtype and device."""
    found = [(piece, read(weight.hf[piece.hf], piece.begin, piece.size)) for piece in shard.pieces]
    if not found:
        nothing = read(weight.hf[0], (0,) * len(shard.shape), (0, *shard.shape[1:]))
        return nothing.new_zeros(shard.shape)
    covered = sum(part.numel() for _, part in found) == torch.Size(shard.shape).numel()
    first = found[0][1]
    out = first.new_empty(shard.shape) if covered else first.new_zeros(shard.shape)
    for piece, part in found:
        box(out, piece.at, piece.size).copy_(part)
    return out


def join_shards(weight: Weight, shards: Sequence[tuple[Shard, Tensor]]) -> dict[str, Tensor]:
    """The full HF tensors, new ones, from the shards that together cover them: the inverse of `read_shard`."""
    first = shards[0][1]
    full = {name: first.new_empty(shape) for name, shape in zip(weight.hf, weight.shapes, strict=True)}
    for shard, tensor in shards:
        for piece in shard.pieces:
            box(full[weight.hf[piece.hf]], piece.begin, piece.size).copy_(box(tensor, piece.at, piece.size))
    return full
