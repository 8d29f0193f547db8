"""Which of torchrun's nodes train, and which are dedicated to servers: the last ones."""

from __future__ import annotations

import os
from typing import NamedTuple

from etr_megatron.errors import UserError


class NodeRole(NamedTuple):
    """training_ranks: of the whole job. server_node: this node's index among the dedicated server nodes; None if it trains."""

    training_ranks: int
    server_node: int | None


def server_node_index(dedicated_nodes: int) -> int | None:
    """This node's index among the dedicated server nodes; None if it trains. Without torchrun it counts as the only node."""
    number = int(os.environ.get("GROUP_RANK", "0")) - (int(os.environ.get("GROUP_WORLD_SIZE", "1")) - dedicated_nodes)
    return number if number >= 0 else None


def node_role(dedicated_nodes: int, nodes_per_server: int = 1) -> NodeRole:
    """The role of this process's node, from torchrun's environment variables. nodes_per_server: number of nodes that
    each server spans, if every node runs a part of a server; else 1.

    torchrun numbers ranks node by node, so the training ranks come first, without gaps. Raises UserError in three cases:
    - No node would be left to train.
    - With dedicated nodes, nodes differ in their number of processes: a node only knows its own number.
    - The number of nodes is not a multiple of `nodes_per_server`.
    """
    world, nodes = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if nodes % nodes_per_server:
        raise UserError(
            f"sglang.nodes_per_server={nodes_per_server}: the job has {nodes} node{'s' * (nodes > 1)}, no multiple of it; "
            "start torchrun on a multiple (--nnodes), or lower it"
        )
    if not dedicated_nodes:
        return NodeRole(world, None)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if dedicated_nodes >= nodes:
        raise UserError(
            f"sglang.dedicated_nodes={dedicated_nodes}: the job has {nodes} node{'s' * (nodes > 1)}, of which at least one "
            "must be left to train; start torchrun on more nodes (--nnodes), or lower it"
        )
    if world != nodes * local:
        raise UserError(
            f"sglang.dedicated_nodes={dedicated_nodes}: {world} processes on {nodes} nodes, {local} of them on this node; with "
            "dedicated nodes, every node needs the same --nproc-per-node, the number of GPUs that a training node trains on"
        )
    return NodeRole((nodes - dedicated_nodes) * local, server_node_index(dedicated_nodes))
