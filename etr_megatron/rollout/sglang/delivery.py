"""Delivers buckets of whole HF tensors from rank 0 to all serving servers.

A server that fails at a bucket takes no more traffic; the others go on with the same bucket.
"""

from __future__ import annotations

import asyncio
import base64
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from etr_megatron.rollout.sglang.client import ServerClient, ServerError
from etr_megatron.rollout.sglang.fleet import Fleet
from etr_megatron.rollout.sglang.update_group import UpdateGroup
from etr_megatron.weights.quantize import FP8
from etr_megatron.weights.transport.whole import Field

LIVENESS_S = 30.0
"""Seconds for a server to answer a liveness check during a weight sync, when it is paused and has nothing else to do."""

_ARRIVAL_S = 5.0
"""Seconds for a server to enter the rendezvous of a weight group."""


@dataclass(frozen=True)
class Bucket:
    """HF tensors concatenated in flat, uint8 [sum of sizes], which the bucket owns.

    handles: server -> handles with which its workers open the bucket in their machine's shared memory, see `SharedBuckets`.
    """

    fields: Sequence[Field]
    flat: Tensor
    handles: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in order."""
        return [one.name for one in self.fields]

    @property
    def dtypes(self) -> list[str]:
        """Dtypes of the tensors, in order, as SGLang names them."""
        return [str(one.dtype).removeprefix("torch.") for one in self.fields]

    @property
    def shapes(self) -> list[list[int]]:
        """Shapes of the tensors, in order."""
        return [list(one.shape) for one in self.fields]


class Delivery(Protocol):
    """Delivers buckets to the servers. Raises EngineGoneError when no server is left."""

    async def deliver(self, bucket: Bucket) -> None:
        """Deliver to all serving servers. Returns when every server that has not failed has the bucket."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class _Pickler(pickle.Pickler):
    """Pickles FP8 tensors with a storage of bytes, because torch (2.13) cannot read its own pickles of FP8 tensors."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor) or obj.dtype is not FP8:
            return NotImplemented
        storage = obj.view(torch.uint8)._typed_storage()
        where = storage, obj.storage_offset(), tuple(obj.shape), obj.stride()
        return torch._utils._rebuild_tensor_v3, (*where, False, OrderedDict(), obj.dtype)


def serialized(named: Sequence[tuple[str, Tensor]]) -> str:
    """Tensors for `/update_weights_from_tensor`: as bytes, not as handles, which are valid only on this machine."""
    output = io.BytesIO()
    _Pickler(output).dump([(name, tensor.to("cpu", copy=True)) for name, tensor in named])
    return base64.b64encode(output.getbuffer()).decode()


class TensorDelivery:
    """Sends whole tensors to every worker of a server, in HTTP requests. See `Delivery`.

    A server that has handles of the bucket is sent the handles; other servers are sent the bytes. With handles a sync takes
    less than a tenth of the time that bytes need for JSON and for a server's processes (benchmarks/weight_sync.py).
    """

    def __init__(self, fleet: Fleet, *, workers: int, timeout_s: float) -> None:
        self._fleet, self._workers, self._timeout_s = fleet, workers, timeout_s

    async def deliver(self, bucket: Bucket) -> None:
        """See `Delivery.deliver`."""
        payloads = dict(bucket.handles)
        far = [client.name for client in self._fleet.serving if client.name not in payloads]
        if far:
            named = [(one.name, one.view(bucket.flat)) for one in bucket.fields]
            payloads |= dict.fromkeys(far, [await asyncio.to_thread(serialized, named)] * self._workers)

        async def send(client: ServerClient) -> None:
            body = {"serialized_named_tensors": payloads[client.name], "flush_cache": False}
            await client.call("/update_weights_from_tensor", body, timeout_s=self._timeout_s)

        await self._fleet.for_all(send)
        self._fleet.refuse_if_gone()

    async def close(self) -> None:
        """See `Delivery.close`."""


def _in_daemon_thread(work: Callable[[], None]) -> asyncio.Future[None]:
    """Run in a daemon thread, which does not keep the process alive at its end: NCCL connects to workers without a deadline,
    and closing the group does not stop it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    future.add_done_callback(lambda one: one.cancelled() or one.exception())  # retrieves the error, in case it is not awaited

    def end(error: Exception | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(None)

    def run() -> None:
        found = None
        try:
            work()
        except Exception as error:
            # The frames refer to unfinished work, which would keep gloo's connections open after the group is closed: servers
            # that wait in the broadcast would not notice, and would count as lost.
            found = error.with_traceback(None)
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(end, found)

    threading.Thread(target=run, name="weight_group", daemon=True).start()
    return future


async def _leave(client: ServerClient, group: str) -> None:
    """Ask the server to destroy its side of a group. It is usable even if that fails."""
    with suppress(ServerError):
        await client.call("/destroy_weights_update_group", {"group_name": group}, timeout_s=10.0)


class BroadcastDelivery:
    """Broadcasts over one process group of rank 0 and all servers' workers. See `Delivery`.

    The group is re-created when the servers change. workers: tensor-parallel ranks of each server. backend: of the group.
    timeout_s: of every request and wait.
    """

    def __init__(self, fleet: Fleet, *, workers: int, host: str, backend: str, timeout_s: float) -> None:
        self._fleet, self._workers, self._host, self._backend, self._timeout_s = fleet, workers, host, backend, timeout_s
        self._liveness_s = min(LIVENESS_S, timeout_s)
        self._group: UpdateGroup | None = None
        self._members: list[tuple[str, int]] = []

    async def deliver(self, bucket: Bucket) -> None:
        """Send the bucket to all serving servers. After a failure, send it again to the servers that are left."""
        while True:
            self._fleet.refuse_if_gone()
            if self._fleet.members != self._members and not await self._form_group():
                continue
            if await self._send_once(bucket):
                return
            await self.close()

    async def _send_once(self, bucket: Bucket) -> bool:
        """Send the bucket; returns whether every serving server has it. If not, the servers that are to blame are marked."""
        group = self._group
        assert group is not None
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        clients = self._fleet.serving
        route = "/update_weights_from_distributed"
        calls = [asyncio.create_task(client.call(route, body, timeout_s=self._timeout_s)) for client in clients]
        sending = _in_daemon_thread(lambda: group.broadcast(bucket.flat))
        # A server that refuses the request never joins the broadcast. The group is closed, or all others would wait for it.
        both: list[asyncio.Future[Any]] = [*calls, sending]
        done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
        if all(task.exception() is None for task in done):
            return True
        group.close()
        pairs = zip(clients, calls, strict=True)
        errors = await asyncio.gather(*(self._error_of(client, call, group.name) for client, call in pairs))
        await asyncio.wait([sending], timeout=self._liveness_s)
        failed = {client: str(error) for client, error in zip(clients, errors, strict=True) if error is not None}
        await self._blame(clients, failed or dict.fromkeys(clients, "the broadcast of weights to it failed"))
        return False

    async def _error_of(self, client: ServerClient, call: Awaitable[Any], group: str) -> Exception | None:
        """The error of a server's call. If it says that it has received nothing, it leaves the group: in gloo's tree, servers
        pass the weights on, and those that wait for this one see the connection close."""
        try:
            await call
        except ServerError as error:
            if error.status is not None:
                await _leave(client, group)
            return error
        return None

    async def _blame(self, asked: Sequence[ServerClient], failed: Mapping[ServerClient, str]) -> None:
        """Mark servers that are not alive, because a server that hangs makes others fail. If all are alive, mark those that
        failed, because the same attempt would otherwise be repeated forever. failed: server -> reason."""
        alive = await asyncio.gather(*(client.is_alive(self._liveness_s) for client in asked))
        dead = {client: failed.get(client, "does not answer") for client, lives in zip(asked, alive, strict=True) if not lives}
        for client, why in (dead or failed).items():
            self._fleet.mark_failed(client, why)

    async def _form_group(self) -> bool:
        """Form a group with all serving servers. Returns False if that failed and the servers to blame were marked."""
        await self.close()
        await self._fleet.see_that_they_live(self._liveness_s)
        self._fleet.refuse_if_gone()
        clients, members = self._fleet.serving, self._fleet.members
        group = UpdateGroup(len(clients) * self._workers, host=self._host, backend=self._backend, timeout_s=self._timeout_s)
        calls = []
        for number, client in enumerate(clients):
            body = {
                "master_address": group.host,
                "master_port": group.port,
                "rank_offset": 1 + number * self._workers,
                "world_size": group.world,
                "group_name": group.name,
                "backend": group.backend,
            }
            calls.append(asyncio.create_task(client.call("/init_weights_update_group", body, timeout_s=self._timeout_s)))
        joining = _in_daemon_thread(group.join)
        # A server that refuses the request never joins the rendezvous, where the others would wait until their timeout.
        both: list[asyncio.Future[Any]] = [*calls, joining]
        done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
        if any(task.exception() is not None for task in done):
            refused = {
                client: str(call.exception())
                for client, call in zip(clients, calls, strict=True)
                if call.done() and call.exception() is not None
            }
            why = f"the process group for weights was not formed: {joining.exception()}" if joining.done() else ""
            # Servers in the rendezvous wait for the missing one, and answer nothing, until the store is closed. A server that
            # connects after that would keep retrying, so all servers first get time to arrive.
            await asyncio.wait(calls, timeout=_ARRIVAL_S)
            group.close()
            await asyncio.wait(calls, timeout=_ARRIVAL_S)
            for call in calls:
                call.cancel()
            await self._blame(clients, refused or dict.fromkeys(clients, why))
            return False
        self._group, self._members = group, members
        return True

    async def close(self) -> None:
        """Leave the group and ask the servers to destroy it. A server is usable even if that request fails."""
        if self._group is not None:
            self._group.close()
            await asyncio.gather(*(_leave(client, self._group.name) for client in self._fleet.serving))
        self._group, self._members = None, []
