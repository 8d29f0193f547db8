"""Jobs for gang ranks that act as nodes, against their own servers."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import torch.distributed as dist

from etr_megatron.config import SglangConfig
from etr_megatron.rollout.sglang import ServerNode, ServerNodes, Serving, SglangEngine, shared_memory
from etr_megatron.rollout.sglang.job_servers import JobServers
from tests.hang import collectives_within
from tests.nodes import as_a_node_at
from tests.policy_jobs import build
from tests.sglang_jobs import behaving, engine_of, hanging, states_of, sums_of
from tests.warm_servers import start_warm


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Warnings of this package in this context."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("etr_megatron")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _segments() -> set[str]:
    """Shared memory segments that this process has made."""
    return {path.name for path in Path("/dev/shm").glob(f"torch_{os.getpid()}_*")}


def on_two_nodes(
    model: str,
    directory: str,
    address: str,
    syncs: int = 1,
    full: Sequence[int] = (),
    behaviours: Sequence[dict[str, Any]] = ({}, {}),
    hangs: str = "",
    cold: Sequence[int] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Two ranks that act as nodes: the servers' addresses and states, which servers have failed after each sync, and who could
    read the key. full: ranks whose machine has no shared memory left. behaviours: of each rank's servers. hangs: a server that
    hangs at the second bucket of the first sync. cold: ranks whose servers start by their command."""
    policy, rank = build(model, ["parallel.tp=2"]), dist.get_rank()
    with as_a_node_at(address), behaving(behaviours[rank]):
        engine = engine_of(policy, model, directory, probe_every=0, nodes="every", warm=rank not in cold, **settings)
    before = _segments()
    try:
        with pytest.MonkeyPatch.context() as patch, _warnings() as warnings:
            if rank in full:
                patch.setattr(shared_memory, "has_room", lambda nbytes: False)
            failed = []
            for version in range(1, syncs + 1):
                with hanging(engine, hangs if version == 1 else ""):
                    engine.update_weights(policy.export(), version)
                failed.append(engine._control.fleet.failed if engine._control is not None else {})
        found: dict[str, Any] = {"states": states_of(engine), "sums": sums_of(policy), "failed": failed, "warnings": warnings}
        found["segments"] = len(_segments() - before)
        found["largest_mib"] = -(-getattr(getattr(engine._sender, "_shared", None), "_largest", 0) // (1 << 20))
        if engine._control is not None:
            urls = [client.url for client in engine._control.fleet.clients]
            key = engine._control._http.headers.get("Authorization", "").removeprefix("Bearer ")
            found |= {"urls": urls, "keyless": [httpx.get(f"{url}/state").status_code for url in urls], "has_key": bool(key)}
            pids = [state["pid"] for state in found["states"].values()]
            lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
            files = [path for path in Path(directory).rglob("*") if path.is_file()]
            found["on_command_line"] = any(key and key in line for line in lines)
            found["readable"] = [path.name for path in files if path.stat().st_mode & 0o077 and key in path.read_text()]
        return found
    finally:
        dist.barrier()  # rank 0 reads the states of the other rank's servers first
        engine.close()


@contextmanager
def _start_within(collective_s: float) -> Iterator[None]:
    """While servers start, ranks other than rank 0 wait no longer than this in a collective."""
    start = JobServers.start

    def limited(*arguments: Any) -> Any:
        dist.barrier()
        with collectives_within(collective_s) if dist.get_rank() else nullcontext():
            return start(*arguments)

    with mock.patch.object(JobServers, "start", limited):
        yield


def beside_a_node_of_servers(model: str, directory: str, collective_s: float, **settings: Any) -> dict[str, Any]:
    """Two ranks, the first of which runs a node of servers in a thread; what these are sent. collective_s: the deadline of a
    collective while servers start."""
    policy = build(model, ["parallel.tp=2"])
    start_warm()
    config = SglangConfig(bucket_mib=1, update_timeout_s=60, probe_every=0, dedicated_nodes=1, **settings)
    serving = Serving(policy.arch, "float32", "gloo", (), Path(directory), temperature=1.0, max_gap=1.0)
    with ExitStack() as stack:
        nodes = None
        if dist.get_rank() == 0:
            stack.enter_context(as_a_node_at("127.0.0.1"))
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
            node = ServerNode(0, config, 0.0, patience_s=60.0, store=client)
            threading.Thread(target=node.serve, daemon=True).start()
            nodes = stack.enter_context(ServerNodes(1, config, store))
        with _start_within(collective_s):
            engine = SglangEngine(config, Path(model), serving, nodes)
        try:
            engine.update_weights(policy.export(), 1)
            return {"states": states_of(engine), "sums": sums_of(policy)}
        finally:
            engine.close()


def beside_a_slow_server(model: str, directory: str, collective_s: float, **settings: Any) -> dict[str, Any]:
    """Two ranks, the first of which starts a server; what this is sent. collective_s: a collective's deadline meanwhile."""
    policy = build(model, ["parallel.tp=2"])
    with _start_within(collective_s):
        engine = engine_of(policy, model, directory, probe_every=0, **settings)
    try:
        engine.update_weights(policy.export(), 1)
        return {"states": states_of(engine), "sums": sums_of(policy)}
    finally:
        dist.barrier()
        engine.close()
