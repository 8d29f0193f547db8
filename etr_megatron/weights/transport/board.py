"""A notice board of the ranks of a sync on a key-value store: who has arrived, who has failed and why.

A collective that fails says at best that a connection is gone. The board says whose fault it was: every rank writes down where
it is, and one that gives up writes down the reason.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress

import torch.distributed as dist

_SHORTEST_POLL_S, _POLL_S, _POLL_GROWTH = 0.0002, 0.05, 1.2
"""How often a waiting rank looks at the board: often at first, less and less then, so that it is late by a fifth at most."""

_GRACE_S = 3.0
"""How long a failing rank waits for others, whose deadlines end at about the same time, to write down that they are there."""


class SyncError(RuntimeError):
    """A weight sync did not complete; the message names the version and the ranks that are missing or failed."""


class Board:
    """What `world` ranks tell each other on `store`. timeout_s: deadline of a meeting, and of the transfers after it.

    After a SyncError the ranks no longer agree on where they are: the board refuses further use.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_s: float) -> None:
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self._store = store
        self._sync, self._what = 0, "the opening of the weight sync"
        self._phase, self._patience = "begin", timeout_s
        self._old: list[str] = []
        self._current: list[str] = []
        self._deadline = time.monotonic() + timeout_s
        self._broken: str | None = None

    def start(self, version: int) -> None:
        """Turn to a new sync, which begins with a meeting. Raises SyncError where one has failed on this board before."""
        if self._broken:
            raise SyncError(f"this transport has failed before ({self._broken}); open a new one")
        self._sync += 1
        self._what = f"the weight sync of version {version}"
        for key in self._old:  # everyone has left that sync: all were at the begin of the one after it
            self._store.delete_key(key)
        self._old, self._current = self._current, []

    def _key(self, name: str, rank: int | None = None) -> str:
        return f"{self._sync}/{name}" + ("" if rank is None else f"/{rank}")

    def meet(self, phase: str) -> None:
        """Wait until all ranks are at this phase of the sync. Raises SyncError naming those that are not, or that failed."""
        self._arrive(phase)
        self._await([self._key(phase, rank) for rank in range(self.world)], self.timeout_s)

    def follow(self, phase: str, leader: int, timeout_s: float) -> None:
        """Be at this phase; others than the leader wait `timeout_s` seconds at most until it is. Raises SyncError as `meet`.

        What the leader does between two phases, which the others have no part in, hence does not count as theirs to wait for.
        """
        self._arrive(phase)
        self._await([self._key(phase, leader)], timeout_s)

    def _arrive(self, phase: str) -> None:
        self._phase = phase
        own = self._key(phase, self.rank)
        self._store.set(own, "")
        self._current.append(own)

    def _await(self, keys: list[str], timeout_s: float) -> None:
        self._patience, self._deadline = timeout_s, time.monotonic() + timeout_s
        pause = _SHORTEST_POLL_S
        # The store's own wait prints a warning whenever it runs into its deadline, and does not see failures.
        while not self._store.check(keys):
            # One that failed after the meeting had been at it before: then all pass, and agree on whether the sync has begun.
            late = self.left() <= 0
            if (late or self.has_failed()) and not self._store.check(keys):
                raise self.fail("")
            time.sleep(pause)
            pause = min(_POLL_GROWTH * pause, _POLL_S)
        self._patience, self._deadline, self._phase = self.timeout_s, time.monotonic() + self.timeout_s, "end"

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def has_failed(self) -> bool:
        """Whether some rank has given up."""
        return self._store.check([self._key("failed")])

    def refuse_failed(self) -> None:
        """Raise SyncError where some rank has given up."""
        if self.has_failed():
            raise self.fail("")

    def report(self, reason: str = "", *, lost: int | None = None) -> None:
        """Tell the others that this rank gives up: for a reason of its own, or (`lost`) as the connection to a rank is gone.

        Only what is told first counts. Without either it has only waited for others.
        """
        if self._broken is None:
            self._broken = reason or f"waited {self._patience:g} s at the {self._phase}"
            with suppress(RuntimeError):  # the store's owner is gone: `failure` says so
                self._store.set(self._key("failed", self.rank), json.dumps({"reason": reason, "lost": lost}))
                self._store.set(self._key("failed"), "")

    def fail(self, reason: str) -> SyncError:
        """`report` and `failure` in one. reason: empty where this rank has only waited for others."""
        self.report(reason)
        return self.failure()

    def failure(self) -> SyncError:
        """The error to raise after `report`: it names whoever is at fault. Takes some seconds where a rank says nothing."""
        try:
            blame = self._blame()
        except RuntimeError:
            blame = "the process that owns the store is gone"
        self._broken = f"{self._what} did not complete: {blame or self._broken}"
        return SyncError(f"rank {self.rank}: {self._broken}")

    def _blame(self) -> str:
        """Ranks with a reason of their own; else those whose connection was lost, or that did not come, and say nothing."""
        grace = time.monotonic() + _GRACE_S
        while True:
            texts = {rank: self._read(self._key("failed", rank)) for rank in range(self.world)}
            told = {rank: json.loads(text) for rank, text in texts.items() if text}
            reasons = [f"rank {rank} failed: {one['reason']}" for rank, one in told.items() if one["reason"]]
            if reasons:
                return "; ".join(reasons)
            silent = {rank for rank in range(self.world) if rank not in told and not self._there(rank)}
            gone = {one["lost"] for one in told.values()} & silent
            if silent == gone or time.monotonic() > grace:
                break
            time.sleep(_POLL_S)
        if gone:
            return f"{_ranks(gone)} gone: the connection was lost"
        return f"{_ranks(silent, verb=False)} did not come within {self._patience:g} s" if silent else ""

    def _there(self, rank: int) -> bool:
        return self._store.check([self._key(self._phase, rank)])

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""


def _ranks(some: set[int], *, verb: bool = True) -> str:
    names = ", ".join(map(str, sorted(some)))
    return f"ranks {names}{' are' if verb else ''}" if len(some) > 1 else f"rank {names}{' is' if verb else ''}"
