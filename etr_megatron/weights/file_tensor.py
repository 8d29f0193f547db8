"""A dense tensor in a file. Any box of it can be read, by plain file reads. Files are not memory-mapped, because mapped pages
count as memory of the process once they are touched."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from etr_megatron.errors import UserError

Index = tuple[int, ...]

Span = tuple[Path, int, int]
"""File, first byte, bytes."""


@dataclass(frozen=True)
class FileTensor:
    """A dense tensor from byte `begin` of `file` on, in C order."""

    file: Path
    begin: int
    dtype: torch.dtype
    shape: Index

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def span(self, begin: Index, size: Index) -> Span | None:
        """Where a box is, if it is contiguous in the file, else None."""
        found = list(itertools.islice(runs(self.shape, begin, size), 2))
        if len(found) != 1:
            return None
        return self.file, self.begin + found[0][0] * self.dtype.itemsize, math.prod(size) * self.dtype.itemsize

    def read_into(self, begin: Index, out: Tensor) -> None:
        """Fill `out` (contiguous, on the CPU, of this type) with the box of its shape that starts at `begin`.

        Raises UserError when the file ends too early.
        """
        with open(self.file, "rb", buffering=0) as file:
            for offset, part in runs(self.shape, begin, tuple(out.shape)):
                self._read(file.fileno(), byte_view(out[part]), self.begin + offset * self.dtype.itemsize)

    def _read(self, descriptor: int, into: memoryview, offset: int) -> None:
        while into:  # the kernel reads at most 2 GiB at a time
            try:
                count = os.preadv(descriptor, [into], offset)
            except OSError as error:  # a disk or network error, which names no file
                raise UserError(f"{self.file} cannot be read at byte {offset} ({error.strerror})") from error
            if count == 0:
                raise UserError(f"{self.file} ends at byte {offset}, in the middle of a tensor; fetch the checkpoint again")
            into, offset = into[count:], offset + count


def runs(shape: Index, begin: Index, size: Index) -> Iterator[tuple[int, Index]]:
    """The longest contiguous runs of the box `size` from `begin` in a dense tensor of `shape`, in C order.

    Each is (offset in elements of the tensor, index into the box whose sub-box is the run): one empty index for a box of full
    rows, one index per row where columns are cut.
    """
    if 0 in size:
        return
    cut = next((dim for dim in range(len(shape) - 1, 0, -1) if size[dim] != shape[dim]), 0)  # from here on the box is dense
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(b * stride for b, stride in zip(begin, strides, strict=True))
    for index in product(*(range(count) for count in size[:cut])):
        yield first + sum(i * stride for i, stride in zip(index, strides, strict=False)), index


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy. The tensor must outlive its use."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
