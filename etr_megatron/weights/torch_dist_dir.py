"""Reads a Megatron `torch_dist` checkpoint directory without Megatron: the tensors that it holds, and their chunks one by one.

A stored tensor is global (of all layers, of all experts); its chunks are the parts that the ranks wrote. `.metadata` says where
each chunk is. What is stored besides the model (an optimizer, objects) is ignored.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import torch
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.file_tensor import FileTensor, Index, Span
from etr_megatron.weights.map import Weight
from etr_megatron.weights.shards import box, megatron_shard, moved, overlap
from etr_megatron.weights.torch_dist_metadata import METADATA_FILE, Record, dtype_of, read_metadata
from etr_megatron.weights.torch_saved import Slice, find_values

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
"""Names of optimizer states."""

_BLOCK_BYTES = 2**20
"""Small enough to stay in a core's cache between reading and writing."""


def is_torch_dist(path: str | Path) -> bool:
    """Whether the directory is a `torch_dist` checkpoint."""
    return (Path(path) / METADATA_FILE).is_file()


@dataclass(frozen=True)
class Chunk:
    """A box of a stored tensor and where `torch.save` put it: `length` bytes from `begin` of `file`."""

    offset: Index
    size: Index
    file: Path
    begin: int
    length: int


@dataclass(frozen=True)
class StoredBox:
    """A box of an HF tensor, `size` from `begin`, that is at `at` of a chunk's values, which are in a file or in memory."""

    name: str
    begin: Index
    size: Index
    values: FileTensor | Tensor
    at: Index

    def span(self) -> Span | None:
        """Where the box is, if it is contiguous in a file, else None."""
        if not isinstance(self.values, FileTensor):
            return None
        lead = len(self.at) - len(self.size)
        return self.values.span(self.at, (*(1 for _ in range(lead)), *self.size))

    def read_into(self, at: Index, out: Tensor) -> None:
        """Fill `out` with the values from `at` on in the chunk."""
        if isinstance(self.values, FileTensor):
            self.values.read_into(at, out)
        else:
            out.copy_(box(self.values, at, tuple(out.shape)))


