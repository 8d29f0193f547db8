"""What a `torch_dist` checkpoint is planned from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from etr_megatron.weights.shards import Index

Span = tuple[Path, int, int]
"""File, first byte, bytes."""


@dataclass(frozen=True)
class ChunkToWrite:
    """A box of a global tensor: `size` from `offset` in one of `shape`, of `dtype`.

    read: makes its values, of shape `size`. spans: the byte ranges that it consists of, one after the other, where they are in
    files as they will be stored, else None.
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
