"""Tracks which ranks are alive, and which rank failed first, through keys in the job's store.

When a rank ends, the others see closed connections, but not which rank ended first: peers that lost it close their connections
too. So a rank that ends with an error records it first. A rank that is gone without a record was killed or has crashed.
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
"""Seconds for a rank of another machine to answer a roll call. Every rank checks for roll calls every `_LOOK_S` seconds. A rank
counts as lost if all its Python threads are blocked this long by one library call that holds the GIL."""

_LOOK_S, _POLL_S = 0.5, 0.05
_STORE_S = 5.0
"""Seconds for the store to answer. Its requests have no timeout of their own, and its machine may have lost power."""

T = TypeVar("T")


class RankProcess(NamedTuple):
    """The process of a rank. system: its kernel and pid namespace, within which other ranks can look up its pid; "" if unknown,
    as on systems other than Linux. start_time: distinguishes it from a later process with the same pid."""

    host: str
    pid: int
    system: str
    start_time: str

    @classmethod
    def own(cls) -> RankProcess:
        """The `RankProcess` of this process."""
        host, pid = socket.gethostname(), os.getpid()
        if sys.platform != "linux":
            return cls(host, pid, "", "")
        try:
            boot, namespace = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
        except OSError:  # a sandbox
            return cls(host, pid, "", "")
        start_time = _start_time(pid)  # None if /proc shows the processes of another pid namespace
        return cls(host, pid, f"{boot} {namespace}", start_time) if start_time else cls(host, pid, "", "")

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


class RankLiveness:
    """Liveness of a job's ranks. store: the job's; several threads use it, so none may block in it. processes: of all ranks."""

    def __init__(self, store: dist.Store, rank: int, processes: Sequence[RankProcess]) -> None:
        self._store, self.rank, self._processes = store, rank, list(processes)
        self._lost: set[int] = set()
        self._is_stopped = self._store_is_silent = False
        own = processes[rank].system
        self._local = {other for other, process in enumerate(processes) if process.system and process.system == own}
        self._remote = [other for other in range(len(processes)) if other not in self._local and other != rank]
        if self._remote:  # ranks of one machine look each other up, without a thread that answers
            threading.Thread(target=self._answer, name="roll_call", daemon=True).start()

    @classmethod
    def of_job(cls) -> RankLiveness:
        """Create it on every rank. A collective."""
        processes = [RankProcess.own()] * dist.get_world_size()
        if len(processes) > 1:
            dist.all_gather_object(processes, RankProcess.own())
        return cls(own_connection(job_store()), dist.get_rank(), processes)

    def report_failure(self, why: str) -> None:
        """Record that this rank ends with the error `why`. Call it before its connections to other ranks are closed."""

        def report() -> None:
            self._store.set(f"left/{self.rank}", why)
            if self._store.add("leaving", 1) == 1:
                self._store.set("first", str(self.rank))

        self._ask(report, None)

    def mark_stopped(self) -> None:
        """Record that the job was asked to stop while all ranks were alive. A later error does not make it a failed job."""
        self._is_stopped = True
        self._ask(lambda: self._store.set("stopped", ""), None)

    @property
    def is_stopped(self) -> bool:
        """Whether a rank has called `mark_stopped`. This is remembered, because the store may end before this rank."""
        self._is_stopped = self._is_stopped or self._read("stopped") is not None
        return self._is_stopped

    def check_after_sigterm(self) -> str | None:
        """Call it when this rank is asked to stop. Calls `mark_stopped` if all ranks are alive, else returns what
        `find_failure` found.

        All ranks may be asked at once. Then only the first rank of each machine calls the roll; the others wait for its result.
        """
        if self.is_stopped:
            return None
        failure = self.find_failure()
        if failure is None and self._remote and not self._probes:
            deadline = time.monotonic() + ANSWER_S + _LOOK_S
            while not self.is_stopped and (failure := self._read("lost")) is None and time.monotonic() < deadline:
                time.sleep(_LOOK_S)
            if not self.is_stopped and failure is None:
                failure = self.find_failure(everywhere=True)
        if failure is None:
            self.mark_stopped()
        elif self._probes:
            self._ask(lambda: self._store.set("lost", failure), None)
        return failure

    @property
    def _probes(self) -> bool:
        """Whether this rank probes other machines: only the first rank of a machine does, to limit the load of the store."""
        return self.rank == min(self._local | {self.rank})

    def find_failure(self, patience_s: float = 0.0, *, everywhere: bool = False) -> str | None:
        """Which ranks are lost; if none is, which other rank first ended with an error, and why; None if all are alive.

        patience_s: seconds to wait for a rank of this machine to end, if its connections are closed. everywhere: call the roll
        of other machines even if this rank is not the first of its machine, which always does.
        """
        deadline = time.monotonic() + patience_s
        others = self._local - {self.rank}
        while not (gone := [rank for rank in others if self._has_ended(rank)]) and self._first() is None:
            if not others or time.monotonic() >= deadline:
                break
            time.sleep(_POLL_S)
        found = []
        if gone:
            found.append(f"{self._named(gone)} ended without a word, as after SIGKILL")
        silent = self._silent() if everywhere or self._probes else []
        self._lost |= {*gone, *(silent or ())}
        if silent is None:
            found.append("the job's store, which tells of ranks of other machines, gave no answer")
        elif silent:
            found.append(f"{self._named(silent)} gave no answer within {ANSWER_S:g} s")
        first = self._first()
        if not found and first is not None:
            found.append(f"{self._named([first])} failed: {self._read(f'left/{first}')}")
        return "; ".join(found) or None

    @property
    def is_reporter(self) -> bool:
        """Whether this rank reports for the job: it is rank 0, or `find_failure` has found all ranks before it lost."""
        return self._lost.issuperset(range(self.rank))

    def _first(self) -> int | None:
        """The first rank that ended with an error; None if there is none, or it is this rank."""
        found = self._read("first")
        return None if found is None or int(found) == self.rank else int(found)

    def _has_reported(self, rank: int) -> bool:
        return self._read(f"left/{rank}") is not None

    def _has_ended(self, rank: int) -> bool:
        """Whether a rank of this machine has ended without `report_failure`."""
        process = self._processes[rank]
        return _start_time(process.pid) != process.start_time and not self._has_reported(rank)

    def _silent(self) -> list[int] | None:
        """Ranks of other machines that neither answer nor have called `report_failure`; None if the store does not answer."""
        silent: list[int] | None = self._remote
        if not silent:
            return []
        number, deadline = self._ask(lambda: self._store.add("calls", 1), 0), time.monotonic() + ANSWER_S

        def unanswered(ranks: Sequence[int]) -> list[int]:
            keys = {rank: (f"here/{number}/{rank}", f"left/{rank}") for rank in ranks}
            return [rank for rank in ranks if not any(self._store.check([key]) for key in keys[rank])]

        while number and silent and time.monotonic() < deadline:
            time.sleep(_LOOK_S)  # enough for nearly all ranks to answer
            silent = self._ask(partial(unanswered, silent), None)
        return silent if number else None

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
        """Run `work`, which uses the store, and return its result; `otherwise` if the store is gone or does not answer."""
        found: list[T] = []

        def run() -> None:
            with suppress(RuntimeError):
                found.append(work())

        if not self._store_is_silent:
            thread = threading.Thread(target=run, name="rank_liveness", daemon=True)
            thread.start()
            thread.join(_STORE_S)
            self._store_is_silent = thread.is_alive()
        return found[0] if found else otherwise

    def _named(self, ranks: Sequence[int]) -> str:
        names = ", ".join(f"{rank} ({self._processes[rank]})" for rank in sorted(ranks))
        return f"rank{'s' * (len(ranks) > 1)} {names}"


def _start_time(pid: int) -> str | None:
    """Start time of a process of this machine, in clock ticks; None if it has ended, even if it is still a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()