class TorchDistDir:
    """The model's tensors in a `torch_dist` directory. Raises UserError for one that is missing, broken or truncated."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        metadata = read_metadata(self.path)
        self._buffer = torch.empty(_BLOCK_BYTES, dtype=torch.uint8)
        self._indexed: dict[str, dict[Index, list[Chunk]]] = {}
        try:
            self._tensors: dict[str, Record] = {
                name: entry
                for name, entry in metadata.state_dict_metadata.items()
                if hasattr(entry, "chunks") and not _OPTIMIZER.match(name)
            }
            self._chunks: dict[str, list[Chunk]] = {name: [] for name in self._tensors}
            self._place_chunks(metadata.storage_data)
            if not all(isinstance(self.dtype(name), torch.dtype) for name in self._tensors):
                raise TypeError("a tensor has no type")
        except (AttributeError, TypeError, ValueError, LookupError) as error:  # it is a pickle, parts of which were altered
            raise UserError(f"{self.path / METADATA_FILE} is damaged ({error}); fetch the checkpoint again") from error

    def _place_chunks(self, storage: dict[Record, Record]) -> None:
        """Locate each chunk in its file. Raises UserError when it is not there in full."""
        places = {(index.fqn, getattr(index, "offset", None)): place for index, place in storage.items()}
        lengths: dict[str, int] = {}
        for name, entry in self._tensors.items():
            for part in entry.chunks:
                where = places.get((name, part.offsets))
                if where is None:
                    raise UserError(f"{self.path}: {METADATA_FILE} does not say where {name} lies; fetch the checkpoint again")
                file = where.relative_path
                if file not in lengths:
                    lengths[file] = (self.path / file).stat().st_size if (self.path / file).is_file() else -1
                if where.offset + where.length > lengths[file]:
                    raise UserError(f"{self.path / file} is missing or cut off; fetch the checkpoint again")
                chunk = Chunk(tuple(part.offsets), tuple(part.sizes), self.path / file, where.offset, where.length)
                self._chunks[name].append(chunk)

    def shapes(self) -> dict[str, Index]:
        """Global shape of every stored tensor of the model."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""
        return dtype_of(self._tensors[name])

    def refuse_gaps(self, names: Iterable[str]) -> None:
        """Raise UserError when the chunks of a tensor do not cover it exactly once."""
        for name in names:
            shape, chunks = tuple(self._tensors[name].size), self._chunks[name]
            if any(o + n > s for c in chunks for o, n, s in zip(c.offset, c.size, shape, strict=True)):
                raise UserError(f"{self.path}: a part of {name} lies outside the tensor; fetch the checkpoint again")
            twice = _overlapping(chunks, 0)
            if twice:
                where = list(twice.offset)
                raise UserError(f"{self.path}: {name} has duplicate values from {where} on; fetch the checkpoint again")
            wanted, found = math.prod(shape), sum(math.prod(chunk.size) for chunk in chunks)
            if found != wanted:
                raise UserError(f"{self.path}: {name} has {found} of {wanted} values; fetch the checkpoint again")

    def boxes(self, weight: Weight, arch: Architecture, *, only: str | None = None) -> Iterator[StoredBox]:
        """The HF tensors of a weight (or `only` the one of that name), in the boxes in which they are stored; every value once.

        Raises UserError for a damaged file.
        """
        lead = tuple(index for index, _ in weight.stored_at)
        pieces = [piece for piece in megatron_shard(weight, arch, 1, 0).pieces if only in (None, weight.hf[piece.hf])]
        for chunk in self._chunks_at(weight.stored, lead):
            corner, extent = chunk.offset[len(lead) :], chunk.size[len(lead) :]
            found = [(piece, *common) for piece in pieces if (common := overlap(piece.at, piece.size, corner, extent))]
            if not found:
                continue
            values = _open(chunk, self.dtype(weight.stored))
            for piece, first, size in found:
                at = tuple(i - o for i, o in zip((*lead, *first), chunk.offset, strict=True))
                yield StoredBox(weight.hf[piece.hf], moved(piece.begin, first, piece.at), size, values, at)

    def parts(self, weight: Weight, arch: Architecture, *, only: str | None = None) -> Iterator[tuple[str, Index, Tensor]]:
        """As `boxes`, in small blocks: (HF name, corner in that tensor, values); the next block overwrites the values."""
        for stored in self.boxes(weight, arch, only=only):
            for begin, values in self.blocks(stored):
                yield stored.name, begin, values

    def read_into(self, name: str, weight: Weight, arch: Architecture, out: Tensor) -> None:
        """Fill `out`, of any type, with one of the weight's HF tensors."""
        for _, begin, values in self.parts(weight, arch, only=name):
            box(out, begin, tuple(values.shape)).copy_(values)

    def blocks(self, stored: StoredBox) -> Iterator[tuple[Index, Tensor]]:
        """A box, a few rows at a time, in the same memory: (corner in the HF tensor, values)."""
        dtype, lead = stored.values.dtype, len(stored.at) - len(stored.size)
        rows, *rest = stored.size
        row_bytes = math.prod(rest) * dtype.itemsize
        if self._buffer.numel() < row_bytes:
            self._buffer = torch.empty(row_bytes, dtype=torch.uint8)
        step = self._buffer.numel() // row_bytes
        for row in range(0, rows, step):
            size = (min(step, rows - row), *rest)
            values = self._buffer[: size[0] * row_bytes].view(dtype).view(*(1 for _ in range(lead)), *size)
            stored.read_into((*stored.at[:lead], stored.at[lead] + row, *stored.at[lead + 1 :]), values)
            yield (stored.begin[0] + row, *stored.begin[1:]), values.view(size)

    def _chunks_at(self, name: str, lead: Index) -> list[Chunk]:
        """Chunks that cover an index of the leading axes."""
        if name not in self._indexed:
            index = self._indexed[name] = defaultdict(list)
            for chunk in self._chunks[name]:
                covered = (range(o, o + n) for o, n in zip(chunk.offset[: len(lead)], chunk.size, strict=False))
                for place in product(*covered):
                    index[place].append(chunk)
        return self._indexed[name][lead]


def _overlapping(chunks: Sequence[Chunk], dim: int) -> Chunk | None:
    """A chunk that overlaps another one, None if there is none.

    Chunks are separated along one dimension after the other: those after a gap cannot overlap those before it.
    """
    if dim == len(chunks[0].offset if chunks else ()):
        pairs = combinations(chunks, 2)
        return next((b for a, b in pairs if overlap(a.offset, a.size, b.offset, b.size)), None)
    group: list[Chunk] = []
    end = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset[dim]):
        if group and chunk.offset[dim] >= end:
            found = _overlapping(group, dim + 1)
            if found:
                return found
            group = []
        group.append(chunk)
        end = max(end, chunk.offset[dim] + chunk.size[dim])
    return _overlapping(group, dim + 1) if len(group) > 1 else None


def _open(chunk: Chunk, dtype: torch.dtype) -> FileTensor | Tensor:
    """A chunk's values where they are in its file, or loaded into memory if they are not dense there."""
    try:
        found = find_values(chunk.file, chunk.begin, chunk.length, dtype, chunk.size)
        if found is not None:
            return found
        with open(chunk.file, "rb") as file:
            stored = Slice(file, chunk.begin, chunk.length)
            return torch.load(stored, map_location="cpu", weights_only=True)  # type: ignore[arg-type]  # any binary file will do
    except (RuntimeError, ValueError, LookupError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        if getattr(error, "filename", None) is not None:  # the file cannot be opened, and the system's error names it
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{chunk.file} is damaged at byte {chunk.begin} ({reason}); fetch the checkpoint again") from error
