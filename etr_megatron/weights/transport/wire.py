"""Point-to-point messages and broadcasts over the sync's own process group, with deadlines and a count of the bytes sent."""

from __future__ import annotations

import datetime
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from etr_megatron.platform.job_store import job_store, own_connection
from etr_megatron.platform.nccl import outliving_failures
from etr_megatron.weights.transport.board import Board, SyncError

Message = tuple[Tensor, int]
"""A flat contiguous tensor and the other rank."""


class Subgroup(NamedTuple):
    """A subset of a wire's ranks. group: their process group; None on ranks outside the subset."""

    ranks: tuple[int, ...]
    group: Any


_names = itertools.count()

_LOOKS = 256
"""Polls of an NCCL message per poll of the board."""

_POLL_S = 0.05
"""Interval of polls of the board while NCCL connects."""


class Wire:
    """Ranks 0 .. world - 1 of a weight sync, over gloo or NCCL. Creating one is a collective of all of them.

    device: where the tensors of messages must be. bytes_sent: by this rank to others. timeout_s: see `Board`. A tensor that
    was given to `exchange` or `broadcast` belongs to the wire until `wait` returns.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, *, backend: str = "gloo", timeout_s: float = 600.0) -> None:
        self.rank, self.world, self.bytes_sent = rank, world, 0
        self.device = _device_of(backend)
        self.board = Board(dist.PrefixStore("board", store), rank, world, timeout_s)
        self.board.barrier("begin")
        self._backend, self._store = backend, store
        self._subgroups: list[Any] = []
        self._group = self._open("group", rank, world)
        # A rank that gives up right after it has connected would break connections that others are still making. They would
        # report a broken connection instead of the rank and its reason.
        self.board.barrier("connection")

    def _open(self, name: str, rank: int, world: int) -> Any:
        """A process group whose ranks are connected. Raises SyncError when the others do not connect."""
        # NCCL waits on the store for rank 0, in its own thread. On a shared connection, this thread could not use the board.
        store = own_connection(self._store) if self._backend == "nccl" else self._store
        group = None
        try:
            group = _open_group(self._backend, dist.PrefixStore(name, store), rank, world, self.board.timeout_s)
            if self._backend == "nccl":
                # NCCL connects at the first message, and all ranks must take part in it; a bucket may concern only some ranks.
                first = [torch.zeros(1, device=self.device)]
                self._finish(self._launch(lambda: group.allreduce(first)))
        except (TimeoutError, RuntimeError) as error:
            self._abort([group])
            is_late = isinstance(error, TimeoutError)
            raise self.board.fail("" if is_late else f"could not connect to the others ({error})") from error
        return group

    @classmethod
    def in_world(cls, *, backend: str = "gloo", timeout_s: float = 600.0) -> Wire:
        """A wire between all ranks of torch.distributed's world, which must be initialised; a collective."""
        named = dist.PrefixStore(f"weight_sync_{next(_names)}", job_store())
        return cls(named, dist.get_rank(), dist.get_world_size(), backend=backend, timeout_s=timeout_s)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[tuple[int, Any]]:
        """Post messages, which both sides must post in the same order; returns handles for `wait`."""
        self.bytes_sent += sum(tensor.nbytes for tensor, _ in sends)
        if self._backend == "nccl":
            return self._exchange_as_one(sends, receives)
        posts = [(other, self._group.recv, tensor) for tensor, other in receives]
        posts += [(other, self._group.send, tensor) for tensor, other in sends]
        return [(other, self._guard(other, partial(post, [tensor], other, 0))) for other, post, tensor in posts]

    def _exchange_as_one(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[tuple[int, Any]]:
        """Launch a round's NCCL messages as one: two ranks that send to each other would otherwise wait for each other."""
        if not sends and not receives:
            return []
        group, first = self._group, (*receives, *sends)[0][1]

        def post() -> Any:
            group._start_coalescing()
            for tensor, other in sends:
                group.send([tensor], other, 0)
            for tensor, other in receives:
                group.recv([tensor], other, 0)
            return group._end_coalescing()

        return [(first, self._guard(first, lambda: self._launch(post)))]

    def subgroup(self, ranks: Sequence[int]) -> Subgroup:
        """A subset of the ranks, for broadcasts among them; every rank of the wire must make the same subgroups."""
        group = None
        if self.rank in ranks:
            group = self._open(f"part{len(self._subgroups)}", ranks.index(self.rank), len(ranks))
        self.board.barrier(f"connection of part {len(self._subgroups)}")
        self._subgroups.append(group)
        return Subgroup(tuple(ranks), group)

    def broadcast(self, tensor: Tensor, subgroup: Subgroup) -> list[tuple[int, Any]]:
        """Post a broadcast of a flat tensor from the subgroup's first rank, whose `bytes_sent` counts it once per receiver."""
        if subgroup.group is None or len(subgroup.ranks) == 1:
            return []
        root = subgroup.ranks[0]
        if self.rank == root:
            self.bytes_sent += tensor.nbytes * (len(subgroup.ranks) - 1)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return [(root, self._guard(root, lambda: self._launch(lambda: subgroup.group.broadcast([tensor], options))))]

    def wait(self, works: Sequence[tuple[int, Any]]) -> None:
        """Wait until these messages are complete. After the sync's deadline, raises SyncError naming the missing ranks."""
        for other, work in works:
            self._guard(other, lambda work=work: self._finish(work))

    def _launch(self, post: Callable[[], Any]) -> Any:
        """`post()`. Raises TimeoutError at the deadline, or when another rank has given up.

        NCCL connects two ranks at the first operation between them. The call blocks until both ranks take part, without a
        deadline. So it runs in a thread, which is abandoned after an error. (torch's nonblocking mode is no alternative: it has
        one deadline for all groups of a process, and holds a lock that `abort` waits for.)
        """
        if self._backend != "nccl":
            return post()
        found: Future[Any] = Future()
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

        def run() -> None:
            try:
                if stream is not None:
                    # Also sets the device; both are per thread. Resetting them would open a context on the first GPU.
                    torch.cuda.set_stream(stream)
                found.set_result(post())
            except Exception as error:
                found.set_exception(error)

        threading.Thread(target=run, name="weight_sync", daemon=True).start()
        while not wait([found], timeout=_POLL_S).done:
            if self.board.seconds_left() <= 0 or self.board.has_failed():
                raise TimeoutError
        return found.result()

    def _finish(self, work: Any) -> None:
        # NCCL's own wait returns at once and has no deadline, and its connections outlive a failure at the other end.
        for look in itertools.count() if self._backend == "nccl" else ():
            if work.is_completed():
                break
            if self.board.seconds_left() <= 0 or (look % _LOOKS == _LOOKS - 1 and self.board.has_failed()):
                raise TimeoutError
            time.sleep(0.0002)
        work.wait(datetime.timedelta(seconds=max(0.001, self.board.seconds_left())))

    def _guard(self, other: int, action: Any) -> Any:
        try:
            return action()
        except (RuntimeError, TimeoutError) as error:
            if isinstance(error, SyncError):
                raise
            late = self.board.seconds_left() <= 0.01 or isinstance(error, TimeoutError)
            self.board.report(lost=None if late else other)
            self.close()
            raise self.board.failure() from error

    def close(self) -> None:
        """Drop the connections, so that no rank waits for this one until the deadline. Holders of a `Subgroup` must drop it.

        The board and its store live as long as this object. Other ranks may still read from it why the sync failed, or that it
        has ended; a server's worker may do so much later.
        """
        groups, self._group, self._subgroups = [self._group, *self._subgroups], None, []
        self._abort(groups)

    def _abort(self, groups: Sequence[Any]) -> None:
        for group in groups:
            if self._backend == "nccl" and group is not None:
                group.abort()


def _device_of(backend: str) -> torch.device:
    """Device of the tensors in a backend's messages."""
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def _open_group(backend: str, store: dist.Store, rank: int, world: int, timeout_s: float) -> Any:
    """A process group outside of torch.distributed's registry, because a server's worker already has its own world there."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, world, timeout)
    if backend == "nccl":
        with outliving_failures():
            return dist.ProcessGroupNCCL(store, rank, world, timeout)  # type: ignore[arg-type]  # the stub lacks this overload
    raise ValueError(f"unknown backend {backend!r}; known are gloo and nccl")
