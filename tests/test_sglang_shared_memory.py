"""Weights in requests: by shared memory to servers of this machine, as text to others."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from etr_megatron.rollout.sglang import shared_memory
from etr_megatron.rollout.sglang.delivery import TensorDelivery
from tests.runs import REPO, wait_for
from tests.test_sglang_fleet import TENSORS, fleet_of, has_all, state_of, sync


@pytest.mark.parametrize(
    ("near", "workers"),
    [((), 1), (("server 0",), 3), (("server 0", "server 1", "server 2"), 2)],
    ids=["far", "mixed", "near"],
)
def test_tensors_in_requests_arrive_as_well(near, workers):
    """From a shared segment at servers of this machine, which are sent less than the tensors' bytes, and at others whole."""
    large = {"large.weight": torch.randn(130, 257), **TENSORS}

    async def body():
        async with fleet_of({}, {}, {}) as fleet:
            delivery = TensorDelivery(fleet, workers=workers, timeout_s=20.0, near=near)
            for version in (1, 2):
                await sync(fleet, version, delivery, tensors=large)
            return [await state_of(client) for client in fleet.clients], fleet.failed

    states, failed = asyncio.run(body())
    assert all(has_all(state, large) and state["version"] == "2" for state in states) and not failed
    for number, state in enumerate(states):
        assert (state["most_payload_bytes"] > 130 * 257 * 4) == (f"server {number}" not in near)
    assert not segments_of(os.getpid())


def test_without_room_in_shared_memory_servers_nearby_get_bytes_too(monkeypatch, caplog):
    monkeypatch.setattr(shared_memory, "has_room", lambda nbytes: False)

    async def body():
        async with fleet_of({}) as fleet:
            await sync(fleet, 2, TensorDelivery(fleet, workers=1, timeout_s=20.0, near=["server 0"]))
            return await state_of(fleet.clients[0])

    assert has_all(asyncio.run(body()))
    assert [record.message for record in caplog.records if "/dev/shm" in record.message] == [
        "/dev/shm has no room for 0 MiB of weights; they go to servers by HTTP"
    ]


@pytest.mark.slow
def test_a_segment_goes_with_its_process_also_where_a_server_died_before_it_read_its_handle():
    code = (
        "import os, signal, torch; from etr_megatron.rollout.sglang.shared_memory import SharedMemory, handles\n"
        "memory = SharedMemory(); handles([('x', memory.put(torch.ones(99, dtype=torch.uint8)))])\n"
        "print(len([name for name in os.listdir('/dev/shm') if name.startswith(f'torch_{os.getpid()}_')]), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPO)
    assert process.communicate()[0] == "1\n"
    wait_for(lambda: not segments_of(process.pid), deadline_s=20.0)


@pytest.mark.slow
def test_the_process_that_manages_segments_holds_no_socket_of_ours():
    """Or the peers of a rank that is killed would not hear of it as long as a server has the segment open."""
    code = (
        "import socket, torch; from etr_megatron.rollout.sglang.shared_memory import SharedMemory\n"
        "ours, peer = socket.socketpair(); ours.set_inheritable(True)\n"
        "memory = SharedMemory(); memory.put(torch.ones(99, dtype=torch.uint8)); ours.close()\n"
        "peer.settimeout(5); print(peer.recv(1))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO).stdout == "b''\n"


def test_where_torch_makes_no_segment_servers_get_bytes(monkeypatch):
    def fails(tensor):
        raise RuntimeError("no manager")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fails)
    memory = shared_memory.SharedMemory()
    assert memory.put(torch.ones(9, dtype=torch.uint8)) is None and "no manager" in memory.unavailable


def segments_of(process: int) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"torch_{process}_*")]
