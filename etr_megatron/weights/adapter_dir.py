"""Checkpoints of low-rank adapters: their content, and the model that results from merging them into their base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from etr_megatron.errors import UserError
from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.boxes import BoxSource, StoredBox
from etr_megatron.weights.file_tensor import Index
from etr_megatron.weights.hf_config import read_config
from etr_megatron.weights.listing import listed
from etr_megatron.weights.low_rank import Adapter, LowRank, Pair, add_products, bit_sum
from etr_megatron.weights.map import Weight
from etr_megatron.weights.run_checkpoint import BASE_SUM, LORA_FILE, TRAINER_FILE
from etr_megatron.weights.shards import Piece, Shard
from etr_megatron.weights.torch_dist_dir import TorchDistDir


def read_low_rank(path: Path) -> LowRank:
    """Rank, targets and scale of the adapters in a checkpoint. Raises UserError for a broken `LORA_FILE`."""
    values = read_config(path / LORA_FILE)
    try:
        return LowRank.from_json(values)
    except ValueError:
        raise UserError(
            f"{path / LORA_FILE} does not describe adapters: rank, alpha, targets and expert_rank, as a run writes them"
        ) from None


class AdapterDir:
    """The adapters in a checkpoint directory. Raises UserError if its tensors differ from what its `LORA_FILE` describes."""

    def __init__(self, path: Path, arch: Architecture) -> None:
        self.path = path
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
                f"{path} does not hold the adapters that {LORA_FILE} and the model's config.json describe; "
                f"{len(differing)} tensors are missing, unknown or of another shape ({listed(sorted(differing))})"
            )
        self._stored.refuse_gaps(wanted)

    def base_sum(self) -> int | None:
        """See `BASE_SUM`; None if the run's state is not beside the adapters. Raises UserError if it is broken."""
        file = self.path / TRAINER_FILE
        found = read_config(file).get(BASE_SUM) if file.is_file() else None
        if found is not None and type(found) is not int:
            raise UserError(f"{file}: {BASE_SUM} is {found!r}, which is not a whole number")
        return found

    def pair(self, adapter: Adapter) -> Pair:
        """The factors A and B of an adapter, as new tensors."""
        a, b = (self._stored.whole(name).float() for name in adapter.stored)
        return a, b


def _shapes(adapter: Adapter) -> tuple[Index, Index]:
    """Shapes of A and B."""
    return (adapter.rank, adapter.columns), (adapter.rows, adapter.rank)


class Merged(BoxSource):
    """The weights that a run with adapters trains and serves: the base plus the adapters' products.

    dtype: the dtype of the run's model. The base is cast to it, and sums are rounded to it; None keeps the base's own dtype.
    named: the base's directory, and the option or file that gave it, for messages.
    """

    def __init__(self, base: BoxSource, adapters: AdapterDir, dtype: torch.dtype | None, named: str) -> None:
        super().__init__()
        self._base, self._adapters, self._dtype, self._named = base, adapters, dtype, named
        self._bit_sums: dict[str, int] = {}  # by base tensor of a weight with adapters, from its last full read

    def type_of(self, name: str, weight: Weight) -> torch.dtype:
        """See `BoxSource`."""
        return self._base.type_of(name, weight) if self._dtype is None else weight.type_in(self._dtype)

    def boxes(self, weight: Weight, arch: Architecture, *, only: str | None = None) -> Iterator[StoredBox]:
        """See `BoxSource`. Boxes of weights that neither adapters nor `dtype` change are the base's own."""
        adapters = {adapter.hf: adapter for adapter in self._adapters.low_rank.adapters_of(weight)}
        for number, name in enumerate(weight.hf):
            if only not in (None, name):
                continue
            dtype = self.type_of(name, weight)
            found = {number: (adapters[number], self._adapters.pair(adapters[number]))} if number in adapters else {}
            self._bit_sums[name] = 0
            for stored in self._base.boxes(weight, arch, only=name):
                if not adapters and stored.values.dtype == dtype:
                    yield stored
                    continue
                for begin, values in self._base.blocks(stored):
                    values, size, origin = values.to(dtype), tuple(values.shape), (0,) * values.dim()
                    if adapters:
                        self._bit_sums[name] += int(bit_sum(values))
                    if found:
                        values = add_products(values, Shard(size, (Piece(number, begin, origin, size),)), found)
                    yield StoredBox(name, begin, size, values, origin)

    def refuse_other_base(self, all_reduce_sum: Callable[[int], int]) -> None:
        """Raise UserError if the base is not the run's. Call it after all tensors have been read, each rank its share. A
        collective.

        all_reduce_sum: returns the sum of all ranks' numbers. Without the run's config.yaml or state, nothing is refused.
        """
        found, wanted = all_reduce_sum(sum(self._bit_sums.values())), self._adapters.base_sum()
        if self._dtype is not None and wanted is not None and (found - wanted) % 2**64:
            raise UserError(
                f"{self._named} holds other weights than those that the adapters of {self._adapters.path} were trained on; "
                "give the run's original model with --base"
            )
