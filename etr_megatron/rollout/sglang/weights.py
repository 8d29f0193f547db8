"""A weight sync as a transaction: pause, send, flush, version, continue.

Servers keep what they have in hand (`retract`), take the tensors bucket by bucket, drop their caches, are told the version and
asked for it. A server that fails at any of this takes no more traffic; the others go on with the same bucket. The one that
fails may have weights of two versions: it must get a whole sync before it serves again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etr_megatron.rollout.sglang.client import ServerClient, ServerError
from etr_megatron.rollout.sglang.fleet import Fleet
from etr_megatron.rollout.sglang.update_group import UpdateGroup


@dataclass(frozen=True)
class Bucket:
    """Whole tensors one after the other as bytes. flat: uint8 [sum of sizes], a fresh copy owned by the bucket."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    flat: Tensor


def buckets(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[Bucket]:
    """Tensors in order in buckets of at most `limit` bytes; a larger tensor has one to itself."""
    held: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > limit:
            yield _bucket(held)
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    if held:
        yield _bucket(held)


def _bucket(held: Sequence[tuple[str, Tensor]]) -> Bucket:
    return Bucket(
        [name for name, _ in held],
        [str(tensor.dtype).removeprefix("torch.") for _, tensor in held],
        [list(tensor.shape) for _, tensor in held],
        torch.cat([tensor.contiguous().flatten().view(torch.uint8) for _, tensor in held]),
    )


class WeightSender:
    """Sends versions of the weights to a fleet over one process group per set of servers.

    workers: tensor-parallel ranks of each server. backend: of the group. timeout_s: of every request and wait.
    """

    def __init__(self, fleet: Fleet, *, workers: int, host: str, backend: str, timeout_s: float) -> None:
        self._fleet, self._workers, self._host, self._backend, self._timeout_s = fleet, workers, host, backend, timeout_s
        self._group: UpdateGroup | None = None
        self._members: list[str] = []

    async def begin(self) -> None:
        """Pause all servers and open the update. Raises EngineGoneError when none is left."""
        await self._on_all("/pause_generation", {"mode": "retract"})
        await self._on_all("/begin_weight_update", {}, may_lack=True)
        self._fleet.refuse_if_gone()

    async def finish(self, version: int) -> None:
        """Close the update, drop caches, and hold servers to `version`: those that answer with another serve no more."""
        await self._on_all("/end_weight_update", {}, may_lack=True)
        await self._on_all("/flush_cache", {})
        await self._on_all("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        await self._shake_hands(version)
        await self._on_all("/continue_generation", {})
        self._fleet.refuse_if_gone()

    async def abandon(self, why: str) -> None:
        """After a failure of ours in the middle: servers go on, so that nobody waits for them, but take no traffic of ours."""
        await self._on_all("/end_weight_update", {}, may_lack=True)
        await self._on_all("/continue_generation", {})
        for client in self._fleet.serving:
            self._fleet.mark_failed(client, why)

    async def _on_all(self, route: str, body: dict[str, Any], *, may_lack: bool = False) -> None:
        """POST to every serving server at once; those that fail take no more traffic.

        may_lack: a server without the route (404) is as good.
        """

        async def one(client: ServerClient) -> None:
            try:
                await client.call(route, body, timeout_s=self._timeout_s)
            except ServerError as error:
                if not (may_lack and error.status == 404):
                    self._fleet.mark_failed(client, str(error))

        await asyncio.gather(*map(one, self._fleet.serving))

    async def _shake_hands(self, version: int) -> None:
        for client in self._fleet.serving:
            try:
                found = await client.weight_version(self._timeout_s)
            except ServerError as error:
                self._fleet.mark_failed(client, str(error))
                continue
            if found != str(version):
                self._fleet.mark_failed(client, f"serves version {found} after it was sent {version}")

    async def send(self, bucket: Bucket) -> None:
        """The bucket to all serving servers, again after one has failed, until all that are left have it."""
        while True:
            self._fleet.refuse_if_gone()
            members = [client.name for client in self._fleet.serving]
            if members != self._members and not await self._form_group():
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
        well = await asyncio.gather(*(client.is_healthy(min(10.0, self._timeout_s)) for client, _ in failed))
        to_blame = [one for one, good in zip(failed, well, strict=True) if not good] or failed
        for client, reply in to_blame or [(client, "the broadcast to it failed") for client in clients]:
            self._fleet.mark_failed(client, str(reply))

    async def _form_group(self) -> bool:
        """A group with all serving servers; False when one of them did not join and was marked."""
        await self.close()
        clients = self._fleet.serving
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
            for call in calls:
                call.cancel()
            return False
        self._group, self._members = group, [client.name for client in clients]
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
