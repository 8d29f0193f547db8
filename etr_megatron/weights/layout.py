"""Which ranks hold which shard of a weight: Megatron's in training, a server's in inference. Plain arithmetic.

Rank order in training is Megatron's default, "tp-cp-ep-dp-pp": tensor-parallel neighbours first, pipeline stages last; context-
parallel ranks hold the same weights and count as data-parallel here. Experts regroup the ranks of a stage by (ETP, EP).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from etr_megatron.weights.architecture import Architecture
from etr_megatron.weights.map import EMBEDDING, Weight, weights_of
from etr_megatron.weights.shards import Shard, megatron_shard, server_shard, unsharded


@dataclass(frozen=True)
class PlacedShard:
    """One shard of a weight and the ranks, in ascending order, that hold it."""

    shard: Shard
    ranks: tuple[int, ...]


class WeightLayout(Protocol):
    """A layout of ranks 0 .. world - 1: which rank holds which shards."""

    @property
    def world(self) -> int:
        """Number of ranks."""
        ...

    def placed_shards(self, weight: Weight, arch: Architecture) -> tuple[PlacedShard, ...]:
        """Every distinct shard of the weight once. Raises ValueError when the layout does not fit the architecture."""
        ...


@dataclass(frozen=True)
class TrainingLayout:
    """Megatron's: TP x PP x DP ranks; dp counts all replicas of dense weights (DP x CP).

    ep: expert-parallel ranks; etp: tensor-parallel ranks of an expert, None means tp. ETP x EP divides TP x DP.
    vpp: model chunks of a stage under the interleaved schedule. first_stage_layers, last_stage_layers: layers of those stages,
    None means an even share of the rest. Raises ValueError for sizes that are below 1 or do not divide.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.dp, self.ep, self.expert_tp, self.vpp) < 1:
            raise ValueError(f"{self} has a size below 1")
        if self.stage_ranks % (self.expert_tp * self.ep):
            raise ValueError(
                f"experts of ETP {self.expert_tp} x EP {self.ep} do not divide the {self.stage_ranks} ranks of a stage"
            )

    @property
    def expert_tp(self) -> int:
        """ETP."""
        return self.tp if self.etp is None else self.etp

    @property
    def stage_ranks(self) -> int:
        """Ranks of a pipeline stage."""
        return self.tp * self.dp

    @property
    def world(self) -> int:
        """TP x PP x DP."""
        return self.stage_ranks * self.pp

    def layers_of_stages(self, layers: int) -> tuple[int, ...]:
        """Number of the model's layers in each stage. Raises ValueError when they do not divide."""
        ends = {0: self.first_stage_layers, self.pp - 1: self.last_stage_layers} if self.pp > 1 else {}
        fixed = {stage: count for stage, count in ends.items() if count is not None}
        stages, rest = self.pp - len(fixed), layers - sum(fixed.values())
        even = rest // stages if stages else 0
        counts = tuple(fixed.get(stage, even) for stage in range(self.pp))
        if sum(counts) != layers or min(counts) < 1 or any(count % self.vpp for count in counts):
            named = f", {self.first_stage_layers} in the first and {self.last_stage_layers} in the last" if fixed else ""
            raise ValueError(f"{layers} layers do not divide into {self.pp} stages of {self.vpp} chunks{named}")
        return counts

    def chunk_of(self, layer: int, arch: Architecture) -> tuple[int, int, int]:
        """(stage, model chunk within it, layer within the chunk). Raises ValueError when layers do not divide."""
        return _chunks_of_layers(self, arch.layers)[layer]

    def stages_of(self, weight: Weight, arch: Architecture) -> tuple[int, ...]:
        """Stages that hold a weight: one, or the first and the last for a tied embedding."""
        if weight.layer is not None:
            return (self.chunk_of(weight.layer, arch)[0],)
        last = self.pp - 1
        if weight.split == "vocab" and arch.tied_embeddings:
            return (0, last) if last else (0,)
        return (0,) if weight.megatron.startswith("embedding.") else (last,)

    def placed_shards(self, weight: Weight, arch: Architecture) -> tuple[PlacedShard, ...]:
        """See `WeightLayout`."""
        ways, first, step = self.tp, 0, self.tp
        if weight.expert is not None:
            ways, step = self.expert_tp, self.expert_tp * self.ep
            first = ways * _expert_rank(weight.expert, arch, self.ep)
        size = self.stage_ranks
        places = tuple(range(stage * size + first, (stage + 1) * size, step) for stage in self.stages_of(weight, arch))
        return _placed_shards(_Cut.of(weight, arch, ways, megatron_shard), places)


