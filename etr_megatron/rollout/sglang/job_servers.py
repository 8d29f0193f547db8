"""The servers of a job as seen by all its ranks: where they run, and how the ranks of their machines start and stop them."""

from __future__ import annotations

import datetime
import logging
import secrets
from collections.abc import Sequence

import torch.distributed as dist

from etr_megatron.config import SglangConfig, startup_timeout_of
from etr_megatron.platform.all_ranks import on_all_ranks
from etr_megatron.platform.job_store import job_store
from etr_megatron.rollout.engine import MustStop, never
from etr_megatron.rollout.rank0 import of_rank0, on_rank0
from etr_megatron.rollout.sglang.hosts import STARTS, Machine, Started
from etr_megatron.rollout.sglang.machines import ServerSetting, machine_of
from etr_megatron.rollout.sglang.parts import merged
from etr_megatron.rollout.sglang.places import addresses_of, new_key, own_address_of, parts_of
from etr_megatron.rollout.sglang.server_nodes import ServerNodes

logger = logging.getLogger(__name__)

_MEETING_S = 60.0
"""Seconds for ranks to reach the collective that follows the start of servers."""


class JobServers:
    """One object per rank. Servers are started by rank 0, by the first rank of every node or on dedicated nodes. Servers at
    `sglang.urls` already run; here they only get names."""

    names: list[str]
    """Names of all servers, in order."""
    api_key: str | None
    """API key of the servers that the job starts; None if they require none."""
    own_address: str
    """Address at which servers reach rank 0."""
    hosts: dict[int, list[str]]
    """Rank -> names of the servers that it starts, or of which it starts its machine's part, in the order of the machines."""

    def __init__(
        self, config: SglangConfig, setting: ServerSetting, nodes: ServerNodes | None = None, *, must_stop: MustStop = never
    ) -> None:
        """A collective; starts no server yet. setting: without an API key. nodes: on rank 0, if there are dedicated nodes.

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
        parts = dict(zip(addresses, parts_of(self.names, len(addresses), config), strict=True))
        self.hosts = {rank: own for rank, (own, _) in parts.items()}
        # A gloo group for the wait until servers have started. With NCCL, ranks would wait in GPU kernels, in competition with
        # servers on their GPUs, and only for the timeout of a collective.
        longest = datetime.timedelta(seconds=STARTS * startup_timeout_of(config) + _MEETING_S)
        self._starters = dist.new_group(backend="gloo", timeout=longest)
        store, setting = job_store(), setting._replace(api_key=self.api_key)
        self._nodes, rank = nodes, dist.get_rank()
        on_all_ranks(lambda: nodes.prepare(self.names, setting) if nodes is not None else None)
        self._machine: Machine | None = on_all_ranks(
            lambda: machine_of(config, *parts[rank], addresses[rank], setting, store) if rank in addresses else None
        )

    def start(self, names: Sequence[str], must_stop: MustStop = never) -> dict[str, Started]:
        """Have the servers' machines start or restart them. A collective; raises as `on_all_ranks`.

        A server that spans nodes is started again on all its nodes if another process had taken one of its ports.
        """
        found = self._start_once(names, must_stop)
        for attempt in range(2, STARTS + 1):
            again = [name for name, one in found.items() if one.port_taken]
            if again and dist.get_rank() == 0:
                what = f"start {attempt} of at most {STARTS}, as another process had taken a port"
                logger.warning("%s: %s (%s)", ", ".join(again), what, found[again[0]].problem)
            if again:
                found |= self._start_once(again, must_stop)
        if self._config.nodes_per_server > 1:  # a part may fail after others saw the server complete
            self.stop([name for name, one in found.items() if one.problem is not None])
        return found

    def _start_once(self, names: Sequence[str], must_stop: MustStop) -> dict[str, Started]:
        if self._config.dedicated_nodes:  # waiting for a node that hangs may exceed a collective's timeout
            return on_rank0(lambda: of_rank0(self._nodes).start(names, must_stop), long=True)
        attempt = on_rank0(lambda: secrets.token_hex(8))
        machine, group = self._machine, self._starters
        own = on_all_ranks(lambda: machine.start(names, must_stop, attempt) if machine is not None else {}, group)
        found: list[dict[str, Started]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, own, group=group)
        return merged(found)

    def stop(self, names: Sequence[str] | None = None) -> None:
        """Stop those of these servers (None: all) that this rank has started. Not a collective."""
        for own in (self._machine, self._nodes):
            if own is not None:
                own.stop(names)
