"""Ranks that hang for exactly as long as others wait for them, and ranks that wait no longer than they should."""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_made = itertools.count()


class Hang:
    """Made on every rank of a job. A call blocks until all other ranks have called `given_up`, for at most a minute: if a test
    sees them finish earlier, they did not wait for this rank."""

    def __init__(self) -> None:
        self._store, self._key = c10d._get_default_store(), f"given up {next(_made)}"

    def given_up(self) -> None:
        self._store.add(self._key, 1)

    def __call__(self, *_: Any) -> None:
        end = time.monotonic() + 60
        while self._store.add(self._key, 0) < dist.get_world_size() - 1 and time.monotonic() < end:
            time.sleep(0.05)


@contextmanager
def collectives_within(seconds: float) -> Iterator[None]:
    """This rank, which is not rank 0, waits no longer than this in a collective. The limit ends with the block, or sooner: once
    the rank has waited longer than that for rank 0 outside of collectives, a busy machine may be slow at the rest."""
    from etr_megatron.rollout import rank0

    wait, usual = rank0._wait_for, c10d.default_pg_timeout

    def waiting(*arguments: Any) -> None:
        begun = time.monotonic()
        wait(*arguments)
        if time.monotonic() - begun > seconds:
            c10d._set_pg_timeout(usual, dist.group.WORLD)

    c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), dist.group.WORLD)
    try:
        with mock.patch.object(rank0, "_wait_for", waiting):
            yield
    finally:
        c10d._set_pg_timeout(usual, dist.group.WORLD)
