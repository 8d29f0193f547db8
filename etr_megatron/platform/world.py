"""Which of torchrun's nodes train, and which are set apart for something else: the last ones."""

from __future__ import annotations

import os
from typing import NamedTuple

from etr_megatron.errors import UserError


class Place(NamedTuple):
    """ranks: of all nodes that train. apart: this node's number among those set apart, None where it trains."""

    ranks: int
    apart: int | None


def number_apart(nodes_apart: int) -> int | None:
    """This node's number among those set apart, None where it trains; without torchrun it is the only node."""
    number = int(os.environ.get("GROUP_RANK", "0")) - (int(os.environ.get("GROUP_WORLD_SIZE", "1")) - nodes_apart)
    return number if number >= 0 else None


def place_of(nodes_apart: int) -> Place:
    """Of this process, by what torchrun says of it in the environment.

    torchrun numbers ranks node by node, so that those that train are the first ones, without a gap. Raises UserError where no
    node would be left to train, or nodes have different numbers of processes, as a node knows its own number alone.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if not nodes_apart:
        return Place(world, None)
    local, nodes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if nodes_apart >= nodes:
        raise UserError(
            f"sglang.dedicated_nodes={nodes_apart}: the job has {nodes} node{'s' * (nodes > 1)}, of which at least one must be "
            "left to train; start one torchrun on each of more (--nnodes), or set it lower"
        )
    if world != nodes * local:
        raise UserError(
            f"sglang.dedicated_nodes={nodes_apart}: {world} processes on {nodes} nodes, of which this one has {local}; with "
            "nodes set apart every node needs as many (--nproc-per-node), the number of GPUs that one trains on"
        )
    return Place((nodes - nodes_apart) * local, number_apart(nodes_apart))
