"""Reads the tensors of a Megatron `torch_dist` checkpoint directory without Megatron, chunk by chunk.

A stored tensor is global: it covers all layers and all experts. Its chunks are the parts that the ranks wrote, and `.metadata`
says where each chunk is. Everything besides the model (an optimizer, objects) is ignored.
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
from etr_megatron.weights.boxes import BoxSource, StoredBox
from etr_megatron.weights.file_tensor import FileTensor, Index
from etr_megatron.weights.map import Weight
from etr_megatron.weights.shards import box, megatron_shard, moved, overlap
from etr_megatron.weights.torch_dist_metadata import METADATA_FILE, Record, dtype_of, read_metadata
from etr_megatron.weights.torch_saved import Slice, find_values

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
"""Names of optimizer states."""


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


class TorchDistDir(BoxSource):
    """The model's tensors in a `torch_dist` directory. Raises UserError for one that is missing, broken or truncated."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        metadata = read_metadata(self.path)
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
        except (AttributeError, TypeError, ValueError, LookupError) as error:  # altered pickle
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

    def type_of(self, name: str, weight: Weight) -> torch.dtype:
        """See `BoxSource`."""
        return self.dtype(weight.stored)

    def whole(self, name: str) -> Tensor:
        """A stored tensor, as a new tensor. Raises UserError for a damaged file."""
        out = torch.empty(self.shapes()[name], dtype=self.dtype(name))
        for chunk in self._chunks[name]:
            values = _open(chunk, out.dtype)
            if isinstance(values, FileTensor):
                held = torch.empty(chunk.size, dtype=out.dtype)
                values.read_into((0,) * len(chunk.size), held)
                values = held
            box(out, chunk.offset, chunk.size).copy_(values)
        return out

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
        """See `BoxSource`."""
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
    """A chunk's values as a tensor in its file or, if they are not dense in the file, loaded into memory."""
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
