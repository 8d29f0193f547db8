"""Memory of NCCL's connections, against a count of a job's groups and neighbours rank by rank."""

from __future__ import annotations

import pytest

from etr_megatron.planner.nccl import CHANNEL, PEER, RING, nccl_bytes
from etr_megatron.weights import TrainingLayout


def test_the_first_all_to_all_of_eight_h100_takes_what_was_reported():
    """3.28 GB: https://github.com/NVIDIA/nccl/issues/1685"""
    assert pytest.approx(3.28e9, rel=0.01) == 7 * PEER
    # Buffers of a channel by init.cc: LL, LL128 and Simple, in pages of 2 MiB; and a page each for the sender and the flags.
    buffers = 8 * 512 * 8 * 16 + 120 * 640 * 8 * 8 + (4 << 20)
    assert (-(-buffers >> 21) + 2) * (2 << 20) == CHANNEL


def neighbours(rank: int, layout: TrainingLayout, cp: int, cp_comm: str, node: int) -> int:
    """Ranks on a rank's node that it sends to or receives from: of its experts, its pipeline and its context-parallel ones."""
    found = set()
    grid = layout.expert_tp * layout.ep
    same_stage = range(rank // layout.stage_ranks * layout.stage_ranks, (rank // layout.stage_ranks + 1) * layout.stage_ranks)
    found |= {r for r in same_stage if r // grid == rank // grid and r % layout.expert_tp == rank % layout.expert_tp}
    found |= {(rank + step * layout.stage_ranks) % layout.world for step in (1, -1)}
    ring, place = rank // (layout.tp * cp) * layout.tp * cp + rank % layout.tp, rank // layout.tp % cp
    found |= {ring + (place + step) % cp * layout.tp for step in ((1, -1) if cp_comm == "p2p" else range(cp))}
    return len({r for r in found if r // node == rank // node} - {rank})


@pytest.mark.parametrize(
    ("layout", "cp"),
    [
        (TrainingLayout(tp=2, dp=4), 1),
        (TrainingLayout(tp=2, pp=2, dp=2), 1),
        (TrainingLayout(tp=1, pp=4, dp=2), 1),
        (TrainingLayout(tp=2, dp=4), 2),
        (TrainingLayout(dp=8), 8),
        (TrainingLayout(tp=2, dp=8), 4),
        (TrainingLayout(dp=8, ep=8), 1),
        (TrainingLayout(tp=4, dp=8, pp=2, ep=4, etp=1), 1),
        (TrainingLayout(dp=32, ep=16), 1),
    ],
)
@pytest.mark.parametrize("cp_comm", ["p2p", "a2a"])
def test_peers_are_those_of_the_busiest_rank_on_its_node(layout: TrainingLayout, cp: int, cp_comm: str):
    groups = (layout.world, layout.world, layout.tp, layout.dp, layout.expert_tp * layout.ep)
    rings = sum(size > 1 for size in (*groups, layout.stage_ranks // (layout.expert_tp * layout.ep)))
    for rank in range(layout.world):
        found = nccl_bytes(rank, layout, cp=cp, cp_comm=cp_comm, experts=True, node=8, sync=None)
        assert found == rings * RING + neighbours(rank, layout, cp, cp_comm, node=8) * PEER


@pytest.mark.parametrize(
    ("sync", "peers"),
    [("broadcast", [7] + 7 * [1] + 8 * [0]), ("tensor", [7] + 7 * [1] + 8 * [0]), ("disk", 16 * [7]), ("sharded", 16 * [0])],
)
def test_weights_are_gathered_on_a_node_by_rank_0_or_for_files_by_all_and_one_gpu_has_nobody_to_talk_to(sync, peers):
    layout, dense = TrainingLayout(tp=8, pp=2, dp=1), dict(cp=1, cp_comm="p2p", experts=False, node=8)
    quiet, busy = ([nccl_bytes(rank, layout, **dense, sync=one) for rank in range(16)] for one in (None, sync))
    assert [(b - q - RING) // PEER for q, b in zip(quiet, busy, strict=True)] == peers
    assert nccl_bytes(0, TrainingLayout(), **dense, sync=sync) == 0
