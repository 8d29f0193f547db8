"""A notice board of the ranks of a sync on a key-value store: who has arrived, who has failed and why.

A collective that fails says at best that a connection is gone. The board says whose fault it was: every rank writes down where
it is, and one that gives up writes down the reason.
"""

from __future__ import annotations

import time

import torch.distributed as dist

_SHORTEST_POLL_S, _POLL_S, _POLL_GROWTH = 0.0002, 0.05, 1.2
"""How often a waiting rank looks at the board: often at first, less and less then, so that it is late by a fifth at most."""

_GRACE_S = 3.0
"""How long a failing rank waits for others, whose deadlines end at about the same time, to write down that they are there."""


class SyncError(RuntimeError):
    """A weight sync did not complete; the message names the version and the ranks that are missing or failed."""


class Board:
    """What `world` ranks tell each other on `store`. timeout_s: deadline of a meeting, and of the transfers of a sync.

    After a SyncError the ranks no longer agree on where they are: the board refuses further use.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_s: float) -> None:
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self._store = store
        self._sync, self._what = 0, "the opening of the weight sync"
        self._deadline = time.monotonic() + timeout_s
        self._broken: str | None = None

    def start(self, version: int) -> None:
        """Turn to a new sync, which begins with a meeting."""
        if self._broken:
            raise SyncError(f"this transport has failed before ({self._broken}); open a new one")
        self._sync += 1
        self._what = f"the weight sync of version {version}"
        self._forget(self._sync - 2)  # everyone has left it: all were at the begin of the one after it

    def _key(self, name: str, rank: int | None = None, sync: int | None = None) -> str:
        return f"{self._sync if sync is None else sync}/{name}" + ("" if rank is None else f"/{rank}")

    def _forget(self, sync: int) -> None:
        for phase in ("begin", "end"):
            if sync >= 0:
                self._store.delete_key(self._key(phase, self.rank, sync))

    def meet(self, phase: str) -> None:
        """Wait until all ranks are at this phase of the sync. Raises SyncError naming those that are not, or that failed."""
        self._deadline = time.monotonic() + self.timeout_s
        self._store.set(self._key(phase, self.rank), "")
        keys = [self._key(phase, rank) for rank in range(self.world)]
        pause = _SHORTEST_POLL_S
        # The store's own wait prints a warning whenever it runs into its deadline, and does not see failures.
        while not self._store.check(keys):
            if self._store.check([self._key("failed")]) or self.left() <= 0:
                raise self._failure(phase, "")
            time.sleep(pause)
            pause = min(_POLL_GROWTH * pause, _POLL_S)
        self._deadline = time.monotonic() + self.timeout_s

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def fail(self, reason: str) -> SyncError:
        """Tell the others why this rank gives up, and return the error to raise: it names whoever is at fault."""
        return self._failure("end", reason)

    def _failure(self, phase: str, reason: str) -> SyncError:
        own = reason or f"waited {self.timeout_s:g} s at the {phase}"
        try:
            self._store.set(self._key("failed", self.rank), own)
            self._store.set(self._key("failed"), "")
            blame = self._blame(phase)
        except RuntimeError:  # the store's owner is gone
            blame = "the rank that owns the store is gone"
        self._broken = f"{self._what} did not complete: {blame or own}"
        return SyncError(f"rank {self.rank}: {self._broken}")

    def _blame(self, phase: str) -> str:
        """Ranks that failed with a reason of their own; else those that are neither at the phase nor have failed."""
        grace = time.monotonic() + _GRACE_S
        while True:
            failed = {rank: self._read(self._key("failed", rank)) for rank in range(self.world)}
            reasons = {rank: text for rank, text in failed.items() if text and not text.startswith("waited ")}
            if reasons:
                return "; ".join(f"rank {rank} failed: {text}" for rank, text in reasons.items())
            missing = [rank for rank, text in failed.items() if not text and not self._there(phase, rank)]
            if not missing or time.monotonic() > grace:
                break
            time.sleep(_POLL_S)
        names = ", ".join(map(str, missing))
        return f"rank{'s' if len(missing) > 1 else ''} {names} did not come within {self.timeout_s:g} s" if missing else ""

    def _there(self, phase: str, rank: int) -> bool:
        return self._store.check([self._key(phase, rank)])

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""
