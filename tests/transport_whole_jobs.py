"""Jobs that gang ranks run for the tests of whole tensors, as servers are sent them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from etr_megatron.rollout.sglang.delivery import Bucket
from etr_megatron.rollout.sglang.node_buckets import NodeBuckets
from etr_megatron.rollout.sglang.senders import SendQueue, SendSettings, WholeTensors
from etr_megatron.weights import TrainingLayout, read_architecture
from tests.transport_jobs import picklable, shards_from


def whole(
    model: str,
    source: TrainingLayout,
    *,
    dtype: torch.dtype = torch.float32,
    fp8_block: int | None = None,
    bucket_bytes: int = 50_000,
    backend: str = "gloo",
) -> dict[str, Any]:
    """Whole tensors that rank 0 has handed over for servers in the second of two syncs, the names in its buckets, the bytes
    that this rank has sent in both, and the bytes of its buffers: the most at a delivery, and those kept after a sync."""
    found: dict[str, Tensor] = {}
    names: list[list[str]] = []
    held: list[int] = []

    def buffers() -> int:
        return sum(buffer.nbytes for buffer in transport._memory._buffers.values())

    def post(bucket: Bucket) -> Future[None]:
        found.update({field.name: field.view(bucket.flat).clone() for field in bucket.fields})
        names.append(bucket.names)
        held.append(buffers())
        return delivered()

    settings = SendSettings(read_architecture(model), dtype, fp8_block, bucket_bytes, backend, 60.0)
    transport = whole_tensors(source, settings, post)
    for version in (4, 5):
        found.clear()
        names.clear()
        transport.sync(version, shards_from(model, source, dist.get_rank(), dtype))
    memory = max(held, default=0), buffers()
    transport.close()
    sent = transport.wire.bytes_sent
    return {"tensors": picklable(found), "names": names, "bytes": sent, "version": transport.complete, "memory": memory}


def delivered(_bucket: Bucket | None = None) -> Future[None]:
    """A delivery that is over at once."""
    done: Future[None] = Future()
    done.set_result(None)
    return done


def whole_tensors(source: TrainingLayout, settings: SendSettings, post: Callable[[Bucket], Future[None]]) -> WholeTensors:
    """The transport of whole tensors to servers, of which rank 0 hands buckets to `post`."""
    return WholeTensors(source, settings, SendQueue(post) if dist.get_rank() == 0 else None, NodeBuckets({}, 1, 1))
