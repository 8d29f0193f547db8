"""Weights in requests: by shared memory to servers on this machine, as text to others."""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import pickle
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang import node_buckets, shared_memory
from etr_megatron.rollout.sglang.delivery import Bucket, TensorDelivery, serialized
from etr_megatron.rollout.sglang.fleet import Fleet
from etr_megatron.rollout.sglang.shared_memory import SharedBuckets
from etr_megatron.weights import read_architecture
from tests import warm
from tests.fake_servers import impatient_with
from tests.runs import REPO, wait_for
from tests.test_sglang_fleet import TENSORS, fleet_of, has_all, state_of, sync


class SharedWith(TensorDelivery):
    """Shares buckets of this process with those of a fleet's near servers that still serve."""

    def __init__(self, near: Sequence[str], fleet: Fleet, workers: int, timeout_s: float = 120.0) -> None:
        super().__init__(fleet, workers=workers, timeout_s=timeout_s)
        self._near, self._fleet, self.buckets = near, fleet, SharedBuckets(workers)

    async def deliver(self, bucket: Bucket) -> None:
        names = [client.name for client in self._fleet.serving if client.name in self._near]
        await super().deliver(replace(bucket, handles=self.buckets.put(bucket.fields, bucket.flat, names)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("near", "workers"),
    [((), 1), (("server 0",), 3), (("server 0", "server 1", "server 2"), 2)],
    ids=["far", "mixed", "near"],
)
def test_tensors_in_requests_arrive_as_well(near, workers):
    """Servers on this machine get a shared segment, and requests smaller than the tensors; others get all bytes."""
    large, before = {"large.weight": torch.randn(130, 257), **TENSORS}, segments_of(os.getpid())

    async def body():
        async with fleet_of({}, {}, {}) as fleet:
            delivery = SharedWith(near, fleet, workers)
            for version in (1, 2):
                await sync(fleet, version, delivery, tensors=large)
            await delivery.close()
            return [await state_of(client) for client in fleet.clients], fleet.failed

    states, failed = asyncio.run(body())
    assert all(has_all(state, large) and state["version"] == "2" for state in states) and not failed
    for number, state in enumerate(states):
        assert (state["most_payload_bytes"] > 130 * 257 * 4) == (f"server {number}" not in near)
    assert segments_of(os.getpid()) <= before  # segments of earlier tests may have gone


@pytest.mark.slow
@pytest.mark.parametrize("what", ["die_at_bucket", "hang_at_bucket"])
def test_a_server_lost_with_a_handle_unread_does_not_cost_the_others_their_weights(what):
    """Bucket 5 is the second one of the second sync; a third sync has larger buckets."""

    async def body():
        async with fleet_of({}, {what: 5}, {}) as fleet:
            delivery = SharedWith(["server 0", "server 1", "server 2"], fleet, 2)
            with impatient_with(fleet.clients[1], 2.0):
                for version in (1, 2):
                    await sync(fleet, version, delivery)
            grown = {name: torch.cat([tensor] * 9) for name, tensor in TENSORS.items()}
            await sync(fleet, 3, delivery, tensors=grown)
            await delivery.close()
            return [await state_of(fleet.clients[i]) for i in (0, 2)], fleet.failed, grown

    states, failed, grown = asyncio.run(body())
    assert set(failed) == {"server 1"}
    assert all(has_all(state, grown) and state["version"] == "3" and not state["paused"] for state in states)


def test_a_segment_that_a_living_reader_has_open_keeps_its_bytes_after_its_owner_let_go():
    before = segments_of(os.getpid())
    memory, wanted = shared_memory.SharedMemory(), torch.arange(99, dtype=torch.uint8)
    handle = shared_memory.handles([("x", memory.put(wanted))])
    assert len(segments_of(os.getpid()) - before) == 1
    ((_, read),) = pickle.loads(base64.b64decode(handle))
    memory.put(torch.zeros(200, dtype=torch.uint8))  # larger, so a new segment replaces the old one
    assert torch.equal(read, wanted)
    del memory, read
    gc.collect()
    assert segments_of(os.getpid()) <= before  # segments of earlier tests may have gone


def test_a_buffer_that_knows_what_is_to_come_does_not_grow():
    memory = shared_memory.SharedMemory()
    first = memory.put(torch.ones(9, dtype=torch.uint8), largest=5000)
    assert memory.put(torch.ones(5000, dtype=torch.uint8), largest=5000).data_ptr() == first.data_ptr()


def test_threads_that_make_handles_do_not_take_the_names_of_segments_from_each_other():
    """torch's sharing strategy is per process: if it became file descriptors midway, no other process could open a segment."""
    before = torch.multiprocessing.get_sharing_strategy()
    view = shared_memory.SharedMemory().put(torch.arange(6, dtype=torch.uint8))
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(shared_memory.handles([("a", view)])), daemon=True)
    with shared_memory._by_name():
        other.start()
        other.join(0.3)
        assert not found and torch.multiprocessing.get_sharing_strategy() == "file_system"
    other.join(300)
    assert b"rebuild_storage_filename" in base64.b64decode(found[0])
    assert torch.multiprocessing.get_sharing_strategy() == before


