"""How conversions read a checkpoint of any format: its HF tensors by name, in the boxes in which they are stored."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.file_tensor import FileTensor, Index, Span
from etr_megatron.weights.map import Weight, weights_of
from etr_megatron.weights.shards import box

_BLOCK_BYTES = 2**20
"""Small enough to stay in a core's cache between reading and writing."""


@dataclass(frozen=True)
class StoredBox:
    """A box of an HF tensor: `size` from `begin`. It is at `at` in a chunk, whose values are in a file or in memory."""

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


class BoxSource(ABC):
    """A model's tensors. Use one iterator at a time: all iterators read blocks into the same memory."""

    def __init__(self) -> None:
        self._buffer = torch.empty(_BLOCK_BYTES, dtype=torch.uint8)

    @abstractmethod
    def type_of(self, name: str, weight: Weight) -> torch.dtype:
        """Type of one of the weight's HF tensors."""

    @abstractmethod
    def boxes(self, weight: Weight, arch: Architecture, *, only: str | None = None) -> Iterator[StoredBox]:
        """The HF tensors of a weight (with `only`, just that tensor), in the boxes in which they are stored; every value once.

        Raises UserError for a damaged file.
        """

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


class ByName:
    """Reads a source's tensors as `SafetensorsDir.read` does; keeps the tensors of the last weight in memory."""

    def __init__(self, source: BoxSource, arch: Architecture) -> None:
        self._source, self._arch = source, arch
        self._weights = {name: weight for weight in weights_of(arch) for name in weight.hf}
        self._held: dict[str, Tensor] = {}

    def read(self, name: str, begin: Index, size: Index) -> Tensor:
        """A box of the tensor as a CPU tensor that is not to be written to: `size` elements from `begin` in each dimension."""
        if name not in self._held:
            weight = self._weights[name]
            full = torch.empty(weight.shapes[weight.hf.index(name)], dtype=self._source.type_of(name, weight))
            self._source.read_into(name, weight, self._arch, full)
            self._held = {kept: values for kept, values in self._held.items() if kept in weight.hf} | {name: full}
        return box(self._held[name], begin, size)
