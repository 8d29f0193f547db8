"""The part of a weight sync in which all ranks take part: sends the policy's shards to the servers, as `sglang.sync` says."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from etr_megatron.rollout.engine import WeightSource
from etr_megatron.rollout.rank0 import of_rank0, on_rank0
from etr_megatron.rollout.sglang.delivery import Bucket
from etr_megatron.rollout.sglang.node_buckets import NodeBuckets
from etr_megatron.weights import Architecture, TrainingLayout, Weight, weights_of
from etr_megatron.weights.transport import DiskWriter, Shards, Transport, Wire, version_directory
from etr_megatron.weights.transport.whole import Gather, weight_groups

T = TypeVar("T")


def at_servers(body: Callable[[], T]) -> T:
    """Run `body`, rank 0's requests to the servers; return its result, or raise its exception, on every rank. A collective.

    The other ranks wait as in `on_rank0` with `long`, because the timeouts of the requests may add up to more than a
    collective's timeout. The requests must time out first: only their errors name the server.
    """
    return on_rank0(body, long=True)


class Sender(Protocol):
    """One object per rank. `send` is a collective, within a transaction."""

    def send(self, weights: WeightSource, version: int) -> None:
        """Send a version to the serving servers. A server that does not get all of it is marked failed.

        Raises on every rank: EngineGoneError when no server is left, SyncError naming ranks that are missing or failed.
        """
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


@dataclass(frozen=True)
class SendSettings:
    """Settings of all senders. dtype: of tensors sent unquantised. backend: `gloo` or `nccl`. timeout_s: of every wait.

    checksums: compare the received tensors with their source; only `sharded` does.
    """

    arch: Architecture
    dtype: torch.dtype
    fp8_block: int | None
    bucket_bytes: int
    backend: str
    timeout_s: float
    checksums: bool = False

    def wire(self) -> Wire:
        """A wire between all ranks; a collective."""
        return Wire.in_world(backend=self.backend, timeout_s=self.timeout_s)


class SendQueue:
    """Passes buckets to the event loop's thread, one at a time. The next bucket is gathered while one is sent.

    post: starts to deliver a bucket. Only `flush` raises errors, because gathering is a collective, which has to go on.
    """

    def __init__(self, post: Callable[[Bucket], Future[None]]) -> None:
        self._post = post
        self._travelling: Future[None] | None = None
        self._error: BaseException | None = None

    def put(self, bucket: Bucket) -> None:
        """Wait until the previous bucket is delivered, then start to deliver this one. After a failure it is dropped."""
        self._wait()
        if self._error is None:
            self._travelling = self._post(bucket)

    def flush(self) -> None:
        """Wait for the last bucket. Raises the error of a delivery since the last call."""
        self._wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _wait(self) -> None:
        if self._travelling is not None:
            self._error = self._travelling.exception()
            self._travelling = None


_PATIENCE = 3.0
"""Ranks wait this multiple of the timeout for rank 0 before a bucket: rank 0 may have to wait for a server that hangs, find
out which one it is, and go on with the others."""


class WholeTensors(Transport):
    """Gathers HF tensors bucket by bucket on rank 0, which puts them into `queue`. On other ranks `queue` is None.

    shared: puts buckets into the shared memory of the servers' machines.
    """

    def __init__(self, source: TrainingLayout, settings: SendSettings, queue: SendQueue | None, shared: NodeBuckets) -> None:
        arch, dtype, limit = settings.arch, settings.dtype, settings.bucket_bytes
        super().__init__(settings.wire(), arch, source)
        self._queue, self._shared, self._longest_wait_s = queue, shared, _PATIENCE * settings.timeout_s
        self._groups = weight_groups(weights_of(arch), dtype, settings.fp8_block, limit)
        shared.open(self.wire, max(group.nbytes for group in self._groups))
        together = [[group] for group in self._groups]
        self._gather = Gather(source, arch, _rank0, together, self.wire, self._memory, dtype=dtype, bucket_bytes=limit)

    def _transfer(self, version: int, sources: Shards, destinations: Shards) -> None:
        for number, group in enumerate(self._groups):
            self._follow(f"bucket {number}")
            if self._queue is None:
                self._gather.run(number, sources, None)
                self._shared.share(group.tensors, group.nbytes, None)
                continue
            flat = torch.empty(group.nbytes, dtype=torch.uint8, device=self.wire.device)
            self._gather.run(number, sources, (group, flat))
            if flat.is_cuda:
                torch.cuda.synchronize()  # another thread sends it
            # Servers may still read the previous bucket, but not the one before it: the last `put` waited for that.
            self._queue.put(Bucket(group.tensors, flat, self._shared.share(group.tensors, group.nbytes, flat)))
        self._follow("last bucket's delivery")

    def _follow(self, phase: str) -> None:
        """Wait until rank 0 has reached this phase. A rank that holds no part of the buckets would otherwise run ahead, and
        wait for all of them at the end."""
        self.wire.board.follow_rank0(phase, self._longest_wait_s)

    def close(self) -> None:
        """See `Transport.close`."""
        self._shared.leave()
        super().close()


def _rank0(_weight: Weight) -> int:
    return 0


class WholeSender:
    """`broadcast` and `tensor`. See `Sender`.

    queue, serving (names of the servers that take part): on rank 0 only. shared: for `tensor` with the job's own servers.
    """

    def __init__(
        self,
        settings: SendSettings,
        queue: SendQueue | None,
        serving: Callable[[], Sequence[str]] | None,
        shared: NodeBuckets,
    ) -> None:
        self._settings, self._queue, self._serving, self._shared = settings, queue, serving, shared
        self._tensors: WholeTensors | None = None

    def send(self, weights: WeightSource, version: int) -> None:
        """See `Sender.send`."""
        self._shared.serving = at_servers(lambda: of_rank0(self._serving)())
        if self._tensors is None:
            self._tensors = WholeTensors(weights.layout, self._settings, self._queue, self._shared)
        try:
            self._tensors.sync(version, weights.shards())
        except BaseException:
            self._leave()
            if self._queue is not None:
                with suppress(Exception):  # the first error is the one to raise
                    self._queue.flush()
            raise
        at_servers(lambda: of_rank0(self._queue).flush())

    def _leave(self) -> None:
        if self._tensors is not None:
            self._tensors.close()
            self._tensors = None

    def close(self) -> None:
        """See `Sender.close`."""
        self._leave()
        self._shared.close()


class DiskSender:
    """`disk`. See `Sender`. directory: visible to all ranks and servers. load: on rank 0, has all serving servers load a
    version's directory."""

    def __init__(self, settings: SendSettings, directory: Path, load: Callable[[Path], None] | None) -> None:
        self._settings, self._directory, self._load = settings, directory, load
        # Rank 0's id is written. A killed run may have left versions newer than those of the run that resumes from its
        # checkpoint. Without this id they would be kept, and those of the resumed run dropped.
        self._run = uuid.uuid4().hex
        self._writer: DiskWriter | None = None

    def send(self, weights: WeightSource, version: int) -> None:
        """See `Sender.send`."""
        settings = self._settings
        if self._writer is None:
            self._writer = DiskWriter(
                self._directory,
                weights.layout,
                settings.arch,
                settings.wire(),
                run=self._run,
                dtype=settings.dtype,
                fp8_block=settings.fp8_block,
            )
        try:
            self._writer.sync(version, weights.shards())
        except BaseException:
            self.close()
            raise
        at_servers(lambda: of_rank0(self._load)(version_directory(self._directory, version)))

    def close(self) -> None:
        """See `Sender.close`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
