"""Whether another process lives, by what it counts up in a store."""

from __future__ import annotations

import time

import torch.distributed as dist


class Heartbeat:
    """Of the process that adds to `key`. One per thread, as its store."""

    def __init__(self, store: dist.Store, key: str) -> None:
        self._store, self._key = store, key
        self._seen, self._last = -1, time.monotonic()

    def silence_s(self) -> float:
        """For how long it has not beaten, as far as the calls of this have seen."""
        beats = self._store.add(self._key, 0)
        if beats != self._seen:
            self._seen, self._last = beats, time.monotonic()
        return time.monotonic() - self._last
