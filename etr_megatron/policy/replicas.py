"""Read weights once for all ranks that hold the same ones: each rank reads a share, then they exchange the shares.

Data- and context-parallel ranks hold the same weights; experts are replicated over a separate group. Otherwise all replicas
would read the same files at the same time.
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

from etr_megatron.platform.all_ranks import on_all_ranks
from etr_megatron.weights import Weight


def replicas_of(*, experts: bool) -> dist.ProcessGroup:
    """The ranks that hold the same experts, or the same other weights, as this rank."""
    return mpu.get_expert_data_parallel_group() if experts else mpu.get_data_parallel_group(with_context_parallel=True)


def readers(sizes: Sequence[int], ranks: int) -> list[int]:
    """For each tensor, the rank that reads it: the largest tensor first, each goes to the rank with the least to read."""
    load, found = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        found[number] = min(range(ranks), key=load.__getitem__)
        load[found[number]] += sizes[number]
    return found


def read_once(own: Mapping[str, tuple[Weight, Tensor]], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every name with its values, on the parameter's device and in its dtype; use them before the next. A collective.

    own: weight and this rank's parameter by name; replicas have the same. read: values of a name, on any device.
    A rank keeps its share in memory until all ranks have read theirs. An exception in `read` is raised on all ranks, see
    `on_all_ranks`.
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
    mine = on_all_ranks(lambda: {name: read(name) for name in own if reader[name] == group_of[name].rank()})
    for name, (_, parameter) in own.items():
        group = group_of[name]
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if name in mine:
            values.copy_(mine.pop(name))
        dist.broadcast(values, src=dist.get_global_rank(group, reader[name]), group=group)
        yield name, values


class ReadOnce(TorchDistLoadShardedStrategy):
    """A `dist_checkpointing.load` strategy in which only one of the ranks that need a tensor reads it from disk.

    This is Megatron's fully parallel load, run separately for experts, whose replicas are different ranks.
    """

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        """Replace every sharded tensor or object with its values (in place). A collective. If any rank cannot read something,
        raises torch's CheckpointException on every rank before anything is exchanged."""
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