def test_without_room_in_shared_memory_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(shared_memory, "has_room", lambda nbytes: False)
    with pytest.raises(OSError, match=r"^/dev/shm has no room for 3 MiB of weights$"):
        SharedBuckets(1).put([], torch.ones((2 << 20) + 1, dtype=torch.uint8), ["server 0"])


@pytest.mark.slow
def test_a_segment_goes_with_its_process_also_where_a_server_died_before_it_read_its_handle():
    code = (
        "import os, signal, torch; from etr_megatron.rollout.sglang.shared_memory import SharedMemory, handles\n"
        "memory = SharedMemory(); handles([('x', memory.put(torch.ones(99, dtype=torch.uint8)))])\n"
        "print(len([name for name in os.listdir('/dev/shm') if name.startswith(f'torch_{os.getpid()}_')]), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = warm.start([sys.executable, "-c", code], {**os.environ})
    assert process.communicate()[0] == "1\n"
    wait_for(lambda: not segments_of(process.pid), deadline_s=120.0)


@pytest.mark.slow
def test_the_process_that_manages_segments_holds_no_socket_of_ours():
    """If it did, the peers of a killed rank would not notice as long as a server has the segment open."""
    code = (
        "import socket, torch; from etr_megatron.rollout.sglang.shared_memory import SharedMemory\n"
        "ours, peer = socket.socketpair(); ours.set_inheritable(True)\n"
        "memory = SharedMemory(); memory.put(torch.ones(99, dtype=torch.uint8)); ours.close()\n"
        "peer.settimeout(300); print(peer.recv(1))"
    )
    assert warm.start([sys.executable, "-c", code], {**os.environ}).communicate()[0] == "b''\n"


def test_where_torch_makes_no_segment_there_is_a_sentence(monkeypatch):
    def fails(tensor):
        raise RuntimeError("no manager")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fails)
    with pytest.raises(OSError, match=r"^there is no shared memory for weights \(no manager\)$"):
        shared_memory.SharedMemory().put(torch.ones(9, dtype=torch.uint8))


def segments_of(process: int) -> set[str]:
    return {path.name for path in Path("/dev/shm").glob(f"torch_{process}_*")}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_tensors_as_bytes_are_read_again(dtype):
    flat = torch.arange(192, dtype=torch.int32).to(torch.uint8)
    tensor = flat[64:].view(dtype).view(-1, 4)
    ((name, found),) = pickle.loads(base64.b64decode(serialized([("a", tensor)])))
    assert name == "a" and found.dtype == dtype and found.shape == tensor.shape
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_a_machine_without_shared_memory_is_refused_for_weights_that_would_take_hours_as_text(monkeypatch, hf_models):
    asked = []
    monkeypatch.setattr(node_buckets, "has_room", asked.append)  # there is none
    large, small = (read_architecture(path) for path in (REPO / "configs/models/Qwen3-32B", hf_models["qwen3"]))
    with pytest.raises(UserError, match=r"/dev/shm of \S+ has no room for the 2\.9 GiB .* 61 GiB over HTTP would take hours"):
        node_buckets.require_room(large, torch.bfloat16, None, 512 << 20)
    assert asked == [2 * 151936 * 5120 * 2]  # the embedding, which is larger than a bucket
    node_buckets.require_room(small, torch.bfloat16, None, 512 << 20)
