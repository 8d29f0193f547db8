"""A stand-in for NCCL on machines without GPUs: gloo with NCCL's additional restrictions."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from etr_megatron.weights.transport import SyncError, Wire, wire
from tests.hang import Hang
from tests.ports import rank_0s_port

_NEVER = datetime.timedelta(hours=1)


class Launch:
    """Asynchronous work that cannot be waited for with a deadline, like NCCL's."""

    def __init__(self, posts: Sequence[Callable[[], Any]]) -> None:
        works = [post() for post in posts]
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(works,), daemon=True)
        self._thread.start()

    def _run(self, works: Sequence[Any]) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self._error = error

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, _timeout: datetime.timedelta) -> None:
        """NCCL's returns at once; only the GPU's stream waits. So the work must have been completed before."""
        if self._thread.is_alive():
            raise AssertionError("values are used before they are there")
        if self._error is not None:
            raise self._error


class NcclLike:
    """The part of `ProcessGroupNCCL` that `Wire` uses.

    Ranks connect at their first operation, in which all of them must take part (see `torch.distributed.batch_isend_irecv`);
    messages are launched in batches. aborted: how many groups of this process were.
    """

    aborted = 0

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: datetime.timedelta) -> None:
        self._connecting = dist.ProcessGroupGloo(dist.PrefixStore("connect", store), rank, world, _NEVER)
        self._group = dist.ProcessGroupGloo(dist.PrefixStore("messages", store), rank, world, timeout)
        self._posts: list[Callable[[], Any]] | None = None
        self._store, self._rank = store, rank

    def _connect(self) -> None:
        if self._connecting is not None:
            if self._rank == 0:  # others wait in the store for the address of its connection
                self._store.set("id", "0")
            self._store.get("id")
            self._connecting.barrier().wait()
            self._connecting = None

    def allreduce(self, tensors: list[torch.Tensor]) -> Launch:
        self._connect()
        return Launch([lambda: self._group.allreduce(tensors)])

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions) -> Launch:
        self._connect()
        return Launch([lambda: self._group.broadcast(tensors, options)])

    def _start_coalescing(self) -> None:
        self._posts = []

    def send(self, tensors: list[torch.Tensor], other: int, tag: int) -> None:
        self._connect()
        self._posts.append(partial(self._group.send, tensors, other, tag))

    def recv(self, tensors: list[torch.Tensor], other: int, tag: int) -> None:
        self._connect()
        self._posts.append(partial(self._group.recv, tensors, other, tag))

    def _end_coalescing(self) -> Launch:
        posts, self._posts = self._posts, None
        return Launch(posts)

    def abort(self) -> None:
        """Only counted: connections end with the object, as gloo's do."""
        NcclLike.aborted += 1


def run(job: str, **arguments: Any) -> Any:
    """Run a job, `module:function` of tests, whose wires use this in place of NCCL, with tensors on the CPU."""

    def open_group(backend: str, store: dist.Store, rank: int, world: int, timeout_s: float) -> NcclLike:
        assert backend == "nccl"
        return NcclLike(store, rank, world, datetime.timedelta(seconds=timeout_s))

    in_world = partial(Wire.in_world, backend="nccl")
    with (
        mock.patch.object(wire, "_open_group", open_group),
        mock.patch.object(wire, "_device_of", lambda backend: torch.device("cpu")),
        mock.patch.object(Wire, "in_world", in_world),
    ):
        module, _, function = job.partition(":")
        return getattr(import_module(f"tests.{module}"), function)(**arguments)


def one_does_not_connect(culprit: int) -> tuple[str, float, int]:
    """The error of every rank but the culprit, which hangs where NCCL connects; the seconds until the error; and how many
    groups the rank has aborted."""
    NcclLike.aborted = 0
    hang, rank = Hang(), dist.get_rank()
    is_culprit = rank == culprit
    with rank_0s_port() as port:
        # As in a job; of this kind, a connection that waits in one thread keeps others waiting, too.
        store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=datetime.timedelta(seconds=60))
    launch = Wire._launch

    def launch_together(self: Wire, post: Callable[[], Any]) -> Any:
        dist.barrier()
        self.board._patience, self.board._deadline = 5.0, time.monotonic() + 5.0  # for the culprit: the others are here
        return hang() if is_culprit else launch(self, post)

    start = time.monotonic()
    try:
        with mock.patch.multiple(Wire, _launch=launch_together, **({"_finish": lambda *_: None} if is_culprit else {})):
            Wire(store, rank, dist.get_world_size(), backend="nccl", timeout_s=60)
        found = "", 0.0, 0
    except SyncError as error:
        if not is_culprit:
            hang.given_up()
        found = str(error), time.monotonic() - start, NcclLike.aborted
    dist.barrier()  # the culprit, too, has looked at rank 0's store
    return found
