"""Which ranks are there, and in which order the others left, by notes in the job's store.

A rank that loses another sees a closed connection, but not who closed it: a peer that lost the same rank has closed its own. So
a rank that ends by an error says so first. One that says nothing and is not there has been killed, or has died.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from etr_megatron.platform.job_store import job_store, own_connection

ANSWER_S = 3.0
"""Time for a rank of another machine to answer a roll call. Every rank looks for one at intervals of `_LOOK_S`. A rank whose
Python threads all wait this long for one call into a library counts as gone."""

_LOOK_S, _POLL_S = 0.5, 0.05
_STORE_S = 5.0
"""Time for the store to answer: it has no deadline of its own, and its machine may have lost power."""

T = TypeVar("T")


class RankProcess(NamedTuple):
    """Where a rank runs. system: its kernel and process namespace, in which others can look for it; "" on all but Linux.
    begun: when its process began, as another may get its pid."""

    host: str
    pid: int
    system: str
    begun: str

    @classmethod
    def own(cls) -> RankProcess:
        """This process's."""
        host, pid = socket.gethostname(), os.getpid()
        if sys.platform != "linux":
            return cls(host, pid, "", "")
        try:
            boot, namespace = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
        except OSError:  # a sandbox
            return cls(host, pid, "", "")
        begun = _begun(pid)  # None where /proc shows the processes of another namespace
        return cls(host, pid, f"{boot} {namespace}", begun) if begun else cls(host, pid, "", "")

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


