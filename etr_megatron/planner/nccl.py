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


def nccl_bytes(rank: int, layout: TrainingLayout, *, cp: int, experts: bool, node: int, sends_weights: bool) -> int:
    """Bytes of a rank's connections: a ring for every group that adds or gathers, and the peers on its node that it exchanges
    messages with. node: ranks of a node. sends_weights: servers get them from rank 0, which gathers them.
    """
    expert_ranks = layout.expert_tp * layout.ep
    groups = [layout.world, layout.world, layout.tp, layout.dp]  # the second adds up norms; dp has the context-parallel ranks
    if experts:
        groups += [expert_ranks, layout.stage_ranks // expert_ranks]
    if sends_weights:
        groups.append(layout.world)

    def beside(size: int, stride: int) -> int:
        """Others on the node of `size` ranks that lie `stride` apart."""
        return min(size, max(1, node // stride)) - 1

    peers = beside(layout.ep, layout.expert_tp) if experts else 0
    peers += min(2, beside(cp, layout.tp)) + min(2, beside(layout.pp, layout.stage_ranks))
    if sends_weights and rank < node:
        sources = (beside(layout.tp, 1) + 1) * (beside(layout.pp, layout.stage_ranks) + 1)
        peers += sources - 1 if rank == 0 else sources > 1
    return sum(size > 1 for size in groups) * RING + peers * PEER