@dataclass(frozen=True)
class ServerLayout:
    """SGLang's: `servers` servers of TP ranks each, one after the other; experts are split by EP first and then by TP / EP.

    attention_dp: data-parallel ranks of attention (`--enable-dp-attention`). Each of these groups of neighbouring ranks holds
    the input embedding and all attention, split over the group; everything else is split as without them.
    """

    tp: int = 1
    ep: int = 1
    servers: int = 1
    attention_dp: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.ep, self.servers, self.attention_dp) < 1:
            raise ValueError(f"{self} has a size below 1")
        for name, size in (("EP", self.ep), ("attention DP", self.attention_dp)):
            if self.tp % size:
                raise ValueError(f"{name} {size} does not divide the server's TP {self.tp}")

    @property
    def attention_tp(self) -> int:
        """Ranks over which attention is split."""
        return self.tp // self.attention_dp

    @property
    def world(self) -> int:
        """Ranks of all servers."""
        return self.tp * self.servers

    def placed_shards(self, weight: Weight, arch: Architecture) -> tuple[PlacedShard, ...]:
        """See `WeightLayout`."""
        ways, first, step = self.tp, 0, self.tp
        if weight.expert is not None:
            ways = self.tp // self.ep
            first = ways * _expert_rank(weight.expert, arch, self.ep)
        elif weight.megatron == EMBEDDING or ".self_attention." in weight.megatron:
            ways = step = self.attention_tp
        return _placed_shards(_Cut.of(weight, arch, ways, server_shard), (range(first, self.world, step),))


@dataclass(frozen=True)
class UnshardedLayout:
    """Every weight in full on one rank, given by `owner`, with its HF tensors stacked along the rows."""

    world: int
    owner: Callable[[Weight], int]

    def placed_shards(self, weight: Weight, arch: Architecture) -> tuple[PlacedShard, ...]:
        """See `WeightLayout`."""
        return (PlacedShard(unsharded(weight), (self.owner(weight),)),)


def shards_of(layout: WeightLayout, arch: Architecture, rank: int) -> Iterator[tuple[Weight, Shard]]:
    """Every (weight, shard) that a rank holds, in the model's order."""
    for weight in weights_of(arch):
        for placed in layout.placed_shards(weight, arch):
            if rank in placed.ranks:
                yield weight, placed.shard


def _expert_rank(expert: int, arch: Architecture, ep: int) -> int:
    """The expert-parallel rank that holds an expert; each rank holds equally many, consecutive ones."""
    count = arch.experts.count if arch.experts else 0
    if count == 0 or count % ep:
        raise ValueError(f"{count} experts cannot be split over expert parallelism of {ep}")
    return expert // (count // ep)


@lru_cache(maxsize=16)
def _chunks_of_layers(layout: TrainingLayout, layers: int) -> tuple[tuple[int, int, int], ...]:
    """See `TrainingLayout.chunk_of`, for every layer."""
    counts = layout.layers_of_stages(layers)
    return tuple(
        (stage, chunk, local)
        for chunk in range(layout.vpp)
        for stage, count in enumerate(counts)
        for local in range(count // layout.vpp)
    )


@dataclass(frozen=True)
class _Cut:
    """A weight cut into `ways` parts. The key is what its shards depend on; most weights of a model share a few keys."""

    shard_of: Callable[[Weight, Architecture, int, int], Shard]
    ways: int
    split: str
    shapes: tuple[tuple[int, ...], ...]
    kv_heads: int
    vocab_size: int
    weight: Weight = field(compare=False, repr=False)
    arch: Architecture = field(compare=False, repr=False)

    @classmethod
    def of(
        cls, weight: Weight, arch: Architecture, ways: int, shard_of: Callable[[Weight, Architecture, int, int], Shard]
    ) -> _Cut:
        return cls(shard_of, ways, weight.split, weight.shapes, arch.kv_heads, arch.vocab_size, weight, arch)


@lru_cache(maxsize=4096)
def _placed_shards(cut: _Cut, places: tuple[range, ...]) -> tuple[PlacedShard, ...]:
    """The distinct shards of a cut: replicas and repeated heads are the same shard. places: the layout's ranks that hold part
    0; part i is on the ranks place + i."""
    merged: dict[Shard, list[int]] = {}
    for part in range(cut.ways):
        merged.setdefault(cut.shard_of(cut.weight, cut.arch, cut.ways, part), []).append(part)
    return tuple(
        PlacedShard(shard, tuple(sorted(place + part for some in places for place in some for part in parts)))
        for shard, parts in merged.items()
    )
