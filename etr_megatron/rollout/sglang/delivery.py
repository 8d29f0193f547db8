"""Buckets of whole HF tensors from rank 0 to all serving servers.

A server that fails at one takes no more traffic; the others go on with the same bucket.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import pickle
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from etr_megatron.rollout.sglang.client import ServerClient
from etr_megatron.rollout.sglang.fleet import Fleet
from etr_megatron.rollout.sglang.shared_memory import SharedMemory, handles
from etr_megatron.rollout.sglang.update_group import UpdateGroup
from etr_megatron.weights.transport.whole import Field

logger = logging.getLogger(__name__)

_ARRIVAL_S = 5.0
"""For a server to begin to look for the others of a weight group."""


@dataclass(frozen=True)
class Bucket:
    """HF tensors one after the other, without gaps, in flat: uint8 [sum of sizes], which belongs to the bucket."""

    fields: Sequence[Field]
    flat: Tensor

    @property
    def names(self) -> list[str]:
        """Of the tensors, in order."""
        return [field.name for field in self.fields]

    @property
    def dtypes(self) -> list[str]:
        """As SGLang names them."""
        return [str(field.dtype).removeprefix("torch.") for field in self.fields]

    @property
    def shapes(self) -> list[list[int]]:
        """Of the tensors, in order."""
        return [list(field.shape) for field in self.fields]


class Delivery(Protocol):
    """Brings buckets to the servers. Raises EngineGoneError when no server is left."""

    async def deliver(self, bucket: Bucket) -> None:
        """To all serving servers; returns when those that are left have it."""
        ...

    async def close(self) -> None:
        """Give up connections."""
        ...


def serialized(named: Sequence[tuple[str, Tensor]]) -> str:
    """Tensors as `/update_weights_from_tensor` takes them: their bytes, not a handle that only this machine understands."""
    return base64.b64encode(pickle.dumps([(name, tensor.to("cpu", copy=True)) for name, tensor in named])).decode()


class TensorDelivery:
    """In HTTP requests, to every worker of a server the whole tensors. See `Delivery`.

    near: names of servers that share this machine's memory; they are told where a bucket lies, which takes a twentieth of the
    time that its bytes take through JSON and a server's processes (benchmarks/weight_sync.py). Where `/dev/shm` has no room
    they get bytes.
    """

    def __init__(self, fleet: Fleet, *, workers: int, timeout_s: float, near: Collection[str] = ()) -> None:
        self._fleet, self._workers, self._timeout_s, self._near = fleet, workers, timeout_s, frozenset(near)
        self._memory = SharedMemory()
        self._warned = False

    async def deliver(self, bucket: Bucket) -> None:
        """See `Delivery.deliver`."""
        payloads = await asyncio.to_thread(self._payloads, bucket, [client.name for client in self._fleet.serving])

        async def send(client: ServerClient) -> None:
            body = {"serialized_named_tensors": payloads[client.name], "flush_cache": False}
            await client.call("/update_weights_from_tensor", body, timeout_s=self._timeout_s)

        await self._fleet.for_all(send)
        self._fleet.refuse_if_gone()

    def _payloads(self, bucket: Bucket, names: Sequence[str]) -> dict[str, list[str]]:
        """What each worker of each server is sent. Every server has answered the bucket before, or has failed."""
        near = [name for name in names if name in self._near]
        shared = self._memory.put(bucket.flat) if near else None
        found: dict[str, list[str]] = {}
        if shared is not None:
            views = [(field.name, field.view(shared)) for field in bucket.fields]
            found = {name: [handles(views) for _ in range(self._workers)] for name in near}
        elif near and not self._warned:
            self._warned = True
            why, size = self._memory.unavailable, len(bucket.flat) >> 20
            logger.warning("%s for %d MiB of weights; they go to servers by HTTP", why, size)
        if len(found) < len(names):
            whole = serialized([(field.name, field.view(bucket.flat)) for field in bucket.fields])
            found |= {name: [whole] * self._workers for name in names if name not in found}
        return found

    async def close(self) -> None:
        """See `Delivery.close`."""
        self._memory = SharedMemory()


class BroadcastDelivery:
    """Over one process group of rank 0 and all servers' workers, made anew when the set of servers changes. See `Delivery`.

    workers: tensor-parallel ranks of each server. backend: of the group. timeout_s: of every request and wait.
    """

    def __init__(self, fleet: Fleet, *, workers: int, host: str, backend: str, timeout_s: float) -> None:
        self._fleet, self._workers, self._host, self._backend, self._timeout_s = fleet, workers, host, backend, timeout_s
        self._group: UpdateGroup | None = None
        self._members: list[tuple[str, int]] = []

    async def deliver(self, bucket: Bucket) -> None:
        """The bucket to all serving servers, again after one has failed, until all that are left have it."""
        while True:
            self._fleet.refuse_if_gone()
            if self._fleet.members != self._members and not await self._form_group():
                continue
            if await self._send_once(bucket):
                return
            await self.close()

    async def _send_once(self, bucket: Bucket) -> bool:
        """Whether every serving server has the bucket; those that are to blame are marked."""
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
        sending = asyncio.create_task(asyncio.to_thread(group.broadcast, bucket.flat))
        # A server that refuses never comes to the broadcast: without closing the group everybody would wait for it.
        done, _ = await asyncio.wait([*calls, sending], return_when=asyncio.FIRST_EXCEPTION)
        broken = any(task.exception() is not None for task in done)
        if broken:
            group.close()
        replies = await asyncio.gather(*calls, sending, return_exceptions=True)
        if not broken:
            return True
        await self._find_culprits(clients, replies[:-1])
        return False

    async def _find_culprits(self, clients: Sequence[ServerClient], replies: Sequence[Any]) -> None:
        """Servers that failed and are not well; when all seem well, those that failed, so that no bucket is tried for ever."""
        failed = [(client, reply) for client, reply in zip(clients, replies, strict=True) if isinstance(reply, BaseException)]
        well = await asyncio.gather(*(self._fleet.lives(client) for client, _ in failed))
        to_blame = [one for one, good in zip(failed, well, strict=True) if not good] or failed
        for client, reply in to_blame or [(client, "the broadcast to it failed") for client in clients]:
            self._fleet.mark_failed(client, str(reply))

    async def _form_group(self) -> bool:
        """A group with all serving servers; False when one of them did not join and was marked."""
        await self.close()
        await self._fleet.see_that_they_live()
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
            call = client.call("/init_weights_update_group", body, timeout_s=self._timeout_s)
            calls.append(asyncio.create_task(call))
        joining = asyncio.create_task(asyncio.to_thread(group.join))
        # A server that refuses never comes to the rendezvous: whoever waits there would do so until its deadline.
        done, _ = await asyncio.wait([*calls, joining], return_when=asyncio.FIRST_EXCEPTION)
        if any(task.exception() is not None for task in done):
            joining.add_done_callback(lambda task: task.exception())
            answered = [(client, call) for client, call in zip(clients, calls, strict=True) if call.done()]
            self._blame_for_no_group(answered, clients, joining)
            # The servers that come wait for the one that does not, and hear nothing meanwhile, until the store that they look
            # for it in is closed; those that have not found the store by then would go on looking.
            await asyncio.wait(calls, timeout=_ARRIVAL_S)
            group.close()
            await asyncio.wait(calls, timeout=_ARRIVAL_S)
            for call in calls:
                call.cancel()
            return False
        self._group, self._members = group, members
        return True

    def _blame_for_no_group(
        self,
        answered: Sequence[tuple[ServerClient, asyncio.Task[Any]]],
        clients: Sequence[ServerClient],
        joining: asyncio.Task[None],
    ) -> None:
        """Those that refused or gave no answer; all, when the group itself failed."""
        refused = [(client, str(task.exception())) for client, task in answered if task.exception() is not None]
        why = f"the weight group was not formed: {joining.exception()}" if joining.done() else ""
        for client, reason in refused or [(client, why) for client in clients]:
            self._fleet.mark_failed(client, reason)

    async def close(self) -> None:
        """Leave the group, and have the servers forget it; they need not hear of it to go on."""
        if self._group is not None:
            body = {"group_name": self._group.name}
            self._group.close()
            goodbyes = (client.call("/destroy_weights_update_group", body, timeout_s=10.0) for client in self._fleet.serving)
            await asyncio.gather(*goodbyes, return_exceptions=True)
        self._group, self._members = None, []
