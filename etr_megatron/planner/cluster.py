"""Assign a number of GPUs to training and rollout servers according to a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from etr_megatron.config import Config, SglangConfig
from etr_megatron.errors import UserError

if TYPE_CHECKING:
    from etr_megatron.weights import ServerLayout, TrainingLayout


MOST_GPUS = 2**16
"""Limit on GPUs: every rank is planned, so more would take minutes and memory to no use."""


@dataclass(frozen=True)
class Cluster:
    """gpus: all GPUs of the job. ranks: number of training ranks. servers: on all nodes together, with server_tp GPUs each.

    colocated: servers share the ranks' GPUs. outside: they run on GPUs outside the job (`sglang.urls`).
    first_node_ranks: ranks of the first node if dedicated servers leave it fewer than the others; None if all are alike.
    server_nodes: number of nodes, from the first, that have servers; None is all. dedicated_nodes: number of nodes, at the end,
    that have only servers.
    """

    gpus: int
    gpus_per_node: int
    ranks: int
    servers: int
    server_tp: int
    colocated: bool = False
    outside: bool = False
    first_node_ranks: int | None = None
    server_nodes: int | None = None
    dedicated_nodes: int = 0

    def shares_gpu(self, rank: int) -> bool:
        """Whether a colocated server uses the rank's GPU: servers occupy consecutive GPUs from a node's first on."""
        if not self.colocated:
            return False
        node, gpu = divmod(rank, self.gpus_per_node)
        nodes = self.server_nodes or self.nodes
        return node < nodes and gpu < self.servers // nodes * self.server_tp

    def node_of(self, rank: int) -> int:
        """The machine of a training rank."""
        missing = 0 if self.first_node_ranks is None else self.ranks_per_node - self.first_node_ranks
        return (rank + missing) // self.ranks_per_node

    @property
    def nodes(self) -> int:
        """Number of machines of the job."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def ranks_per_node(self) -> int:
        """torchrun's --nproc-per-node; on the first node it is `first_node_ranks` unless that is None."""
        return self.ranks // (self.nodes - self.dedicated_nodes) if self.first_node_ranks is None else self.gpus_per_node


def gpu_problems(gpus: int, gpus_per_node: int) -> list[str]:
    """Messages for invalid numbers of GPUs."""
    counts = {"--gpus": gpus, "--gpus-per-node": gpus_per_node}
    found = [f"{option} {count}: must be at least 1" for option, count in counts.items() if count < 1]
    return found + ([f"--gpus {gpus}: must be at most {MOST_GPUS}"] if gpus > MOST_GPUS else [])


def divide(config: Config, gpus: int, gpus_per_node: int = 8) -> Cluster:
    """Assign a job's GPUs to ranks and servers according to `rollout.backend` and `sglang`.

    Raises UserError if servers do not fit on a node or leave no GPU to train on.
    """
    if problems := gpu_problems(gpus, gpus_per_node):
        raise UserError("\n".join(problems))
    gpus_per_node = min(gpus, gpus_per_node)
    if gpus % gpus_per_node:
        raise UserError(f"--gpus {gpus} is not a multiple of the {gpus_per_node} GPUs of a node")
    if config.rollout.backend == "embedded":
        return Cluster(gpus, gpus_per_node, gpus, servers=gpus, server_tp=1, colocated=True)
    sglang = config.sglang
    if sglang.urls:
        return Cluster(gpus, gpus_per_node, gpus, servers=len(sglang.urls), server_tp=sglang.tp, outside=True)
    on_a_node = sglang.gpus_of_a_node
    if on_a_node > gpus_per_node:
        raise UserError(
            f"sglang.servers={sglang.servers} of sglang.tp={sglang.tp} need {on_a_node} GPUs on a node, which has "
            f"{gpus_per_node}; lower one of them"
        )
    if sglang.dedicated_nodes:
        return _with_dedicated_nodes(sglang, gpus, gpus_per_node)
    nodes = gpus // gpus_per_node if sglang.nodes == "every" else 1
    colocated = sglang.placement == "colocated"
    ranks = gpus if colocated else gpus - nodes * on_a_node
    if ranks < 1:
        raise UserError(
            f"dedicated servers take {nodes * on_a_node} of {gpus} GPUs and leave none to train on; lower sglang.servers or "
            "sglang.tp"
        )
    first = None if colocated or nodes * gpus_per_node == gpus else gpus_per_node - on_a_node
    if first == 0:
        raise UserError(
            f"dedicated servers take all {gpus_per_node} GPUs of the first node, where rank 0 needs one; lower sglang.servers "
            "or sglang.tp, or set sglang.nodes=every with fewer on each"
        )
    return Cluster(
        gpus,
        gpus_per_node,
        ranks,
        nodes * sglang.servers,
        sglang.tp,
        colocated=colocated,
        first_node_ranks=first,
        server_nodes=nodes,
    )


def _with_dedicated_nodes(sglang: SglangConfig, gpus: int, gpus_per_node: int) -> Cluster:
    apart, nodes = sglang.dedicated_nodes, gpus // gpus_per_node
    if apart >= nodes:
        raise UserError(
            f"sglang.dedicated_nodes={apart} leaves none of the {nodes} node{'s' * (nodes > 1)} ({gpus} GPUs) to train on; "
            "lower it"
        )
    ranks = (nodes - apart) * gpus_per_node
    return Cluster(gpus, gpus_per_node, ranks, apart * sglang.servers, sglang.tp, dedicated_nodes=apart)


def training_layout(config: Config, cluster: Cluster) -> TrainingLayout:
    """The layout of the ranks; config must be resolved for `cluster.ranks`. Context-parallel ranks count as data-parallel."""
    from etr_megatron.weights import TrainingLayout  # imports torch, which would delay errors in options

    parallel = config.parallel
    assert parallel.tp != "auto"
    return TrainingLayout(
        tp=parallel.tp,
        pp=parallel.pp,
        dp=cluster.ranks // (parallel.tp * parallel.pp),
        ep=parallel.ep,
        etp=parallel.etp,
        vpp=parallel.vpp,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
    )


def server_layout(config: Config, cluster: Cluster) -> ServerLayout:
    """The layout of one server."""
    from etr_megatron.weights import ServerLayout

    return ServerLayout(tp=cluster.server_tp, ep=config.sglang.ep if config.rollout.backend == "sglang" else 1)
