"""Quantises a model's tensors to FP8 blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from etr_megatron.weights import Architecture, BoxSource, Weight
from etr_megatron.weights.quantize import quantize_blocks

_PANEL = 2**22
"""Number of values quantised at a time."""


class Quantiser:
    """Quantises HF tensors one at a time; each tensor is first assembled in memory.

    block: rows and columns that share a scale.
    """

    def __init__(self, source: BoxSource, arch: Architecture, block: int) -> None:
        self.block = block
        self._source, self._arch = source, arch
        # Reused: the kernel takes longer to clear new memory for a tensor than it takes to read the tensor.
        self._memory = torch.empty(0, dtype=torch.uint8)

    def panels(self, name: str, weight: Weight, dtype: torch.dtype | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The HF tensor of that name, a few rows of blocks at a time: (first row, FP8 values, scales), new.

        dtype: values are rounded to it first; None keeps them as they are stored. Use one iterator at a time.
        """
        shape = weight.shapes[weight.hf.index(name)]
        full = self._tensor(shape, dtype or self._source.type_of(name, weight))
        self._source.read_into(name, weight, self._arch, full)
        step = self.block * max(1, _PANEL // (self.block * shape[1]))
        for first in range(0, shape[0], step):
            yield first, *quantize_blocks(full[first : first + step], self.block)

    def _tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[:nbytes].view(dtype).view(shape)
