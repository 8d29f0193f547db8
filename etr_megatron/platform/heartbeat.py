"""Liveness of another process, from a counter that it increments in a store."""

from __future__ import annotations

import time

import torch.distributed as dist


class Heartbeat:
    """Watches the process that increments `key`. Not thread-safe, like its store: use one of each per thread."""

    def __init__(self, store: dist.Store, key: str) -> None:
        self._store, self._key = store, key
        self._seen, self._last = -1, time.monotonic()

    @property
    def has_beaten(self) -> bool:
        """Whether the process had sent a heartbeat by the last call of `silence_s`."""
        return self._seen > 0

    def silence_s(self) -> float:
        """Seconds without a beat, as observed by calls of this method."""
        beats = self._store.add(self._key, 0)
        if beats != self._seen:
            self._seen, self._last = beats, time.monotonic()
        return time.monotonic() - self._last
