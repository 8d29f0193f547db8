"""The size of a checkpoint, and the host memory of copies that the training ranks of a node keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etr_megatron.config import Config
from etr_megatron.planner.adapters import adapters_by_rank, total_adapters
from etr_megatron.planner.cluster import training_layout
from etr_megatron.planner.memory import element_bytes
from etr_megatron.planner.parameters import total_parameters

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture


def checkpoint_bytes(config: Config, arch: Architecture) -> int:
    """Bytes of a run's checkpoint: weights, or low-rank adapters alone (in fp32); Adam's two moments; and its own fp32 weights
    unless the plain optimizer updates fp32 weights in place."""
    element = 4 if config.lora.rank else element_bytes(config)
    own = 4 if element < 4 or config.train.distributed_optimizer else 0
    return _trained(config, arch) * (element + 8 + own)


def snapshot_bytes(config: Config, arch: Architecture, ranks: int, of: int) -> int:
    """Bytes of the copy that `checkpoint.asynchronous` makes on `ranks` of the job's `of` ranks, if all copy equal parts; 0
    without it."""
    return checkpoint_bytes(config, arch) * ranks // of if config.checkpoint.asynchronous else 0


def host_bytes(config: Config, arch: Architecture, node: range, world: int) -> int:
    """Bytes of all copies in the host memory of a node: the snapshot of a checkpoint, the offloaded optimizer, and
    original values of adapted matrices. Not the processes themselves.

    config: resolved for `world` ranks. node: the node's ranks. Raises ValueError if the layout does not fit the architecture.
    """
    from etr_megatron.weights import LowRank

    needed = snapshot_bytes(config, arch, len(node), world)
    # Adam's two moments and weights, in fp32; on the CPU, Megatron's optimizer also keeps the gradients.
    element = 16 if config.train.optimizer_offload else 12 if config.train.offload_for_rollout else 0
    needed += element * _trained(config, arch) * len(node) // world
    if config.lora.rank and config.lora.offload_base:
        held = adapters_by_rank(arch, training_layout(config, world), LowRank.of(config.lora))
        needed += element_bytes(config) * sum(held[rank].pinned for rank in node)
    return needed


def _trained(config: Config, arch: Architecture) -> int:
    """Elements that are trained."""
    from etr_megatron.weights import LowRank

    return total_adapters(arch, LowRank.of(config.lora)) if config.lora.rank else total_parameters(arch)
