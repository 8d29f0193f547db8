"""The process group over which the trainer's rank 0 sends weights to the workers of servers.

It is created in the same way as SGLang creates its side, and is separate from the job's own groups.
"""

from __future__ import annotations

import datetime
import uuid
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from etr_megatron.platform.nccl import outliving_failures


class UpdateGroup:
    """A store and, once `join` has returned, a group: rank 0 is this process, the others are the servers' workers."""

    def __init__(self, workers: int, *, host: str, backend: str, timeout_s: float) -> None:
        """Open the store on a free port of `host`. No worker has joined yet. workers: total number over all servers."""
        # A server keeps the groups of earlier jobs and refuses a name that it already has.
        self.name = f"etr_weights_{uuid.uuid4().hex}"
        self.backend, self.host, self.world = backend, host, workers + 1
        self._timeout = datetime.timedelta(seconds=timeout_s)
        # This is the only reference, so `close` shuts the store down, which ends the wait of all workers in its rendezvous.
        self._master: dist.TCPStore | None = dist.TCPStore(
            host, 0, self.world, is_master=True, wait_for_workers=False, timeout=self._timeout
        )
        self.port = int(self._master.port)
        self._group: dist.ProcessGroup | None = None

    def join(self) -> None:
        """Form the group; blocks until all workers have joined. Raises torch's error when they do not join in time."""
        store = dist.TCPStore(self.host, self.port, self.world, wait_for_workers=False, timeout=self._timeout)
        # Not for gloo, which does not read these variables, and may block here, with their lock held, for a missing worker.
        with outliving_failures() if self.backend == "nccl" else nullcontext():
            # torch has no public API for a group beyond the ranks of the default one; SGLang calls the same function.
            self._group, _ = c10d._new_process_group_helper(
                self.world,
                0,
                [],
                c10d.Backend(self.backend),
                dist.PrefixStore(self.name, store),
                group_name=self.name,  # type: ignore[arg-type]  # a NewType of str, private to torch
                backend_options=None,
                timeout=self._timeout,
            )
        c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(self.world)}
        if self._master is None:  # it was closed meanwhile
            self.close()

    def broadcast(self, flat: Tensor) -> None:
        """Send flat, uint8 [n], to all workers (the caller owns it). Raises torch's error when one of them is gone."""
        assert self._group is not None
        work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        work.wait(self._timeout)
        if flat.is_cuda:  # with NCCL, wait() only blocks the stream
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Leave the group at once, even during a broadcast in another thread. Workers that still wait in a broadcast or in the
        rendezvous see the connection close."""
        self._master = None
        if self._group is not None:
            # With NCCL, destroying the group would wait for the broadcast, and for workers of this machine to destroy theirs.
            leave = c10d._abort_process_group if self.backend == "nccl" else dist.destroy_process_group
            leave(self._group)
            self._group = None
