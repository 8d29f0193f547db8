"""The distributed optimizer's state in a checkpoint: every rank writes and reads only its own shard.

Megatron's layout-independent format is `fully_reshardable`. To save, it gathers the whole state of a model-parallel rank on
every data-parallel rank (12 bytes per parameter in host memory, eight times on a node), and one of these ranks writes it. To
load, each rank reads all of it and keeps its shard. Here each rank stores its shard directly: the shard is a range of every
flattened parameter, a range of a tensor is a few boxes, and torch_dist stores boxes of any size. Tensors have the names and
shapes of Megatron's format, so each format can be read as the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

_STATES = ("param", "exp_avg", "exp_avg_sq")
"""The fp32 state of every parameter; Adam's step is common to all and stored with the parameter groups."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes along every axis."""


def boxes_of_range(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """The boxes that cover the elements [begin, end) of a flattened tensor, in order: at most 2 n - 1 for n axes."""
    if len(shape) <= 1:
        if begin < end:
            yield (begin,), (end - begin,)
        return
    inner = math.prod(shape[1:])
    while begin < end:
        row, start = divmod(begin, inner)
        rows = (end - begin) // inner if start == 0 else 0
        if rows:
            yield (row, *[0] * (len(shape) - 1)), (rows, *shape[1:])
            begin += rows * inner
        else:
            stop = min(end, (row + 1) * inner)
            for offsets, sizes in boxes_of_range(shape[1:], start, stop - row * inner):
                yield (row, *offsets), (1, *sizes)
            begin = stop


def optimizers_of(optimizer: Any) -> list[Any]:
    """The optimizers of a chain, or the single one."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def store_by_rank(optimizer: Any) -> None:
    """Make a distributed optimizer (or those in a chain) store its state as this module does; others are unchanged."""
    for one in optimizers_of(optimizer):
        if hasattr(one, "sharded_param_state_fully_reshardable"):
            one.sharded_param_state_fully_reshardable = partial(_sharded_param_state, one)
            one.load_parameter_state_from_fully_reshardable = partial(_load_param_state, one)


def _own_ranges(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """(model parameter, begin, end): this rank's range of the flattened parameter, in a fixed order."""
    for ranges_by_dtype in optimizer.gbuf_ranges:
        for buckets in ranges_by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _sharded_param_state(
    optimizer: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """Replaces Megatron's method. Returns sharded tensors by parameter and state, in new fp32 CPU memory if `is_loading`."""
    stored = nested_values(model_sharded_state_dict)
    places = {place.data: place for place in stored if isinstance(place, ShardedTensor | ShardedTensorFactory)}
    found: dict[int, dict[str, list[ShardedTensor]]] = {}
    for number, (parameter, begin, end) in enumerate(_own_ranges(optimizer)):
        if is_loading:
            states = {state: torch.empty(end - begin, dtype=torch.float32) for state in _STATES}
        else:
            held = optimizer._get_main_param_and_optimizer_states(parameter)
            states = {state: held[state].detach().reshape(-1).to(torch.float32) for state in _STATES}
        # Each element's optimizer state is on only one rank of the data-parallel group; no other rank is its replica.
        place = places[parameter]
        assert isinstance(place.replica_id, tuple)
        replica = (*place.replica_id[:2], optimizer.distributed_optimizer_instance_id)
        parts = _contiguous_parts(replace(place, replica_id=replica))
        found[number] = {state: list(_pieces(parts, state, values, begin)) for state, values in states.items()}
    return found


def _pieces(parts: list[tuple[int, ShardedTensor]], state: str, values: Tensor, begin: int) -> Iterator[ShardedTensor]:
    """A state's `values` [n] as boxes (views). values[0] is element `begin` of the flattened local tensor of `parts`."""
    for base, part in parts:
        size = math.prod(part.local_shape)
        low, high = max(begin - base, 0), min(begin + len(values) - base, size)
        at = max(base - begin, 0)
        prepended = part.prepend_axis_num
        for offsets, sizes in boxes_of_range(part.local_shape, low, high):
            count = math.prod(sizes)
            sizes = (*[1] * prepended, *sizes)
            offsets = (*[0] * prepended, *offsets)
            yield replace(
                part,
                key=f"optimizer.state.{state}.{part.key}",
                data=values[at : at + count].view(sizes),
                dtype=torch.float32,
                local_shape=sizes,
                global_offset=tuple(whole + local for whole, local in zip(part.global_offset, offsets, strict=True)),
                axis_fragmentations=None,  # boxes of any size
                prepend_axis_num=0,
            )
            at += count


def _contiguous_parts(place: ShardedTensor | ShardedTensorFactory) -> list[tuple[int, ShardedTensor]]:
    """(offset in the flattened local tensor, sharded tensor without data): one, or all that a factory builds.

    Gate and up projections are one local parameter, but are not adjacent in the global tensor. The factory gives their offsets.
    """
    if not isinstance(place, ShardedTensorFactory):
        return [(0, replace(place, data=None))]
    empty = torch.empty(place.data.shape, device="meta")
    parts = sorted(nested_values(replace(place, data=empty).build()), key=lambda part: part.data.storage_offset())
    for part in parts:
        if not part.data.is_contiguous():
            raise NotImplementedError(f"{place.key}: parts that are not whole rows of the parameter cannot be stored by ranges")
    return [(part.data.storage_offset(), part.without_data()) for part in parts]


@torch.no_grad()
def _load_param_state(optimizer: Any, state: dict[int, dict[str, list[Tensor]]]) -> None:
    """Replaces Megatron's method. Copies the loaded tensors, which `_sharded_param_state` described, into the optimizer."""
    for number, (parameter, _, _) in enumerate(_own_ranges(optimizer)):
        held = {name: torch.cat([piece.reshape(-1) for piece in pieces]) for name, pieces in state[number].items()}
        optimizer._set_main_param_and_optimizer_states(parameter, held)
    synchronise = getattr(optimizer.optimizer, "_sync_hdo_state_to_sub_optimizers", None)
    if synchronise is not None:  # Megatron's CPU-offloaded optimizer
        synchronise()
