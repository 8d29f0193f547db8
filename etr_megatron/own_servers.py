"""Which servers a job starts itself, and where."""

from __future__ import annotations

import os

from etr_megatron.config import Config, sync_of
from etr_megatron.platform.world import number_apart


def nodes_apart(config: Config) -> int:
    """Number of dedicated server nodes, which have no training ranks."""
    return config.sglang.dedicated_nodes if has_servers(config) else 0


def has_servers(config: Config) -> bool:
    """Whether the job starts servers of its own."""
    return config.rollout.backend == "sglang" and config.rollout.replay is None and not config.sglang.urls


def starts_servers(config: Config) -> bool:
    """Whether this node starts servers; without torchrun it counts as the first node."""
    if not has_servers(config):
        return False
    if apart := nodes_apart(config):
        return number_apart(apart) is not None
    return config.sglang.nodes == "every" or os.environ.get("GROUP_RANK", "0") == "0"


def meets_servers_in_nccl(config: Config) -> bool:
    """Whether training ranks and servers form process groups, on GPUs with NCCL, in which weights travel."""
    engine = config.rollout.backend == "sglang" and config.rollout.replay is None
    return engine and sync_of(config.sglang) in ("broadcast", "sharded")
