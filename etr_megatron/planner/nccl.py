"""GPU memory of NCCL's connections, which torch's allocator does not see. NCCL makes them at the first operation that needs
them and keeps them as long as the communicator."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etr_megatron.weights import TrainingLayout

CHANNEL = 14 * 2**20
"""Bytes of a channel to one peer and back. By NCCL's source (init.cc) a receiver has 512 KiB for LL, 4,800 KiB for LL128 and
4 MiB for Simple, which are 10 MiB in pages of 2 MiB; flags take pages of their own. In its issue 1685 the first all-to-all of
8 H100 took 3.28 GB on each: 7 peers x 32 channels x 14 MiB."""
COLLECTIVE_CHANNELS, PEER_CHANNELS = 24, 32
"""Channels of a ring, and to each peer over NVLink, that NCCL reports on 8 H100. Peers on other nodes share one buffer."""

RING = COLLECTIVE_CHANNELS * CHANNEL
PEER = PEER_CHANNELS * CHANNEL


def nccl_bytes(rank: int, layout: TrainingLayout, *, cp: int, cp_comm: str, experts: bool, node: int, sync: str | None) -> int:
    """Bytes of a rank's connections: a ring for every group with reductions or gathers, and one connection to each peer on its
    node with which it exchanges messages. node: ranks per node. sync: transport of weight syncs, None without servers;
    connections of `sharded` to servers on the same node are not counted.
    """
    expert_ranks = layout.expert_tp * layout.ep
    groups = [layout.world, layout.world, layout.tp, layout.dp]  # the second is for gradient norms; dp includes CP
    if experts:
        groups += [expert_ranks, layout.stage_ranks // expert_ranks]
    if sync is not None:
        groups.append(layout.world)

    def peers_on_node(size: int, stride: int) -> int:
        """Others on the node of `size` ranks that lie `stride` apart."""
        return min(size, max(1, node // stride)) - 1

    peers = peers_on_node(layout.ep, layout.expert_tp) if experts else 0
    around = peers_on_node(cp, layout.tp)
    peers += (around if cp_comm == "a2a" else min(2, around)) + min(2, peers_on_node(layout.pp, layout.stage_ranks))
    others = (peers_on_node(layout.tp, 1) + 1) * (peers_on_node(layout.pp, layout.stage_ranks) + 1) - 1
    if sync == "disk":  # every rank gathers the weights that it writes
        peers += others
    elif sync in ("broadcast", "tensor") and rank < node:  # rank 0 gathers all
        peers += others if rank == 0 else min(1, others)
    return sum(size > 1 for size in groups) * RING + peers * PEER
