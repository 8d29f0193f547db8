"""The servers of a job, as all its ranks see them: where they run, and their start and stop by the ranks of their machines."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from etr_megatron.config import SglangConfig, startup_timeout_of
from etr_megatron.platform.job_store import job_store, own_connection
from etr_megatron.platform.together import together
from etr_megatron.rollout.engine import MustStop, never
from etr_megatron.rollout.rank0 import on_rank0
from etr_megatron.rollout.sglang.hosts import Host, Started
from etr_megatron.rollout.sglang.parts import merged, places_of
from etr_megatron.rollout.sglang.places import addresses_of, new_key, own_address_of
from etr_megatron.rollout.sglang.server_nodes import ServerNodes, ServerSetting, host_of

_MEETING_S = 60.0
"""Time for ranks to meet after servers have started."""


class JobServers:
    """One object per rank. Servers are started by rank 0, by the first rank of every node or on dedicated nodes; those at
    `sglang.urls` already run, and are named here alone."""

    names: list[str]
    """Of all servers, in order."""
    api_key: str | None
    """Of those that the job starts; None if they require none."""
    own_address: str
    """At which servers reach rank 0."""
    hosts: dict[int, list[str]]
    """Rank -> names of the servers that it starts, or starts its machine's part of, in the order of the machines."""

    def __init__(
        self, config: SglangConfig, setting: ServerSetting, nodes: ServerNodes | None = None, *, must_stop: MustStop = never
    ) -> None:
        """A collective, which starts nothing yet. setting: without a key. nodes: on rank 0, if there are dedicated nodes.

        Raises UserError on every rank when a machine cannot have its servers, and StopAskedError when `must_stop()` becomes
        true on a rank that waits for dedicated nodes.
        """
        self._config = config
        addresses = addresses_of(config)
        apart = on_rank0(lambda: nodes.meet(startup_timeout_of(config), must_stop) if nodes is not None else [], long=True)
        places = [*addresses.values(), *apart]
        self.api_key = on_rank0(lambda: new_key(places) if places else None)
        number = len(config.urls) or config.servers * len(places) // config.nodes_per_server
        self.names = [f"SGLang server {one}" for one in range(number)]
        self.own_address = on_rank0(lambda: own_address_of(config, addresses))
        parts = dict(zip(addresses, places_of(self.names, len(addresses), config), strict=True))
        self.hosts = {rank: own for rank, (own, _) in parts.items()}
        # For the wait until servers have started. In NCCL's kernels, ranks would take turns with the servers on their GPUs and
        # have only a collective's time.
        longest = datetime.timedelta(seconds=Host.STARTS * startup_timeout_of(config) + _MEETING_S)
        self._starters = dist.new_group(backend="gloo", timeout=longest)
        store = own_connection(job_store())
        setting = setting._replace(api_key=self.api_key)
        self._host = together(lambda: self._own_host(nodes, addresses, parts, setting, store))

    def _own_host(
        self,
        nodes: ServerNodes | None,
        addresses: Mapping[int, str],
        parts: Mapping[int, tuple[list[str], int]],
        setting: ServerSetting,
        store: dist.Store,
    ) -> Host | ServerNodes | None:
        """The host of the servers that this rank starts, if any."""
        rank = dist.get_rank()
        if nodes is not None:
            nodes.prepare(self.names, setting)
            return nodes
        return host_of(self._config, *parts[rank], addresses[rank], setting, store) if rank in addresses else None

    def start(self, names: Sequence[str], must_stop: MustStop = never) -> dict[str, Started]:
        """Have their hosts start or restart these servers; a collective. Raises as `together`.

        Those that span nodes are started once more by all of these if another process had taken a port of theirs.
        """
        found: dict[str, Started] = {}
        for _ in range(Host.STARTS):
            found |= self._start_once(names, must_stop)
            names = [name for name in names if name in found and found[name].port_taken]
            if not names:
                break
        return found

    def _start_once(self, names: Sequence[str], must_stop: MustStop) -> dict[str, Started]:
        attempt = on_rank0(lambda: secrets.token_hex(8))
        host = self._host

        def start() -> dict[str, Started]:
            return host.start(names, must_stop, attempt) if host is not None else {}

        if self._config.dedicated_nodes:  # the wait for a node that hangs exceeds the timeout of a collective
            return on_rank0(start, long=True)
        group = self._starters
        own = together(start, group)
        found: list[dict[str, Started]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, own, group=group)
        return merged(found)

    def stop(self, names: Sequence[str] | None = None) -> None:
        """Stop those of these servers (None: all) that this rank has started. Not a collective."""
        if self._host is not None:
            self._host.stop(names)
