"""Checkpoints of low-rank adapters: what they hold, and the model that they make of the one that training started from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from etr_megatron.errors import UserError
from etr_megatron.weights.adapter_file import ADAPTER_FILE
from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.boxes import BoxSource, StoredBox
from etr_megatron.weights.file_tensor import Index
from etr_megatron.weights.hf_config import read_config
from etr_megatron.weights.listing import listed
from etr_megatron.weights.low_rank import Adapter, LowRank, Pair, add_products
from etr_megatron.weights.map import Weight
from etr_megatron.weights.shards import Piece, Shard
from etr_megatron.weights.torch_dist_dir import TorchDistDir


def read_low_rank(path: Path) -> LowRank:
    """The kind of adapters in a checkpoint of them. Raises UserError for a broken `ADAPTER_FILE`."""
    values = read_config(path / ADAPTER_FILE)
    try:
        return LowRank.from_json(values)
    except TypeError as error:
        raise UserError(f"{path / ADAPTER_FILE} does not describe adapters ({error})") from None


class AdapterDir:
    """The adapters in a checkpoint directory. Raises UserError unless they are those that its `ADAPTER_FILE` describes."""

    def __init__(self, path: Path, arch: Architecture) -> None:
        self.low_rank = read_low_rank(path)
        self._stored = TorchDistDir(path)
        wanted = {
            name: shape
            for _, adapters in self.low_rank.adapted(arch)
            for adapter in adapters
            for name, shape in zip(adapter.stored, _shapes(adapter), strict=True)
        }
        found = self._stored.shapes()
        differing = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
        if differing:
            raise UserError(
                f"{path} does not hold the adapters that {ADAPTER_FILE} and the model's config.json describe; "
                f"{len(differing)} tensors are missing, unknown or of another shape ({listed(sorted(differing))})"
            )
        self._stored.refuse_gaps(wanted)

    def pair(self, adapter: Adapter) -> Pair:
        """The factors of an adapter, new."""
        a, b = (self._stored.whole(name).float() for name in adapter.stored)
        return a, b


def _shapes(adapter: Adapter) -> tuple[Index, Index]:
    """Shapes of A and B."""
    return (adapter.rank, adapter.columns), (adapter.rows, adapter.rank)


class Merged(BoxSource):
    """What a run with adapters trains and serves: its base with the adapters' products added.

    dtype: of the run's model, in which it holds the base, and to which sums are rounded; None keeps that of the base.
    """

    def __init__(self, base: BoxSource, adapters: AdapterDir, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._base, self._adapters, self._dtype = base, adapters, dtype

    def type_of(self, name: str, weight: Weight) -> torch.dtype:
        """See `BoxSource`."""
        return self._base.type_of(name, weight) if self._dtype is None else weight.type_in(self._dtype)

    def boxes(self, weight: Weight, arch: Architecture, *, only: str | None = None) -> Iterator[StoredBox]:
        """See `BoxSource`. Boxes that neither an adapter nor `dtype` changes are the base's own."""
        adapters = {adapter.hf: adapter for adapter in self._adapters.low_rank.adapters_of(weight)}
        for number, name in enumerate(weight.hf):
            if only not in (None, name):
                continue
            dtype = self.type_of(name, weight)
            found = {number: (adapters[number], self._adapters.pair(adapters[number]))} if number in adapters else {}
            for stored in self._base.boxes(weight, arch, only=name):
                if not found and stored.values.dtype == dtype:
                    yield stored
                    continue
                for begin, values in self._base.blocks(stored):
                    values, size, origin = values.to(dtype), tuple(values.shape), (0,) * values.dim()
                    if found:
                        values = add_products(values, Shard(size, (Piece(number, begin, origin, size),)), found)
                    yield StoredBox(name, begin, size, values, origin)
