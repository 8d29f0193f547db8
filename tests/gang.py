"""A persistent gang of gloo ranks: started once per world size, it runs functions by name on every rank.

gang.run("tests.policy_jobs:logprobs", tp=2) calls that function with those arguments on every rank and returns the list of what
they returned. A rank that raises fails the test with its traceback; a call over its deadline kills the gang.

Ranks (tests/gang_worker.py) are forked from one process that has imported what most of them need, which takes seconds. Between
two calls they are stopped: gloo's threads, dozens in a rank, look a hundred times a second whether anything has come, and a
dozen idle ranks took a quarter of two cores.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import struct
import tempfile
import time
from typing import Any

from tests.nursery import Nursery, of_session

_MOST_THREADS = 200
"""A worker has about 60 to begin with."""


class _Worker:
    """A rank. Its pid is its own until it is killed here."""

    def __init__(self, nursery: Nursery, environment: dict[str, str]) -> None:
        self._nursery = nursery
        (stdin, ours), (theirs, stdout) = os.pipe(), os.pipe()
        self.pid = nursery.start("tests.gang_worker:serve", stdin, stdout, environment=environment)
        os.close(stdin)
        os.close(stdout)
        self.stdin, self.stdout = os.fdopen(ours, "wb"), os.fdopen(theirs, "rb")

    @property
    def alive(self) -> bool:
        return not self.stdout.closed and not self._nursery.has_ended(self.pid)

    def signal(self, number: int) -> None:
        if not self.stdout.closed:
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.stdout.closed:
            return
        os.kill(self.pid, signal.SIGKILL)
        self._nursery.end(self.pid)
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()


class Gang:
    """`world` worker processes that form one torch.distributed world over a file store. nursery: of its own without one."""

    def __init__(self, world: int, nursery: Nursery | None = None) -> None:
        self.world = world
        self._store = tempfile.mkdtemp(prefix="gang")
        self._own_nursery = None if nursery else Nursery()
        self._workers = [self._start(nursery or self._own_nursery, rank) for rank in range(world)]

    def _start(self, nursery: Nursery, rank: int) -> _Worker:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)}
        return _Worker(nursery, {**ranks, "GANG_STORE": f"file://{self._store}/store", "NURSERY": nursery.address})

    @property
    def alive(self) -> bool:
        return all(worker.alive for worker in self._workers)

    @property
    def is_worn_out(self) -> bool:
        """Whether process groups of layouts long gone have left too many threads, three polling ones each, in a worker."""
        return any(len(os.listdir(f"/proc/{worker.pid}/task")) > _MOST_THREADS for worker in self._workers)

    def run(self, function: str, *, deadline_s: float = 600.0, **arguments: Any) -> list[Any]:
        message = pickle.dumps((function, arguments))
        self._signal(signal.SIGCONT)
        for worker in self._workers:
            worker.stdin.write(struct.pack("<Q", len(message)) + message)
            worker.stdin.flush()
        replies = self._collect(function, time.monotonic() + deadline_s)
        failed = [(rank, text) for rank, (ok, text) in sorted(replies.items()) if not ok]
        if failed:
            self.stop()
            raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in failed))
        self._signal(signal.SIGSTOP)
        return [replies[rank][1] for rank in range(self.world)]

    def _signal(self, number: int) -> None:
        for worker in self._workers:
            worker.signal(number)

    def _collect(self, function: str, deadline: float) -> dict[int, tuple[bool, Any]]:
        replies: dict[int, tuple[bool, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, worker in enumerate(self._workers):
                selector.register(worker.stdout, selectors.EVENT_READ, rank)
            while len(replies) < self.world:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                failed = any(not ok for ok, _ in replies.values())
                if not ready and failed:
                    break  # the others wait in a collective for the rank that raised
                if not ready:
                    self.stop()
                    missing = sorted(set(range(self.world)) - set(replies))
                    raise AssertionError(f"{function}: ranks {missing} gave no answer in time")
                for key, _ in ready:
                    header = key.fileobj.read(8)
                    if len(header) < 8:
                        self.stop()
                        raise AssertionError(f"{function}: rank {key.data} died")
                    replies[key.data] = pickle.loads(key.fileobj.read(struct.unpack("<Q", header)[0]))
                    selector.unregister(key.fileobj)
                    if not replies[key.data][0]:
                        deadline = min(deadline, time.monotonic() + 30.0)
        return replies

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
        if self._own_nursery:
            self._own_nursery.stop()


class Gangs:
    """`gangs(n)` is the gang of n ranks; one that a failed test killed, or that is worn out, is started anew.

    imports: modules that their process has before it forks, if not the session's.
    """

    def __init__(self, *imports: str) -> None:
        self._own_nursery = Nursery(*imports) if imports else None
        self._running: dict[int, Gang] = {}

    def __call__(self, world: int) -> Gang:
        gang = self._running.get(world)
        if gang is None or not gang.alive or gang.is_worn_out:
            if gang is not None:
                gang.stop()
            gang = self._running[world] = Gang(world, self._own_nursery or of_session())
        return gang

    def stop(self) -> None:
        for gang in self._running.values():
            gang.stop()
        if self._own_nursery:
            self._own_nursery.stop()
