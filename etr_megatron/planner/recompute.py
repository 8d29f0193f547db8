"""What a config recomputes in backward passes, and which fields of `train.megatron` a plan does not count."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from etr_megatron.config import TrainConfig

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture, TrainingLayout

_COUNTED = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "distribute_saved_activations",
    "deallocate_pipeline_outputs",
)


@dataclass(frozen=True)
class Recomputation:
    """attention: whether core attention alone is recomputed. layers: the first layers of every model chunk that are recomputed
    as a whole; None is all of them. unit: consecutive layers of which only the first one's input is kept. spread: whether kept
    inputs are spread over tensor-parallel ranks."""

    attention: bool = False
    layers: int | None = 0
    unit: int = 1
    spread: bool = False

    @classmethod
    def of(cls, train: TrainConfig) -> Recomputation:
        """What `train.recompute` or `train.megatron` choose. Parts of layers other than core attention are not counted."""
        fields = train.megatron
        if train.recompute == "selective" or fields.get("recompute_granularity") == "selective":
            return cls(attention="core_attn" in _modules(train))
        if train.recompute == "full":
            return cls(layers=None)
        if fields.get("recompute_granularity") != "full":
            return cls()
        number, spread = int(str(fields.get("recompute_num_layers", 1))), fields.get("distribute_saved_activations") is True
        if fields.get("recompute_method") == "block":
            return cls(layers=number, spread=spread)
        return cls(layers=None, unit=number, spread=spread)

    def in_chunk(self, layers: int) -> int:
        """How many of a chunk's layers are recomputed as a whole."""
        return layers if self.layers is None else min(layers, self.layers)

    def share(self, arch: Architecture, layout: TrainingLayout) -> float:
        """The share of all layers that are recomputed as a whole."""
        chunks = Counter(layout.chunk_of(layer, arch)[:2] for layer in range(arch.layers))
        return sum(map(self.in_chunk, chunks.values())) / arch.layers


def _modules(train: TrainConfig) -> tuple[str, ...]:
    given = train.megatron.get("recompute_modules", ("core_attn",))
    assert isinstance(given, tuple)
    return given


def uncounted(train: TrainConfig) -> list[str]:
    """The fields of `train.megatron` whose memory and time a plan does not count."""
    counted = {*_COUNTED, *(["recompute_modules"] if set(_modules(train)) == {"core_attn"} else [])}
    return [name for name in train.megatron if name not in counted]
