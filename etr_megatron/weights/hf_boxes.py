"""A HuggingFace checkpoint as a source of boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.boxes import BoxSource, StoredBox
from etr_megatron.weights.file_tensor import FileTensor
from etr_megatron.weights.map import Weight
from etr_megatron.weights.safetensors_dir import SafetensorsDir

_PANEL = 2**21
"""Number of values that are dequantised at a time."""


class HfBoxes(BoxSource):
    """The tensors of a checkpoint, each one box; FP8 is dequantised a few rows at a time."""

    def __init__(self, checkpoint: SafetensorsDir) -> None:
        super().__init__()
        self._checkpoint = checkpoint

    def type_of(self, name: str, weight: Weight) -> torch.dtype:
        """See `BoxSource`; bf16 for FP8."""
        return self._checkpoint.dtype(name)

    def boxes(self, weight: Weight, arch: Architecture, *, only: str | None = None) -> Iterator[StoredBox]:
        """See `BoxSource`."""
        for name, shape in zip(weight.hf, weight.shapes, strict=True):
            if only not in (None, name):
                continue
            origin = (0,) * len(shape)
            span = self._checkpoint.span(name, origin, shape)
            if span is not None:
                yield StoredBox(name, origin, shape, FileTensor(span[0], span[1], self.type_of(name, weight), shape), origin)
                continue
            rows, *rest = shape
            step = max(1, _PANEL // math.prod(rest))
            for first in range(0, rows, step):
                begin, size = (first, *origin[1:]), (min(step, rows - first), *rest)
                yield StoredBox(name, begin, size, self._checkpoint.read(name, begin, size), origin)
