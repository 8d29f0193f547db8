"""A persistent gang of gloo ranks: started once per world size, it runs functions by name on every rank.

gang.run("tests.policy_jobs:logprobs", tp=2) calls that function with those arguments on every rank and returns the list of what
they returned. A rank that raises fails the test with its traceback; a call over its deadline kills the gang.
"""

from __future__ import annotations

import os
import pickle
import selectors
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_MOST_THREADS = 200
"""A worker has about 60 to begin with."""


class Gang:
    """`world` worker processes that form one torch.distributed world over a file store."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._store = tempfile.mkdtemp(prefix="gang")
        self._workers = [self._start(rank) for rank in range(world)]

    def _start(self, rank: int) -> subprocess.Popen:
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world),
            "GANG_STORE": f"file://{self._store}/store",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, "-m", "tests.gang_worker"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT)

    @property
    def alive(self) -> bool:
        return all(worker.poll() is None for worker in self._workers)

    @property
    def is_worn_out(self) -> bool:
        """Whether process groups of layouts long gone have left too many threads, three polling ones each, in a worker."""
        return any(len(os.listdir(f"/proc/{worker.pid}/task")) > _MOST_THREADS for worker in self._workers)

    def run(self, function: str, *, deadline_s: float = 180.0, **arguments: Any) -> list[Any]:
        message = pickle.dumps((function, arguments))
        for worker in self._workers:
            worker.stdin.write(struct.pack("<Q", len(message)) + message)
            worker.stdin.flush()
        replies = self._collect(function, time.monotonic() + deadline_s)
        failed = [(rank, text) for rank, (ok, text) in sorted(replies.items()) if not ok]
        if failed:
            self.stop()
            raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in failed))
        return [replies[rank][1] for rank in range(self.world)]

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
                        deadline = min(deadline, time.monotonic() + 5.0)
        return replies

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()


class Gangs:
    """`gangs(n)` is the gang of n ranks; one that a failed test killed, or that is worn out, is started anew."""

    def __init__(self) -> None:
        self._running: dict[int, Gang] = {}

    def __call__(self, world: int) -> Gang:
        gang = self._running.get(world)
        if gang is None or not gang.alive or gang.is_worn_out:
            if gang is not None:
                gang.stop()
            gang = self._running[world] = Gang(world)
        return gang

    def stop(self) -> None:
        for gang in self._running.values():
            gang.stop()
