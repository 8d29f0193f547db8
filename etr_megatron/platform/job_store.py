"""A key-value store for messages between ranks outside of collectives."""

from __future__ import annotations

import secrets
from typing import Any

import torch.distributed as dist

_named: tuple[Any, str] | None = None


def job_store() -> dist.Store:
    """The world's store, with a key prefix unique to this start of the ranks. A collective.

    torchrun may keep one store through its restarts (`--max-restarts`); without the prefix, ranks would read stale messages of
    an earlier start, such as a stop request or a failure.
    """
    global _named
    world = dist.group.WORLD
    if _named is None or _named[0] is not world:
        name = [secrets.token_hex(8)]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(name, src=0)
        _named = world, name[0]
    return dist.PrefixStore(_named[1], dist.distributed_c10d._get_default_store())


def own_connection(store: dist.Store) -> dist.Store:
    """The same store on a new connection. Needed for a thread, because another thread that waits in the store blocks its
    connection."""
    return store.clone()  # type: ignore[attr-defined]  # the stub lacks it
