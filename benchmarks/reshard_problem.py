"""Models, layouts and tensors of the resharding benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from etr_megatron.weights import Architecture, Experts, ServerLayout, TrainingLayout, Weight, WeightLayout, weights_of
from etr_megatron.weights.layout import shards_of
from etr_megatron.weights.shards import box, read_shard


def architecture(
    family: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, **changes: object
) -> Architecture:
    """An untied model with heads of 64."""
    fixed = dict(tied_embeddings=False, norm_eps=1e-6, max_positions=1024)
    sizes = dict(head_dim=64, layers=layers, hidden_size=hidden, intermediate_size=intermediate, heads=heads, kv_heads=kv_heads)
    return Architecture(family=family, vocab_size=vocab, **{**sizes, **fixed, **changes})


def with_experts(*arguments: int, experts: int, expert_size: int) -> Architecture:
    """All layers have experts."""
    mixture = Experts(count=experts, per_token=2, intermediate_size=expert_size, normalized=True)
    return architecture("qwen3_moe", *arguments, experts=mixture)


DENSE = architecture("qwen3", 12, 768, 2048, 12, 4, 32_000)
MIXTURE = with_experts(12, 512, 1024, 8, 4, 32_000, experts=8, expert_size=512)
QUICK_DENSE = architecture("qwen3", 2, 128, 256, 4, 2, 1000)
QUICK_MIXTURE = with_experts(2, 128, 256, 4, 2, 1000, experts=4, expert_size=64)
LLAMA_70B = architecture("llama", 80, 8192, 28_672, 64, 8, 128_256, head_dim=128)


@dataclass(frozen=True)
class Case:
    """Two layouts. together: both are in the same processes, so that a process is not sent what it already holds."""

    name: str
    source: TrainingLayout
    destination: WeightLayout
    together: bool
    experts: bool = False

    @property
    def start(self) -> int:
        """Process of the destination's rank 0."""
        return 0 if self.together else self.source.world

    @property
    def processes(self) -> int:
        """Number of processes of both layouts."""
        return max(self.source.world, self.start + self.destination.world)

    def architecture(self, quick: bool) -> Architecture:
        """The model."""
        if self.experts:
            return QUICK_MIXTURE if quick else MIXTURE
        return QUICK_DENSE if quick else DENSE


_T, _S = TrainingLayout, ServerLayout
CASES = [
    Case("TP2 -> TP1", _T(tp=2), _T(dp=2), together=True),
    Case("TP2 -> PP2", _T(tp=2), _T(pp=2), together=True),
    Case("TP2xPP2 -> TP2", _T(tp=2, pp=2), _T(tp=2, dp=2), together=True),
    Case("EP2 -> TP2", _T(dp=2, ep=2), _T(tp=2), together=True, experts=True),
    Case("TP2 -> server TP1", _T(tp=2), _S(), together=False),
    Case("TP2xPP2 -> server TP2", _T(tp=2, pp=2), _S(tp=2), together=False),
    Case("EP2 -> server TP2", _T(dp=2, ep=2), _S(tp=2), together=False, experts=True),
]


def elements(arch: Architecture) -> int:
    """Elements of all HF tensors."""
    return sum(torch.Size(shape).numel() for weight in weights_of(arch) for shape in weight.shapes)


def full_tensors(weight: Weight, number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The HF tensors of weight `number`: random, the same in every process."""
    generator = torch.Generator().manual_seed(number)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        for name, shape in zip(weight.hf, weight.shapes, strict=True)
    }


def own_shards(placement: WeightLayout, arch: Architecture, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A rank's shards by Megatron name."""
    numbers = {weight.megatron: number for number, weight in enumerate(weights_of(arch))}
    found = {}
    for weight, shard in shards_of(placement, arch, rank):
        full = full_tensors(weight, numbers[weight.megatron], dtype)
        read: Callable = lambda name, begin, size, full=full: box(full[name], begin, size)  # noqa: E731
        found[weight.megatron] = read_shard(weight, shard, read)
    return found


def lower_bound(case: Case, arch: Architecture, itemsize: int) -> int:
    """Bytes that must be sent: what each destination rank needs and its process does not hold, counted element by element and
    independently of the planner."""
    total = 0
    for weight in weights_of(arch):
        held, needed = case.source.placed_shards(weight, arch), case.destination.placed_shards(weight, arch)
        for placed in needed:
            for rank in placed.ranks:
                here = [one.shard for one in held if case.start + rank in one.ranks]
                total += sum(_missing(weight, hf, placed.shard, here) for hf in range(len(weight.hf)))
    return total * itemsize


def _missing(weight: Weight, hf: int, needed: object, held: list) -> int:
    mask = torch.zeros(weight.shapes[hf], dtype=torch.bool)
    for value, shards in ((True, [needed]), (False, held)):
        for piece in (piece for shard in shards for piece in shard.pieces if piece.hf == hf):
            box(mask, piece.begin, piece.size).fill_(value)
    return int(mask.sum())
