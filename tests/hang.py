"""A rank that hangs for exactly as long as the others wait for it."""

from __future__ import annotations

import itertools
import time
from typing import Any

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
