"""Low-rank adapters in the space of weights: which matrices have one, and how it changes a shard.

An adapted HF tensor is W + scale * B A, with A [rank, columns] and B [rows, rank]. A box of the product needs only B's rows and
A's columns of that box, so an adapter fits every way of cutting a weight, and merged shards are those of an ordinary model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etr_megatron.config.schema.lora import LoraConfig
from etr_megatron.errors import UserError
from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.file_tensor import Index
from etr_megatron.weights.layout import TrainingLayout
from etr_megatron.weights.map import Weight, weights_of
from etr_megatron.weights.shards import Shard, box

MERGED_AT_ONCE = 2**24
"""Maximum number of elements that are summed in fp64 at a time; bounds the memory of the sums."""

_R2 = (0.7548776662466927, 0.5698402909980532)
"""1 / g and 1 / g^2, where g^3 = g + 1 (extremelearning.com.au, "The unreasonable effectiveness of quasirandom sequences")."""

Pair = tuple[Tensor, Tensor]
"""(A [rank, columns], B [rows, rank]), fp32."""


@dataclass(frozen=True)
class Adapter:
    """The adapter of one HF tensor. hf: number of the tensor within its weight. module: the tensor's name without `.weight`.
    scale: factor on the product B A."""

    hf: int
    module: str
    rank: int
    rows: int
    columns: int
    scale: float

    @property
    def elements(self) -> int:
        """Trained elements, of A and B together."""
        return self.rank * (self.rows + self.columns)

    @property
    def stored(self) -> tuple[str, str]:
        """Names of A and B in a run's checkpoint."""
        return f"lora.{self.module}.A", f"lora.{self.module}.B"


