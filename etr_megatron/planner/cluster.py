"""Assign a number of GPUs to training and rollout servers according to a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from etr_megatron.config import Config, SglangConfig
from etr_megatron.errors import UserError

if TYPE_CHECKING:
    from etr_megatron.weights import ServerLayout, TrainingLayout


MAX_GPUS = 2**16
"""Maximum number of GPUs: every rank is planned, so more would take minutes and much memory for no benefit."""


@dataclass(frozen=True)
class Cluster:
    """gpus: all GPUs of the job. ranks: number of training ranks. servers: on all nodes together, with server_tp GPUs each.

    nodes_per_server: nodes that each server spans, with equally many of its GPUs on each.
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
    nodes_per_server: int = 1

    def shares_gpu(self, rank: int) -> bool:
        """Whether a colocated server uses the rank's GPU: servers occupy consecutive GPUs from a node's first on."""
        if not self.colocated:
            return False
        node, gpu = divmod(rank, self.gpus_per_node)
        nodes = self.server_nodes or self.nodes
        return node < nodes and gpu < self.servers * self.server_tp // nodes

    def node_of(self, rank: int) -> int:
        """The machine of a training rank."""
        missing = 0 if self.first_node_ranks is None else self.ranks_per_node - self.first_node_ranks
        return (rank + missing) // self.ranks_per_node

    @property
    def nodes(self) -> int:
        """Number of machines of the job."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def origin_of_ranks(self) -> str:
        """How the number of ranks follows from the GPUs and the servers, as part of a sentence."""
        if self.ranks == self.gpus:
            return f"all {self.gpus} GPUs"
        what = f"sglang.dedicated_nodes={self.dedicated_nodes}" if self.dedicated_nodes else "dedicated servers"
        return f"{self.gpus} GPUs less {self.gpus - self.ranks} of {what}"

    @property
    def ranks_per_node(self) -> int:
        """torchrun's --nproc-per-node; on the first node it is `first_node_ranks` unless that is None."""
        return self.ranks // (self.nodes - self.dedicated_nodes) if self.first_node_ranks is None else self.gpus_per_node


def gpu_problems(gpus: int, gpus_per_node: int) -> list[str]:
    """Messages for invalid numbers of GPUs."""
    counts = {"--gpus": gpus, "--gpus-per-node": gpus_per_node}
    found = [f"{option} {count}: must be at least 1" for option, count in counts.items() if count < 1]
    return found + ([f"--gpus {gpus}: must be at most {MAX_GPUS}"] if gpus > MAX_GPUS else [])


def divide(config: Config, gpus: int, gpus_per_node: int = 8) -> Cluster:
    """Assign a job's GPUs to ranks and servers according to `rollout.backend` and `sglang`.

    Servers at `sglang.urls` are assumed to span as few nodes as possible. Raises UserError if servers do not fit on a node, do
    not divide the nodes among them or leave no GPU to train on.
    """
    if problems := gpu_problems(gpus, gpus_per_node):
        raise UserError("\n".join(problems))
    span = -(-config.sglang.tp // gpus_per_node)  # nodes of an external server, which may have more GPUs than a small job
    gpus_per_node = min(gpus, gpus_per_node)
    if gpus % gpus_per_node:
        raise UserError(f"--gpus {gpus} is not a multiple of the {gpus_per_node} GPUs of a node")
    if config.rollout.backend == "embedded":
        return Cluster(gpus, gpus_per_node, gpus, servers=gpus, server_tp=1, colocated=True)
    sglang = config.sglang
    if sglang.urls:
        return Cluster(gpus, gpus_per_node, gpus, len(sglang.urls), server_tp=sglang.tp, outside=True, nodes_per_server=span)
    on_a_node = sglang.gpus_of_a_node
    _refuse_too_large(sglang, gpus_per_node)
    if sglang.dedicated_nodes:
        return _with_dedicated_nodes(sglang, gpus, gpus_per_node)
    nodes = gpus // gpus_per_node if sglang.nodes == "every" else 1
    span = sglang.nodes_per_server
    if nodes % span:
        raise UserError(
            f"sglang.nodes_per_server={span}: the {nodes} node{'s' * (nodes > 1)} of {gpus} GPUs are no multiple of it; give "
            "another --gpus, or lower it"
        )
    colocated = sglang.placement == "colocated"
    ranks = gpus if colocated else gpus - nodes * on_a_node
    if ranks < 1:
        ways = "lower sglang.servers or sglang.tp"
        if span > 1:
            ways = "raise sglang.nodes_per_server, lower sglang.tp, or give servers nodes of their own (sglang.dedicated_nodes)"
        raise UserError(f"dedicated servers take {nodes * on_a_node} of {gpus} GPUs and leave none to train on; {ways}")
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
        nodes // span * sglang.servers,
        sglang.tp,
        colocated=colocated,
        first_node_ranks=first,
        server_nodes=nodes,
        nodes_per_server=span,
    )


def _refuse_too_large(sglang: SglangConfig, gpus_per_node: int) -> None:
    if sglang.gpus_of_a_node <= gpus_per_node:
        return
    split, ways = "", "lower one of them"
    if sglang.nodes_per_server > 1:
        split = f" on sglang.nodes_per_server={sglang.nodes_per_server} nodes"
        ways = "lower sglang.tp, or raise sglang.nodes_per_server"
    elif sglang.tp > gpus_per_node:
        ways += ", or raise sglang.nodes_per_server, for servers that span nodes"
    raise UserError(
        f"sglang.servers={sglang.servers} of sglang.tp={sglang.tp}{split} need {sglang.gpus_of_a_node} GPUs on a node, which "
        f"has {gpus_per_node}; {ways}"
    )


def _with_dedicated_nodes(sglang: SglangConfig, gpus: int, gpus_per_node: int) -> Cluster:
    apart, nodes, span = sglang.dedicated_nodes, gpus // gpus_per_node, sglang.nodes_per_server
    if apart >= nodes:
        raise UserError(
            f"sglang.dedicated_nodes={apart} leaves none of the {nodes} node{'s' * (nodes > 1)} ({gpus} GPUs) to train on; "
            f"lower it{f' to a multiple of {span}, see nodes_per_server' if span > 1 else ''}"
        )
    ranks = (nodes - apart) * gpus_per_node
    servers = apart // span * sglang.servers
    return Cluster(gpus, gpus_per_node, ranks, servers, sglang.tp, dedicated_nodes=apart, nodes_per_server=span)


def training_layout(config: Config, ranks: int) -> TrainingLayout:
    """The layout of the ranks; config must be resolved for `ranks`. Context-parallel ranks count as data-parallel."""
    from etr_megatron.weights import TrainingLayout  # imports torch, which would delay errors in options

    parallel = config.parallel
    assert parallel.tp != "auto"
    return TrainingLayout(
        tp=parallel.tp,
        pp=parallel.pp,
        dp=ranks // (parallel.tp * parallel.pp),
        ep=parallel.ep,
        etp=parallel.etp,
        vpp=parallel.vpp,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
    )


def server_layout(config: Config, cluster: Cluster) -> ServerLayout:
    """The layout of one server."""
    from etr_megatron.weights import ServerLayout

    if config.rollout.backend == "embedded":
        return ServerLayout()
    return ServerLayout(tp=cluster.server_tp, ep=config.sglang.ep, attention_dp=config.sglang.dp_attention)
