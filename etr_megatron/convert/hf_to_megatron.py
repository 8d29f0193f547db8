"""HuggingFace to torch_dist."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from etr_megatron.convert.chunk import ChunkToWrite
from etr_megatron.convert.hf_files import copy_hf_files
from etr_megatron.convert.output import output_directory
from etr_megatron.convert.progress import progress_bar
from etr_megatron.convert.ranks import Ranks
from etr_megatron.errors import UserError
from etr_megatron.weights import (
    Architecture,
    SafetensorsDir,
    Shard,
    Weight,
    check_checkpoint,
    is_torch_dist,
    megatron_shard,
    open_checkpoint,
    stored_shapes,
    weights_of,
)
from etr_megatron.weights.file_tensor import Span

CHUNK_BYTES = 16 * 2**20
"""Larger tensors are stored in several chunks of rows, so that memory use does not depend on their size."""


def to_megatron(hf: Path, out: Path, ranks: Ranks, dtype: torch.dtype | None = None) -> int:
    """Write the torch_dist checkpoint of a HuggingFace directory to `out`, with config and tokenizer beside it. A collective.

    dtype: type of the output; None keeps the checkpoint's, and bf16 for FP8 weights. Returns the bytes of all tensors. Raises
    UserError for a directory that cannot be converted, and as `output_directory`.
    """
    if is_torch_dist(hf):
        raise UserError(f"--hf {hf} is already a torch_dist checkpoint")
    from etr_megatron.convert.torch_dist_writer import write_torch_dist  # takes a second to import

    arch, dtypes, chunks = ranks.on_all_ranks(lambda: _prepare(hf, dtype, ranks.rank == 0))
    sizes = [chunk.nbytes for chunk in chunks]
    mine = ranks.share(sizes)
    with output_directory(out, sum(sizes), ranks) as folder, progress_bar(sum(sizes[i] for i in mine), ranks) as bar:
        write_torch_dist(folder, [chunks[i] for i in mine], _objects(arch), ranks, bar.update)
        plain = {dtypes[weight.stored] for weight in weights_of(arch) if not weight.fp32}
        ranks.on_rank0(lambda: copy_hf_files(hf, folder, plain))
    return sum(sizes)


def _prepare(
    hf: Path, dtype: torch.dtype | None, values: bool
) -> tuple[Architecture, dict[str, torch.dtype], list[ChunkToWrite]]:
    """The model, types of the stored tensors, and the chunks to write. values: see `check_checkpoint`. Raises UserError."""
    arch = check_checkpoint(hf, named="--hf", values=values)
    source = open_checkpoint(hf)
    dtypes = _stored_dtypes(arch, source, dtype)
    return arch, dtypes, list(_chunks(arch, source, dtypes))


def _stored_dtypes(arch: Architecture, source: SafetensorsDir, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Type of every stored tensor. Raises UserError if HF tensors that become one tensor differ and no type is given."""
    dtypes: dict[str, torch.dtype] = {}
    for weight in weights_of(arch):
        for name in weight.hf:
            wanted = weight.type_in(dtype or source.dtype(name))
            if dtypes.setdefault(weight.stored, wanted) != wanted:
                raise UserError(
                    f"{source.path}: {name} is {wanted}, but Megatron merges it with tensors that are {dtypes[weight.stored]}; "
                    "choose one with --dtype"
                )
    return dtypes


def _chunks(arch: Architecture, source: SafetensorsDir, dtypes: dict[str, torch.dtype]) -> Iterator[ChunkToWrite]:
    """Every weight in chunks of at most `CHUNK_BYTES` (or of one row), in the order of the model."""
    shapes = stored_shapes(arch)
    for weight in weights_of(arch):
        shard, dtype = megatron_shard(weight, arch, 1, 0), dtypes[weight.stored]
        rows, *rest = shard.shape
        per_chunk = max(1, CHUNK_BYTES // (math.prod(rest) * dtype.itemsize))
        lead, ones = tuple(index for index, _ in weight.stored_at), (1,) * len(weight.stored_at)
        for first in range(0, rows, per_chunk):
            count = min(per_chunk, rows - first)
            size = (*ones, count, *rest)
            offset = (*lead, first, *(0 for _ in rest))
            read = partial(_read_rows, source, weight, shard, first, size, dtype)
            spans = partial(_spans, source, weight, shard, first, count, dtype)
            yield ChunkToWrite(weight.stored, shapes[weight.stored], dtype, offset, size, read, spans)


def _rows(weight: Weight, shard: Shard, first: int, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Rows [first, first + count) of the shard as parts at full width, in order: (HF name, corner of the part in the HF tensor,
    first row in the shard, rows)."""
    for piece in shard.pieces:
        low, high = max(first, piece.at[0]), min(first + count, piece.at[0] + piece.size[0])
        if low < high:
            yield weight.hf[piece.hf], (piece.begin[0] + low - piece.at[0], *piece.begin[1:]), low, high - low


def _read_rows(
    source: SafetensorsDir, weight: Weight, shard: Shard, first: int, size: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Rows of the shard from `first` on, read from the HF tensors; returned as `size`."""
    shape = size[len(weight.stored_at) :]
    # Only a padded vocabulary has rows that are not read from the HF tensors; they must be zero.
    out = (torch.zeros if weight.split == "vocab" else torch.empty)(shape, dtype=dtype)
    for name, begin, row, rows in _rows(weight, shard, first, shape[0]):
        part = out[row - first : row - first + rows]
        if source.dtype(name) == dtype:
            source.read_into(name, begin, part)
        else:
            part.copy_(source.read(name, begin, tuple(part.shape)))
    return out.view(size)


def _spans(
    source: SafetensorsDir, weight: Weight, shard: Shard, first: int, count: int, dtype: torch.dtype
) -> list[Span] | None:
    """See `ChunkToWrite`; None if values are converted or not contiguous in a file, or if rows are padding."""
    spans, covered = [], 0
    for name, begin, _, rows in _rows(weight, shard, first, count):
        if source.dtype(name) != dtype:
            return None
        span = source.span(name, begin, (rows, *shard.shape[1:]))
        if span is None:
            return None
        spans.append(span)
        covered += rows
    return spans if covered == count else None


def _objects(arch: Architecture) -> list[str]:
    """Keys of the empty FP8 states that Megatron's linear layers keep beside their weights and expect when they load."""
    names = []
    for weight in weights_of(arch):
        if weight.split in ("qkv", "gate_up", "row", "column") and weight.stored.endswith(".weight"):
            indices = ".".join(str(index) for index, _ in weight.stored_at) or "0"
            sizes = ".".join(str(size) for _, size in weight.stored_at) or "1"
            names.append(f"{weight.stored.removesuffix('weight')}_extra_state/shard_{indices}_{sizes}")
    return names
