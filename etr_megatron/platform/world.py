"""Which of torchrun's nodes train, and which are dedicated to servers: the last ones."""

from __future__ import annotations

import os
from typing import NamedTuple

from etr_megatron.errors import UserError


class Place(NamedTuple):
    """ranks: number of training ranks. apart: this node's index among the dedicated server nodes; None if it trains."""

    ranks: int
    apart: int | None


def number_apart(nodes_apart: int) -> int | None:
    """This node's index among the dedicated server nodes; None if it trains. Without torchrun it counts as the only node."""
    number = int(os.environ.get("GROUP_RANK", "0")) - (int(os.environ.get("GROUP_WORLD_SIZE", "1")) - nodes_apart)
    return number if number >= 0 else None


def place_of(nodes_apart: int, nodes_grouped: int = 1) -> Place:
    """The place of this process, from torchrun's environment variables. nodes_grouped: number of nodes that each server spans,
    if every node runs a part of a server; else 1.

    torchrun numbers ranks node by node, so the training ranks come first, without gaps. Raises UserError in three cases:
    - No node would be left to train.
    - With dedicated nodes, nodes differ in their number of processes: a node only knows its own number.
    - The number of nodes is not a multiple of `nodes_grouped`.
    """
    world, nodes = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if nodes % nodes_grouped:
        raise UserError(
            f"sglang.nodes_per_server={nodes_grouped}: the job has {nodes} node{'s' * (nodes > 1)}, no multiple of it; start "
            "torchrun on a multiple (--nnodes), or lower it"
        )
    if not nodes_apart:
        return Place(world, None)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if nodes_apart >= nodes:
        raise UserError(
            f"sglang.dedicated_nodes={nodes_apart}: the job has {nodes} node{'s' * (nodes > 1)}, of which at least one must be "
            "left to train; start torchrun on more nodes (--nnodes), or lower it"
        )
    if world != nodes * local:
        raise UserError(
            f"sglang.dedicated_nodes={nodes_apart}: {world} processes on {nodes} nodes, {local} of them on this node; with "
            "dedicated nodes, every node needs the same --nproc-per-node, the number of GPUs that a training node trains on"
        )
    return Place((nodes - nodes_apart) * local, number_apart(nodes_apart))
