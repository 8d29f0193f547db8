"""Puts the buckets of a weight sync into the shared memory of every machine that runs servers of the job."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang.shared_memory import FILES, SEGMENTS, SharedBuckets, has_room
from etr_megatron.weights import Architecture, weights_of
from etr_megatron.weights.transport.whole import Field, weight_groups
from etr_megatron.weights.transport.wire import Subgroup, Wire

logger = logging.getLogger(__name__)

_MAX_AS_TEXT = 4 << 30
"""Most bytes of weights that may be sent to servers as text. A server reads text at about 30 MB/s, once for each worker."""


def require_room(arch: Architecture, dtype: torch.dtype, fp8_block: int | None, bucket_bytes: int) -> None:
    """Raise UserError if this machine has no shared memory for the buckets, and the model is too large to be sent as text."""
    sizes = [group.nbytes for group in weight_groups(weights_of(arch), dtype, fp8_block, bucket_bytes)]
    needed, total = SEGMENTS * max(sizes), sum(sizes)
    if total > _MAX_AS_TEXT and not has_room(needed):
        raise UserError(
            f"sglang.sync: {FILES} of {socket.gethostname()} has no room for the {needed / 2**30:.1f} GiB of buffers that "
            f"tensor needs, and sending {total / 2**30:.0f} GiB over HTTP would take hours; start the container with "
            "--ipc host (or a larger --shm-size), or set sglang.sync=disk"
        )


class NodeBuckets:
    """Sends buckets from rank 0 to the ranks that started servers; these reply with handles for their servers. One per rank.

    Segments are reused from sync to sync, even when the wire is replaced. hosts: rank -> names of the servers on its machine,
    in the order of the machines that a server spans, the same on all ranks; if empty, nothing is shared. here: workers of a
    server on each of its machines. workers: those on all its machines.
    """

    def __init__(self, hosts: Mapping[int, Sequence[str]], here: int, workers: int) -> None:
        self._hosts, self._buckets, self._workers = hosts, SharedBuckets(here), workers
        self._part = Subgroup((), None)
        self._wire: Wire | None = None
        self._largest = 0
        self._warned: set[int] = set()
        self.serving: Collection[str] = ()
        """Servers that take part in the sync, the same on all ranks. Other servers get no handles, because a handle that is not
        read keeps its segment. (This happens to servers that span machines if one of the machines has no room.)"""

    def open(self, wire: Wire, largest: int) -> None:
        """Connect the hosts; a collective of the wire. largest: bytes of the largest bucket. Raises SyncError."""
        self._wire, self._largest = wire, largest
        if self._hosts:
            self._part = wire.subgroup([0, *(rank for rank in self._hosts if rank != 0)])

    def leave(self) -> None:
        """Drop the wire."""
        self._wire, self._part = None, Subgroup((), None)

    def close(self) -> None:
        """Release the segments."""
        self._buckets.close()

    def share(self, fields: Sequence[Field], nbytes: int, flat: Tensor | None) -> dict[str, list[str]]:
        """On rank 0, server -> handles for its workers to the bucket `flat` (uint8 [nbytes], None on other ranks).

        Servers must have answered the bucket before the previous one. The servers of a machine without room get no handles, and
        a warning is logged once. Raises SyncError.
        """
        wire = self._wire
        if wire is None or self._part.group is None:
            return {}
        if flat is None:
            flat = torch.empty(nbytes, dtype=torch.uint8, device=wire.device)
        wire.wait(wire.broadcast(flat, self._part))
        own = self._put(wire, fields, flat)
        others = self._part.ranks[1:]
        if wire.rank != 0:
            self._tell(wire, own)
            return {}
        found: dict[str, list[str]] = {}
        for rank, (handles, problem) in {0: own, **self._hear(wire, others)}.items():
            for name, some in handles.items():
                found[name] = [*found.get(name, ()), *some]
            if problem and rank not in self._warned:
                self._warned.add(rank)
                logger.warning("rank %d: %s; they are sent to its servers over HTTP", rank, problem)
        return {name: handles for name, handles in found.items() if len(handles) == self._workers}

    def _put(self, wire: Wire, fields: Sequence[Field], flat: Tensor) -> tuple[dict[str, list[str]], str]:
        """Server -> handles, for the servers of this machine; and the problem that prevents it, "" if there is none."""
        names = [name for name in self._hosts.get(wire.rank, ()) if name in self.serving]
        try:
            return (self._buckets.put(fields, flat, names, self._largest) if names else {}), ""
        except OSError as error:
            return {}, str(error)

    def _tell(self, wire: Wire, own: tuple[dict[str, list[str]], str]) -> None:
        """Send this rank's result of `_put` to rank 0."""
        text = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8).to(wire.device)
        for part in (torch.tensor([len(text)], device=wire.device), text):
            wire.wait(wire.exchange([(part, 0)], []))

    def _hear(self, wire: Wire, ranks: Sequence[int]) -> dict[int, tuple[dict[str, list[str]], str]]:
        """Receive the results that these ranks send with `_tell`."""
        sizes = [torch.empty(1, dtype=torch.int64, device=wire.device) for _ in ranks]
        wire.wait(wire.exchange([], list(zip(sizes, ranks, strict=True))))
        texts = [torch.empty(int(size), dtype=torch.uint8, device=wire.device) for size in sizes]
        wire.wait(wire.exchange([], list(zip(texts, ranks, strict=True))))
        return {rank: tuple(json.loads(bytes(text.tolist()))) for rank, text in zip(ranks, texts, strict=True)}