@dataclass(frozen=True)
class LowRank:
    """Which linear modules have adapters, and their ranks and scale. The fields are keys of the config's section `lora`."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    expert_rank: int | None = None

    @classmethod
    def of(cls, lora: LoraConfig) -> LowRank | None:
        """The adapters that a config asks for; None if all weights are trained."""
        return cls(lora.rank, lora.alpha, tuple(sorted(lora.targets)), lora.expert_rank) if lora.rank else None

    def adapters_of(self, weight: Weight) -> tuple[Adapter, ...]:
        """The adapters of a weight's HF tensors, in their order; none for a weight that is not adapted."""
        rank = self.rank if weight.expert is None or self.expert_rank is None else self.expert_rank
        if not weight.fp8 or rank == 0:  # the map's `fp8` column marks the linear modules
            return ()
        found = []
        for number, (name, shape) in enumerate(zip(weight.hf, weight.shapes, strict=True)):
            module = name.removesuffix(".weight")
            if not self.targets or module.rpartition(".")[2] in self.targets:
                rows, columns = shape
                found.append(Adapter(number, module, rank, rows, columns, self.alpha / rank))
        return tuple(found)

    def adapted(self, arch: Architecture, *, first_expert: bool = False) -> Iterator[tuple[Weight, tuple[Adapter, ...]]]:
        """Every adapted weight of a model, with its adapters. first_expert: see `weights_of`."""
        for weight in weights_of(arch, first_expert=first_expert):
            if adapters := self.adapters_of(weight):
                yield weight, adapters

    def refuse_missing_targets(self, arch: Architecture) -> None:
        """Raise UserError for a target that the model does not have, for a rank larger than a matrix's sides, and if nothing
        would be trained."""
        adapted = list(self.adapted(arch, first_expert=True))
        present = {adapter.module.rpartition(".")[2] for _, adapters in adapted for adapter in adapters}
        missing = [name for name in self.targets if name not in present]
        if missing or not present:
            every = LowRank(1, 1.0)
            known = every.adapted(arch, first_expert=True)
            names = {adapter.module.rpartition(".")[2]: None for _, adapters in known for adapter in adapters}
            of_experts = self.expert_rank == 0 and any(name in names for name in missing)
            without = " outside of routed experts (lora.expert_rank is 0)" if of_experts else ""
            what = ", ".join(missing) or "module"
            raise UserError(f"lora.targets: the model has no trainable {what}{without}; it has {', '.join(names)}")
        for weight, adapters in adapted:
            for one in adapters:
                if one.rank > min(one.rows, one.columns):
                    key = "rank" if weight.expert is None or self.expert_rank is None else "expert_rank"
                    raise UserError(
                        f"lora.{key}={one.rank}: {one.module} is {one.rows} x {one.columns}, so that no rank above "
                        f"{min(one.rows, one.columns)} adds anything; lower it"
                    )

    def refuse_untrained(self, arch: Architecture, layout: TrainingLayout) -> None:
        """Raise UserError as `refuse_missing_targets`, and for a model chunk of a pipeline stage in which nothing would be
        trained: Megatron's optimizer needs a weight in each."""
        self.refuse_missing_targets(arch)
        layers = {weight.layer for weight, _ in self.adapted(arch, first_expert=True) if weight.layer is not None}
        trained = {layout.chunk_of(layer, arch)[:2] for layer in layers}
        for stage, chunk in product(range(layout.pp), range(layout.vpp)):
            if (stage, chunk) not in trained:
                what = f"pipeline stage {stage}" + (f"'s model chunk {chunk}" if layout.vpp > 1 else "")
                raise UserError(f"lora.targets: no layer of {what} has one of them; add a target, or lower parallel.pp")

    def as_json(self) -> dict[str, Any]:
        """JSON from which `from_json` makes an equal one."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LowRank:
        """The inverse of `as_json`. Raises ValueError for anything else."""
        found: list[Any] = [values.get(name) for name in ("rank", "alpha", "targets", "expert_rank")]
        rank, alpha, targets, expert_rank = found
        is_whole = type(rank) is int and (expert_rank is None or type(expert_rank) is int)
        is_named = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
        is_finite = isinstance(alpha, int | float) and math.isfinite(alpha)
        if len(values) != 4 or not (is_whole and is_named and is_finite and rank > 0 < alpha and (expert_rank or 0) >= 0):
            raise ValueError("it needs rank, alpha, targets and expert_rank as `LowRank.as_json` writes them")
        return cls(rank, float(alpha), tuple(targets), expert_rank)


def bit_sum(values: Tensor) -> Tensor:
    """int64 scalar on the CPU: the sum of the elements' bits as integers, a fingerprint of a model's weights."""
    bits = values.view(torch.int32 if values.itemsize == 4 else torch.int16)
    if bits.is_cuda:
        return bits.sum(dtype=torch.int64).cpu()
    return torch.tensor(bits.numpy().sum(dtype=np.int64))  # torch's sum takes ten times as long


@torch.no_grad()
def add_products(values: Tensor, shard: Shard, adapters: Mapping[int, tuple[Adapter, Pair]]) -> Tensor:
    """The shard's values with the products of its adapters added: new, in the type of `values`, which is not written to.

    values: the shard of the base, of shape `shard.shape`. adapters: by number of the HF tensor, with fp32 factors on the same
    device. Sums are in fp64 and rounded once, to bf16 by `_rounded`. The order of fp32 sums would depend on the shard, on sizes
    and on the device, so a checkpoint that is merged elsewhere would differ from the weights that were trained.
    """
    merged = values.clone()
    for piece in shard.pieces:
        if piece.hf in adapters:
            adapter, (a, b) = adapters[piece.hf]
            (row, column), (rows, columns) = piece.begin, piece.size
            b_rows, a_columns = b[row : row + rows], a[:, column : column + columns].double()
            step = max(1, MERGED_AT_ONCE // columns)
            for first in range(0, rows, step):
                part = box(merged, piece.at, piece.size)[first : first + step]
                total = part.double().addmm_(b_rows[first : first + step].double(), a_columns, alpha=adapter.scale).float()
                is_bf16 = values.dtype == torch.bfloat16
                part.copy_(_rounded(total, adapter.module, (row + first, column)) if is_bf16 else total)
    return merged


def _rounded(values: Tensor, module: str, begin: Index) -> Tensor:
    """fp32 values [n, m] as bf16, rounded up or down such that the mean over many elements has no error. Overwrites `values`.

    With a base in bf16, rounding to the nearest would return every element unchanged until its product exceeds half a unit in
    the last place, which may not happen in thousands of updates. Here, every element has its own threshold, and it is rounded
    away from zero if its discarded bits exceed the threshold. Thresholds are spread evenly over all possible values: a product
    of a tenth of a unit changes every tenth element by a unit.

    module, begin: the name of the tensor and the position of the values in it. Thresholds depend on nothing else, so that a
    merged weight does not depend on the layout. A threshold is the fractional part of `row p + column q + r`, where p and q are
    the constants of Roberts's R2 sequence, whose points fill a square evenly.
    """
    rows, columns = (
        torch.arange(first, first + count, dtype=torch.float64, device=values.device) * step
        for first, count, step in zip(begin, values.shape, _R2, strict=True)
    )
    offset = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") / 2**32
    thresholds = (rows.frac().float()[:, None] + (columns + offset).frac().float()).frac_().mul_(2**16).to(torch.int32)
    # CUDA's NaN has all bits set, so that a threshold would make it 0.
    bits = values.masked_fill_(values.isnan(), math.nan).view(torch.int32)
    return bits.add_(thresholds).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


@torch.no_grad()
def add_gradients(
    gradient: Tensor, shard: Shard, adapters: Mapping[int, tuple[Adapter, Pair]], into: Mapping[int, Pair]
) -> None:
    """Add the contribution of a shard's gradient to the gradients of its adapters (in place: the caller owns `into`, fp32).

    gradient: d loss / d merged shard, of shape `shard.shape`.
    The contributions of all shards of a weight sum up to the gradients.
    """
    for piece in shard.pieces:
        if piece.hf in adapters:
            adapter, (a, b) = adapters[piece.hf]
            (row, column), (rows, columns) = piece.begin, piece.size
            part = box(gradient, piece.at, piece.size).to(torch.float32)
            grad_a, grad_b = into[piece.hf]
            grad_a[:, column : column + columns].addmm_(b[row : row + rows].t(), part, alpha=adapter.scale)
            grad_b[row : row + rows].addmm_(part, a[:, column : column + columns].t(), alpha=adapter.scale)
            del part  # before the next one exists
