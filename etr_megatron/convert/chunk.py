"""The chunks of tensors that a `torch_dist` checkpoint is planned from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from etr_megatron.weights.file_tensor import Index, Span


@dataclass(frozen=True)
class ChunkToWrite:
    """A box of a global tensor: `size` from `offset` in one of `shape`, of `dtype`.

    read: returns the values, of shape `size`. spans: if the values are in files exactly as they will be stored, returns their
    byte ranges in order, else None.
    """

    name: str
    shape: Index
    dtype: torch.dtype
    offset: Index
    size: Index
    read: Callable[[], Tensor]
    spans: Callable[[], list[Span] | None]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.size) * self.dtype.itemsize
