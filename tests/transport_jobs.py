"""Jobs that gang ranks run for the tests of the transports."""

from __future__ import annotations

import datetime
import resource
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from etr_megatron.weights import SafetensorsDir, ServerLayout, TrainingLayout, WeightLayout, read_architecture, read_shard
from etr_megatron.weights.layout import shards_of
from etr_megatron.weights.quantize import SCALE_SUFFIX, scale_shape
from etr_megatron.weights.reshard import ReshardPlan, make_reshard_plan
from etr_megatron.weights.transport import DiskWriter, ShardedTransport, SyncError, Wire, buckets, disk, exchange, server_loader
from etr_megatron.weights.transport.server_loader import Offer
from tests.hang import Hang
from tests.ports import rank_0s_port


def shards_from(model: str, placement: WeightLayout, rank: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A rank's shards by Megatron name, read from a checkpoint."""
    checkpoint, arch = SafetensorsDir(model), read_architecture(model)
    found = {}
    for weight, shard in shards_of(placement, arch, rank):
        values = read_shard(weight, shard, checkpoint.read)
        found[weight.megatron] = values.to(weight.type_in(dtype or values.dtype))
    return found


def empty_shards(plan: ReshardPlan, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Destination shards filled with a value that no weight has, so that unwritten elements show."""
    found = {}
    for weight, shard in shards_of(plan.destination, plan.arch, rank):
        block = plan.block_of(weight)
        found[weight.megatron] = torch.full(shard.shape, 77.0).to(
            weight.type_in(dtype) if block is None else torch.float8_e4m3fn
        )
        if block is not None:
            found[weight.megatron + SCALE_SUFFIX] = torch.full(scale_shape(shard.shape, block), 77.0)
    return found


def in_roles(plan: ReshardPlan, model: str, dtype: torch.dtype) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """(source shards, empty destination shards) of this rank, None if it does not have the role."""
    rank = dist.get_rank()
    place = rank - plan.destination_start
    sources = shards_from(model, plan.source, rank, dtype) if rank < plan.source.world else None
    return sources, empty_shards(plan, place, dtype) if 0 <= place < plan.destination.world else None


def plan_for(model: str, source: WeightLayout, destination: WeightLayout, dtype: torch.dtype, **options: Any) -> ReshardPlan:
    return make_reshard_plan(source, destination, read_architecture(model), itemsize=dtype.itemsize, **options)


def sharded(
    model: str,
    source: WeightLayout,
    destination: WeightLayout,
    *,
    dtype: torch.dtype = torch.float32,
    bucket_bytes: int = 64 << 20,
    syncs: int = 1,
    tiny_messages: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Bytes sent and destination shards after syncs with checksums, and bytes of one more without them.

    tiny_messages: such small buckets and messages that a small model is sent like a large one.
    """
    bounds = (buckets.ALONE_BYTES, exchange.MIN_BUCKET_BYTES)
    if tiny_messages:
        buckets.ALONE_BYTES, exchange.MIN_BUCKET_BYTES = 3000, 9000
    try:
        return _sharded(model, source, destination, dtype, 1 if tiny_messages else bucket_bytes, syncs, options)
    finally:
        buckets.ALONE_BYTES, exchange.MIN_BUCKET_BYTES = bounds


def _sharded(
    model: str,
    source: WeightLayout,
    destination: WeightLayout,
    dtype: torch.dtype,
    bucket_bytes: int,
    syncs: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    plan = plan_for(model, source, destination, dtype, **options)
    sources, destinations = in_roles(plan, model, dtype)
    wire = Wire.in_world(timeout_s=60)
    transport = ShardedTransport(plan, wire, dtype=dtype, bucket_bytes=bucket_bytes, checksums=True)
    for version in range(syncs):
        transport.sync(version + 5, sources, destinations)
    plain = Wire.in_world(timeout_s=60)
    ShardedTransport(plan, plain, dtype=dtype, bucket_bytes=bucket_bytes).sync(1, sources, destinations)
    return {"shards": picklable(destinations), "bytes": plain.bytes_sent, "version": transport.complete}


def from_policy(model: str, overrides: list[str], destination: WeightLayout) -> dict[str, Any]:
    """Destination shards, in a policy's processes, after a sync from its parameters."""
    from etr_megatron.policy.model import own_parameters
    from tests.policy_jobs import build

    policy = build(model, overrides)
    sources = {weight.megatron: parameter for weight, parameter in own_parameters(policy.chunks).values()}
    plan = plan_for(model, policy.layout.training, destination, torch.float32, destination_start=0)
    destinations = empty_shards(plan, dist.get_rank(), torch.float32)
    transport = ShardedTransport(plan, Wire.in_world(timeout_s=60), dtype=torch.float32, checksums=True)
    transport.sync(5, sources, destinations)
    return {"shards": destinations, "version": transport.complete}


class ToyServer:
    """A worker's model as seen by the loader: parameters under a server's names, shapes from the map and the layout."""

    def __init__(self, plan: ReshardPlan, rank: int, dtype: torch.dtype) -> None:
        found: dict[str, list[Tensor]] = {}
        by_name = {weight.megatron: weight for weight, _ in shards_of(plan.destination, plan.arch, rank)}
        for name, tensor in empty_shards(plan, rank, dtype).items():
            weight = by_name[name.removesuffix(SCALE_SUFFIX)]
            fused = weight.server + (SCALE_SUFFIX if name.endswith(SCALE_SUFFIX) else "")
            found.setdefault(fused, []).append(tensor[None] if weight.expert is not None else tensor)
        self._parameters = {name: torch.nn.Parameter(torch.cat(parts), requires_grad=False) for name, parts in found.items()}
        self.derived: dict[str, Tensor] = {}

    def named_parameters(self) -> Any:
        return self._parameters.items()

    def post_load_weights(self) -> None:
        """What SGLang computes from this one, and keeps, when it has loaded weights."""
        up = {name: tensor for name, tensor in self._parameters.items() if name.endswith("kv_b_proj.weight")}
        self.derived = {f"derived.{name}": tensor.float() + 1 for name, tensor in up.items()}

    def named_modules(self) -> Any:
        return ()


def store_of(offer: Offer) -> dist.TCPStore:
    """A training rank's; rank 0 opens it."""
    timeout = datetime.timedelta(seconds=offer.timeout_s)
    return dist.TCPStore(offer.address, offer.port, is_master=dist.get_rank() == 0, wait_for_workers=False, timeout=timeout)


def serve(
    model: str, source: TrainingLayout, destination: ServerLayout, fp8_block: int | None = None
) -> tuple[dict[str, Tensor] | None, list[int | None]]:
    """Parameters of toy workers and what these have derived, and the complete versions of their transports after each of two
    syncs through the loader."""
    with rank_0s_port() as port:
        rank, arch = dist.get_rank(), read_architecture(model)
        place = rank - source.world
        offer = Offer(
            11, "127.0.0.1", port, place, source, destination, arch, "float32", fp8_block, checksums=True, timeout_s=60
        )
        versions = []
        if place < 0:
            transport = offer.transport(store_of(offer), rank)
            for version in (11, 12):
                transport.sync(version, shards_from(model, source, rank))
            dist.barrier()  # the store lives as long as rank 0's transport: a worker may still be reading there
            return None, versions
        server = ToyServer(offer.plan(), place, torch.float32)
        server_loader._open.clear()
        for version in (11, 12):
            server_loader.receive(server, {server_loader.MESSAGE_NAME: replace(offer, version=version).message()})
            versions += [transport.complete for transport in server_loader._open.values()]
        dist.barrier()
        server_loader._open.clear()
        return picklable(dict(server.named_parameters()) | server.derived), versions


def recover(model: str, destination: ServerLayout, fault: str) -> tuple[dict[str, Tensor] | None, list[str]]:
    """A good sync, one in which training rank 0 fails, and a good one on another port: parameters and errors."""
    with rank_0s_port() as first, rank_0s_port() as second:
        rank, arch, source = dist.get_rank(), read_architecture(model), TrainingLayout()
        offers = [
            Offer(1, "127.0.0.1", port, rank - 1, source, destination, arch, "float32", checksums=True, timeout_s=60)
            for port in (first, second)
        ]
        if rank == 0:
            shards = shards_from(model, source, 0)
            transport = offers[0].transport(store_of(offers[0]), 0)
            transport.sync(1, shards)
            if fault == "middle":
                transport._transfer = lambda *_: (_ for _ in ()).throw(OSError("the device fell off"))
            with suppress(SyncError):
                transport.sync(2, shards if fault == "middle" else {})
            last = offers[1].transport(store_of(offers[1]), 0)
            last.sync(3, shards)
            dist.barrier()  # the store lives as long as `last`: a worker may still be reading there
            return None, []
        server, errors = ToyServer(offers[0].plan(), rank - 1, torch.float32), []
        server_loader._open.clear()
        for version, offer in ((1, offers[0]), (2, offers[0]), (3, offers[1])):
            try:
                server_loader.receive(server, {server_loader.MESSAGE_NAME: replace(offer, version=version).message()})
            except SyncError as error:
                errors.append(str(error))
        dist.barrier()
        server_loader._open.clear()
        return picklable(dict(server.named_parameters())), errors


def write_to_disk(directory: str, model: str, source: WeightLayout, versions: list[int], **options: Any) -> int | None:
    """Write versions one after the other; returns the complete version."""
    dtype = options.get("dtype", torch.float32)
    sources = shards_from(model, source, dist.get_rank(), dtype)
    wire = Wire.in_world(timeout_s=60)
    writer = DiskWriter(directory, source, read_architecture(model), wire, **{"dtype": dtype, **options})
    for version in versions:
        writer.sync(version, sources)
    return writer.complete


def fail_to_write(directory: str, model: str, source: WeightLayout, file: int, culprit: int) -> tuple[str, int]:
    """The error of a sync in which the disk is full when `culprit` saves this one of its files (-1: the last one), and how many
    files a rank has.
    """
    arch, wire = read_architecture(model), Wire.in_world(timeout_s=60)
    writer = DiskWriter(directory, source, arch, wire, dtype=torch.float32, file_bytes=20_000)
    save_file, saved, files = disk.save_file, 0, len(writer._own)

    def save(tensors: dict[str, Tensor], path: Any, **options: Any) -> None:
        nonlocal saved
        fails, saved = saved == file % files, saved + 1
        _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            if fails:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))  # EFBIG; a full disk gives ENOSPC
            save_file(tensors, path, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    if wire.rank == culprit:
        disk.save_file = save
    try:
        writer.sync(1, shards_from(model, source, wire.rank))
    except SyncError as error:
        return str(error), files
    finally:
        disk.save_file = save_file
    return "", files


def fail_while_it_is_published(directory: str, model: str, source: WeightLayout) -> str:
    """The error of a second sync in which rank 1 fails after all have written, and rank 0 is slow to publish."""
    writer = DiskWriter(directory, source, read_architecture(model), Wire.in_world(timeout_s=60), dtype=torch.float32)
    shards = shards_from(model, source, dist.get_rank())
    writer.sync(1, shards)
    barrier, sync_to_disk = writer.wire.board.barrier, disk.sync_to_disk

    def pass_and_fail(phase: str) -> None:
        barrier(phase)
        if phase == "written":
            raise OSError("rank 1 has had enough")

    def slowly(path: Any) -> None:
        time.sleep(0.2)
        sync_to_disk(path)

    if dist.get_rank() == 1:
        writer.wire.board.barrier = pass_and_fail
    else:
        disk.sync_to_disk = slowly
    try:
        writer.sync(2, shards)
    except SyncError as error:
        return str(error)
    finally:
        disk.sync_to_disk = sync_to_disk
    return ""


def picklable(shards: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Replace FP8 by its bytes: torch can pickle it only to a file."""
    if shards is None:
        return None
    return {name: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t.detach() for name, t in shards.items()}


def failing(model: str, source: WeightLayout, destination: WeightLayout, culprit: int, fault: str) -> dict[str, Any]:
    """Two good syncs, one that fails on rank `culprit`, a retry, and a good one on a new transport."""
    dtype = torch.float32
    plan = plan_for(model, source, destination, dtype)
    sources, destinations = in_roles(plan, model, dtype)
    transport = ShardedTransport(plan, Wire.in_world(timeout_s=60), dtype=dtype, checksums=True)
    for version in (1, 2):
        transport.sync(version, sources, destinations)
    dist.barrier()
    if fault in ("absent", "hang"):  # the short deadline is for the culprit: the others are here
        transport.wire.board.timeout_s = 3.0
    start = time.monotonic()
    rank, hang = dist.get_rank(), Hang()
    if rank == culprit:
        _FAULTS[fault](transport, sources, destinations, hang)
    found = {"errors": [], "before": 2, "complete": []}
    for _ in range(2):
        try:
            if not (rank == culprit and fault == "absent"):
                transport.sync(3, sources, destinations)
        except SyncError as error:
            found["errors"].append(str(error))
            if rank != culprit and len(found["errors"]) == 1:
                hang.given_up()
        found["complete"].append(transport.complete)
        found.setdefault("seconds", time.monotonic() - start)
    dist.barrier()
    fresh_sources, fresh_destinations = in_roles(plan, model, dtype)
    again = ShardedTransport(plan, Wire.in_world(timeout_s=60), dtype=dtype, checksums=True)
    again.sync(4, fresh_sources, fresh_destinations)
    return {**found, "after": again.complete}


def _absent(*_: Any) -> None:
    """This rank never joins the sync."""


def _wrong_shape(transport: ShardedTransport, sources: Any, destinations: Any, _hang: Hang) -> None:
    shards = sources or destinations
    shards["decoder.final_layernorm.weight"] = torch.zeros(47)


def _hang(transport: ShardedTransport, _sources: Any, _destinations: Any, hang: Hang) -> None:
    """This rank joins, then blocks until all others have given up."""
    transport._transfer = hang


def _raise(transport: ShardedTransport, *_: Any) -> None:
    def transfer(*_: Any) -> None:
        raise OSError("the device fell off")

    transport._transfer = transfer


def _lose_connection(transport: ShardedTransport, _sources: Any, _destinations: Any, hang: Hang) -> None:
    def transfer(*_: Any) -> None:
        transport.wire.close()
        hang()

    transport._transfer = transfer


def _flip(transport: ShardedTransport, sources: Any, destinations: Any, _hang: Hang) -> None:
    """Flip one bit of what was received, at a place that the test knows."""
    run = transport._exchange.run

    def corrupt(*shards: Any) -> None:
        run(*shards)
        values = destinations["decoder.layers.2.mlp.linear_fc2.weight"]
        values.view(torch.uint8)[7, 33] ^= 4

    transport._exchange.run = corrupt


_FAULTS = {
    "absent": _absent,
    "wrong_shape": _wrong_shape,
    "hang": _hang,
    "raise": _raise,
    "lose_connection": _lose_connection,
    "flip": _flip,
}
