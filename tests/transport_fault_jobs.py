"""Jobs for tests of syncs that fail midway, when some of the weights have arrived and others have not.

Also a program, `python -m tests.transport_fault_jobs INIT_METHOD RANK WORLD JSON`, for faults that a gang does not survive.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from etr_megatron.rollout.sglang.senders import SendSettings
from etr_megatron.weights import ServerLayout, TrainingLayout, make_reshard_plan, read_architecture
from etr_megatron.weights.transport import DiskWriter, ShardedTransport, SyncError, Transport, Wire, buckets, disk, exchange
from tests.hang import Hang
from tests.transport_jobs import empty_shards, shards_from
from tests.transport_whole_jobs import delivered, whole_tensors

SPOILT = "decoder.layers.2.mlp.linear_fc2.weight"
"""A weight in the middle of the model, held by every rank."""


def _raise() -> None:
    raise OSError("the device fell off")


FAULTS: dict[str, Callable[[], None]] = {
    "raise": _raise,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


class Spoilt(dict):
    """Shards one of which triggers a fault when the transfer reaches it."""

    fault: Callable[[], None] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == SPOILT and self.fault is not None and "check_shards" not in _callers():
            self.fault()
        return super().__getitem__(name)


def _callers() -> set[str]:
    frame, found = sys._getframe(), set()
    while frame is not None:
        found.add(frame.f_code.co_name)
        frame = frame.f_back
    return found


def _transport(kind: str, source: TrainingLayout, destination: ServerLayout, model: str, directory: str) -> Transport:
    arch, options = read_architecture(model), dict(dtype=torch.float32)
    if kind == "whole":
        return whole_tensors(source, SendSettings(arch, torch.float32, None, 20_000, "gloo", 60.0), delivered)
    wire = Wire.in_world(timeout_s=60)
    if kind == "sharded":
        return ShardedTransport(make_reshard_plan(source, destination, arch, itemsize=4), wire, bucket_bytes=1, **options)
    return DiskWriter(directory, source, arch, wire, file_bytes=20_000, **options)


def midway(
    kind: str, model: str, tp: int, servers: int, culprit: int, fault: str, directory: str = "", timeout_s: float = 60.0
) -> dict[str, Any]:
    """A good sync of version 2 and one of version 3 in which `culprit` has the fault; returns the outcome on this rank.

    servers: 0 for a writer to disk and for whole tensors. The fault strikes where a source reads its shard, or where a
    destination writes it.
    """
    bounds = (buckets.ALONE_BYTES, exchange.MIN_BUCKET_BYTES)
    buckets.ALONE_BYTES, exchange.MIN_BUCKET_BYTES = 3000, 9000  # many rounds of a small model
    try:
        return _midway(kind, model, tp, servers, culprit, fault, directory, timeout_s)
    finally:
        buckets.ALONE_BYTES, exchange.MIN_BUCKET_BYTES = bounds
        disk.save_file = save_file


def _save_slowly(*arguments: Any, **options: Any) -> None:
    time.sleep(0.3)
    save_file(*arguments, **options)


def _midway(
    kind: str, model: str, tp: int, servers: int, culprit: int, fault: str, directory: str, timeout_s: float
) -> dict[str, Any]:
    source, destination, rank = TrainingLayout(tp=tp), ServerLayout(servers=max(1, servers)), dist.get_rank()
    transport = _transport(kind, source, destination, model, directory)
    sources = Spoilt(shards_from(model, source, rank)) if rank < tp else None
    plan = make_reshard_plan(source, destination, read_architecture(model))
    destinations = Spoilt(empty_shards(plan, rank - tp, torch.float32)) if rank >= tp else None
    transport.sync(2, sources, destinations)
    dist.barrier()
    transport.wire.board.timeout_s = timeout_s  # not before, as a busy machine may be slow
    if kind == "disk" and fault == "raise" and rank != culprit:
        disk.save_file = _save_slowly  # so that a file is being written when the culprit fails
    hang = Hang()
    if rank == culprit:
        (sources if sources is not None else destinations).fault = hang if fault == "hang" else FAULTS[fault]
    start, error = time.monotonic(), ""
    try:
        transport.sync(3, sources, destinations)
    except SyncError as failed:
        error = str(failed)
        if fault == "hang" and rank != culprit:
            hang.given_up()
    return {"error": error, "seconds": time.monotonic() - start, "complete": transport.complete}


if __name__ == "__main__":
    from etr_megatron.platform.lifetime import die_with_parent

    die_with_parent()
    store, number, world, arguments = sys.argv[1:]
    dist.init_process_group("gloo", init_method=store, rank=int(number), world_size=int(world))
    print(json.dumps(midway(**json.loads(arguments))), flush=True)
    os._exit(0)