class Attendance:
    """The ranks of a job. store: of the job, used from several threads, of which none waits for a key. places: of all ranks."""

    def __init__(self, store: dist.Store, rank: int, places: Sequence[RankProcess]) -> None:
        self._store, self.rank, self._places = store, rank, list(places)
        self._lost: set[int] = set()
        self._is_stopped = self._store_is_silent = False
        self._here = {one for one, place in enumerate(places) if place.system and place.system == places[rank].system}
        self._away = [one for one in range(len(places)) if one not in self._here and one != rank]
        if self._away:  # those that are all on one machine see each other without a thread
            threading.Thread(target=self._answer, name="roll_call", daemon=True).start()

    @classmethod
    def of_job(cls) -> Attendance:
        """A collective."""
        places = [RankProcess.own()] * dist.get_world_size()
        if len(places) > 1:
            dist.all_gather_object(places, RankProcess.own())
        return cls(own_connection(job_store()), dist.get_rank(), places)

    def leave(self, why: str) -> None:
        """Say that this rank ends by an error. Call it before connections to the others are closed."""

        def note() -> None:
            self._store.set(f"left/{self.rank}", why)
            if self._store.add("leaving", 1) == 1:
                self._store.set("first", str(self.rank))

        self._ask(note, None)

    def stop(self) -> None:
        """Say that the job was told to stop while all ranks were there: a later error does not make it a failed one."""
        self._is_stopped = True
        self._ask(lambda: self._store.set("stopped", ""), None)

    @property
    def is_stopped(self) -> bool:
        """Whether a rank has said so; remembered, as the store may end before this rank."""
        self._is_stopped = self._is_stopped or self._read("stopped") is not None
        return self._is_stopped

    def told(self) -> str | None:
        """This rank was told to stop: says so if all ranks are there, and returns who is gone otherwise, see `loss`.

        When all ranks are told at once, those that are not the first of their machine wait for what that one finds.
        """
        if self.is_stopped:
            return None
        loss = self.loss()
        if loss is None and self._away and not self._calls:
            deadline = time.monotonic() + ANSWER_S + _LOOK_S
            while not self.is_stopped and (loss := self._read("lost")) is None and time.monotonic() < deadline:
                time.sleep(_LOOK_S)
            if not self.is_stopped and loss is None:
                loss = self.loss(everywhere=True)
        if loss is None:
            self.stop()
        elif self._calls:
            self._ask(lambda: self._store.set("lost", loss), None)
        return loss

    @property
    def _calls(self) -> bool:
        """Whether this rank is the one of its machine that calls the roll: if all did, the store would be overrun."""
        return self.rank == min(self._here | {self.rank})

    def loss(self, patience_s: float = 0.0, *, everywhere: bool = False) -> str | None:
        """Who is gone or, if nobody is, which other rank was the first to leave by an error, and why; None if all are there.

        patience_s: time until a rank of this machine, whose connections are closed, must have ended. everywhere: whether to ask
        for ranks of other machines even if this rank is not the first of its own, which always does.
        """
        deadline = time.monotonic() + patience_s
        others = self._here - {self.rank}
        while not (gone := [rank for rank in others if self._has_ended(rank)]) and self._first() is None:
            if not others or time.monotonic() >= deadline:
                break
            time.sleep(_POLL_S)
        said = []
        if gone:
            said.append(f"{self._named(gone)} ended without a word, as after SIGKILL")
        silent = self._silent() if everywhere or self._calls else []
        self._lost |= {*gone, *(silent or ())}
        if silent is None:
            said.append("the job's store, which tells of ranks of other machines, gave no answer")
        elif silent:
            said.append(f"{self._named(silent)} gave no answer within {ANSWER_S:g} s")
        first = self._first()
        if not said and first is not None:
            said.append(f"{self._named([first])} failed: {self._read(f'left/{first}')}")
        return "; ".join(said) or None

    @property
    def speaks(self) -> bool:
        """Whether this is rank 0 or, as far as `loss` has found, all ranks before it are gone."""
        return self._lost.issuperset(range(self.rank))

    def _first(self) -> int | None:
        """The first rank that left by an error, unless it is this one."""
        found = self._read("first")
        return None if found is None or int(found) == self.rank else int(found)

    def _has_left(self, rank: int) -> bool:
        return self._read(f"left/{rank}") is not None

    def _has_ended(self, rank: int) -> bool:
        """Whether a rank of this machine has ended without `leave`."""
        place = self._places[rank]
        return _begun(place.pid) != place.begun and not self._has_left(rank)

    def _silent(self) -> list[int] | None:
        """Ranks of other machines that neither answer nor have left; None without the store."""
        away: list[int] | None = self._away
        if not away:
            return []
        number, deadline = self._ask(lambda: self._store.add("calls", 1), 0), time.monotonic() + ANSWER_S

        def unanswered(ranks: Sequence[int]) -> list[int]:
            keys = {rank: (f"here/{number}/{rank}", f"left/{rank}") for rank in ranks}
            return [rank for rank in ranks if not any(self._store.check([key]) for key in keys[rank])]

        while number and away and time.monotonic() < deadline:
            time.sleep(_LOOK_S)  # by then nearly all have answered
            away = self._ask(partial(unanswered, away), None)
        return away if number else None

    def _answer(self) -> None:
        """Answer roll calls, as long as the process lives."""
        answered = 0
        with suppress(RuntimeError):
            while True:
                while answered < self._store.add("calls", 0):
                    answered += 1
                    self._store.set(f"here/{answered}/{self.rank}", "")
                time.sleep(_LOOK_S)

    def _read(self, key: str) -> str | None:
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None, None)

    def _ask(self, work: Callable[[], T], otherwise: T) -> T:
        """What `work` with the store returns; `otherwise` without the store, whose owner may be gone or hang."""
        found: list[T] = []

        def run() -> None:
            with suppress(RuntimeError):
                found.append(work())

        if not self._store_is_silent:
            thread = threading.Thread(target=run, name="attendance", daemon=True)
            thread.start()
            thread.join(_STORE_S)
            self._store_is_silent = thread.is_alive()
        return found[0] if found else otherwise

    def _named(self, ranks: Sequence[int]) -> str:
        names = ", ".join(f"{rank} ({self._places[rank]})" for rank in sorted(ranks))
        return f"rank{'s' * (len(ranks) > 1)} {names}"


def _begun(pid: int) -> str | None:
    """When a process of this machine began, in clock ticks; None if it has ended, even if its parent does not know it yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()
