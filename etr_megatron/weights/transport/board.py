"""The status of a sync's ranks on a key-value store: which ranks have arrived, and which have failed and why.

A failed collective reports at best that a connection is gone. The board shows which rank is at fault: every rank records its
phase, and a rank that gives up records the reason.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress

import torch.distributed as dist

_MIN_POLL_S, _POLL_S, _POLL_GROWTH = 0.0002, 0.05, 1.2
"""Poll intervals of a waiting rank: shortest, longest, growth factor. It notices a change at most 1/5 of its wait late."""

_GRACE_S = 3.0
"""Seconds that a failing rank waits for others to record their presence: their deadlines are at about the same time."""


class SyncError(RuntimeError):
    """A weight sync did not complete; the message names the version and the ranks that are missing or failed."""


class Board:
    """Messages between `world` ranks on `store`. timeout_s: time limit of a barrier, and of the transfers after it.

    After a SyncError the ranks no longer agree on their phase: the board refuses further use.
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
        """Start a new sync, which begins with a barrier. Raises SyncError if a sync has failed on this board before."""
        if self._broken:
            raise SyncError(f"this transport has failed before ({self._broken}); open a new one")
        self._sync += 1
        self._what = f"the weight sync of version {version}"
        for key in self._old:  # all ranks have left that sync: they met at the beginning of the next one
            self._store.delete_key(key)
        self._old, self._current = self._current, []

    def _key(self, name: str, rank: int | None = None) -> str:
        return f"{self._sync}/{name}" + ("" if rank is None else f"/{rank}")

    def barrier(self, phase: str) -> None:
        """Wait until all ranks reach this phase of the sync. Raises SyncError naming ranks that are missing or failed."""
        self._arrive(phase)
        # The last rank to arrive tells the others: a poll of all ranks' keys would be O(world) for every waiting rank.
        arrived, all_here = self._key(f"{phase}/arrived"), self._key(f"{phase}/all")
        if self._store.add(arrived, 1) == self.world:
            self._current += [arrived, all_here]
            self._store.set(all_here, "")
        self._await(all_here, self.timeout_s)

    def follow_rank0(self, phase: str, timeout_s: float) -> None:
        """Reach this phase. Ranks other than 0 wait for rank 0, up to `timeout_s` seconds. Raises SyncError as `barrier`.

        So time that rank 0 spends alone between two phases does not count against the timeout of the other ranks' transfers.
        """
        self._arrive(phase)
        self._await(self._key(phase, 0), timeout_s)

    def _arrive(self, phase: str) -> None:
        self._phase = phase
        own = self._key(phase, self.rank)
        self._store.set(own, "")
        self._current.append(own)

    def _await(self, key: str, timeout_s: float) -> None:
        self._patience, self._deadline = timeout_s, time.monotonic() + timeout_s
        pause = _MIN_POLL_S
        # The store's own wait prints a warning at every timeout, and does not see failures.
        while not self._store.check([key]):
            # A rank that failed after this barrier has reached it. So all ranks pass, and agree on whether the sync has begun.
            late = self.seconds_left() <= 0
            if (late or self.has_failed()) and not self._store.check([key]):
                raise self.fail("")
            time.sleep(pause)
            pause = min(_POLL_GROWTH * pause, _POLL_S)
        self._patience, self._deadline, self._phase = self.timeout_s, time.monotonic() + self.timeout_s, "end"

    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def has_failed(self) -> bool:
        """Whether some rank has given up."""
        return self._store.check([self._key("failed")])

    def refuse_failed(self) -> None:
        """Raise SyncError if some rank has given up."""
        if self.has_failed():
            raise self.fail("")

    def report(self, reason: str = "", *, lost: int | None = None) -> None:
        """Tell the other ranks that this rank gives up: for its own `reason`, or because its connection to rank `lost` is gone.

        Only the first report counts. Without arguments, the rank gives up because it has waited too long for others.
        """
        if self._broken is None:
            self._broken = reason or f"waited {self._patience:g} s at the {self._phase}"
            with suppress(RuntimeError):  # the store's owner is gone: `failure` says so
                self._store.set(self._key("failed", self.rank), json.dumps({"reason": reason, "lost": lost}))
                self._store.set(self._key("failed"), "")

    def fail(self, reason: str) -> SyncError:
        """`report`, then return `failure`. reason: empty if this rank has only waited for others."""
        self.report(reason)
        return self.failure()

    def failure(self) -> SyncError:
        """The error to raise after `report`, which names the ranks at fault. Takes some seconds if a rank is silent."""
        try:
            blame = self._blame()
        except RuntimeError:
            blame = "the process that owns the store is gone"
        self._broken = f"{self._what} did not complete: {blame or self._broken}"
        return SyncError(f"rank {self.rank}: {self._broken}")

    def _blame(self) -> str:
        """Ranks that reported a reason of their own; if there are none, silent ranks, disconnected or never arrived."""
        grace = time.monotonic() + _GRACE_S
        while True:
            texts = {rank: self._read(self._key("failed", rank)) for rank in range(self.world)}
            reports = {rank: json.loads(text) for rank, text in texts.items() if text}
            reasons = [f"rank {rank} failed: {one['reason']}" for rank, one in reports.items() if one["reason"]]
            if reasons:
                return "; ".join(reasons)
            silent = {rank for rank in range(self.world) if rank not in reports and not self._there(rank)}
            gone = {one["lost"] for one in reports.values()} & silent
            if silent == gone or time.monotonic() > grace:
                break
            time.sleep(_POLL_S)
        if gone:
            return f"{_ranks(gone)} gone: the connection was lost"
        return f"{_ranks(silent, verb=False)} did not arrive within {self._patience:g} s" if silent else ""

    def _there(self, rank: int) -> bool:
        return self._store.check([self._key(self._phase, rank)])

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""


def _ranks(some: set[int], *, verb: bool = True) -> str:
    names = ", ".join(map(str, sorted(some)))
    return f"ranks {names}{' are' if verb else ''}" if len(some) > 1 else f"rank {names}{' is' if verb else ''}"
