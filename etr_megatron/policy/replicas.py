"""Weights read once for all the ranks that hold the same: each reads a share, and then they exchange the shares.

Data- and context-parallel ranks hold the same weights; experts are replicated over a group of their own. A file that each of
them read by itself would be read as often as there are replicas, all at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import Tensor

from etr_megatron.platform.together import together
from etr_megatron.weights import Weight


def replicas_of(*, experts: bool) -> dist.ProcessGroup:
    """The ranks that hold the same experts, or the same of the other weights, as this one."""
    return mpu.get_expert_data_parallel_group() if experts else mpu.get_data_parallel_group(with_context_parallel=True)


def readers(sizes: Sequence[int], ranks: int) -> list[int]:
    """Who of so many ranks reads each of the tensors of these sizes: the largest first, each to the one with least to read."""
    load, found = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        found[number] = min(range(ranks), key=load.__getitem__)
        load[found[number]] += sizes[number]
    return found


def read_once(own: Mapping[str, tuple[Weight, Tensor]], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every name with its values, on the parameter's device and of its type; the next one's may overwrite them. A collective.

    own: of each name the weight and this rank's parameter; replicas have the same. read: values of a name, on any device.
    What a rank has read stays in memory until all have read theirs: a share of its weights. What `read` raises ends all
    ranks, see `together`.
    """
    groups = {experts: replicas_of(experts=experts) for experts in (False, True)}
    if all(group.size() == 1 for group in groups.values()):
        yield from ((name, read(name)) for name in own)
        return
    reader: dict[str, int] = {}
    for experts, group in groups.items():
        names = [name for name, (weight, _) in own.items() if (weight.expert is not None) is experts]
        reader |= zip(names, readers([own[name][1].numel() for name in names], group.size()), strict=True)
    group_of = {name: groups[weight.expert is not None] for name, (weight, _) in own.items()}
    mine = together(lambda: {name: read(name) for name in own if reader[name] == group_of[name].rank()})
    for name, (_, parameter) in own.items():
        group = group_of[name]
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if name in mine:
            values.copy_(mine.pop(name))
        dist.broadcast(values, src=dist.get_global_rank(group, reader[name]), group=group)
        yield name, values


class ReadOnce(TorchDistLoadShardedStrategy):
    """For `dist_checkpointing.load`: tensors are read by one of the ranks that want them, what only one wants by that one.

    It is Megatron's own way of sharing the work, done apart for experts, whose replicas are other ranks.
    """

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        """Everything in the place of the sharded tensor or object that asks for it (in place). A collective. Raises torch's
        CheckpointException on every rank for what any could not read; nothing is exchanged then."""
        groups = [replicas_of(experts=experts) for experts in (False, True)]
        alike = dist.get_process_group_ranks(groups[0]) == dist.get_process_group_ranks(groups[1])
        wanted: list[dict[str, Any]] = [{}, {}]
        for item in nested_values(sharded_state_dict):
            is_expert = isinstance(item, ShardedTensor) and ".experts." in item.key
            wanted[is_expert and not alike][str(id(item))] = item
        found: dict[str, Any] = {}
        for group, items in list(zip(groups, wanted, strict=True))[: 1 if alike else 2]:
            found |= FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group).load(items, Path(checkpoint_dir))
        return dict_list_map_inplace(lambda item: found[str(id(item))], sharded_state_dict)
