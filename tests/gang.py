"""A persistent gang of gloo ranks: started once per world size, it runs functions by name on every rank.

gang.run("tests.policy_jobs:logprobs", tp=2) calls that function with those arguments on every rank and returns the list of what
they returned. A rank that raises fails the test with its traceback; a call over its deadline kills the gang.

Ranks are forked from one process (tests/gang_worker.py) that has imported what most of them need, which takes seconds. Between
two calls they are stopped: gloo's threads, dozens in a rank, look a hundred times a second whether anything has come, and a
dozen idle ranks took a quarter of two cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import signal
import socket
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


class _Nursery:
    """The process that workers are forked from; its environment is what there is when it is made. imports: of its own."""

    def __init__(self, *imports: str) -> None:
        self._socket, theirs = socket.socketpair()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "tests.gang_worker", *imports]
        with theirs:
            self._process = subprocess.Popen(command, stdin=theirs, env=env, cwd=ROOT)
        self._replies = self._socket.makefile("r")

    def ask(self, request: dict[str, Any], *files: int) -> int:
        """The answer to `{"start": environment}` with the worker's stdin and stdout, its pid; or to `{"poll"|"end": pid}`,
        whether it has ended."""
        socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], files)
        return int(self._replies.readline())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._replies.close()
        self._socket.close()


class _Worker:
    """A rank. It is reaped when it is killed here, not before, so that the pid is its own until then."""

    def __init__(self, nursery: _Nursery, environment: dict[str, str]) -> None:
        self._nursery = nursery
        (stdin, ours), (theirs, stdout) = os.pipe(), os.pipe()
        self.pid = nursery.ask({"start": environment}, stdin, stdout)
        os.close(stdin)
        os.close(stdout)
        self.stdin, self.stdout = os.fdopen(ours, "wb"), os.fdopen(theirs, "rb")

    @property
    def alive(self) -> bool:
        return not self.stdout.closed and not self._nursery.ask({"poll": self.pid})

    def signal(self, number: int) -> None:
        if not self.stdout.closed:
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.stdout.closed:
            return
        os.kill(self.pid, signal.SIGKILL)
        self._nursery.ask({"end": self.pid})
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()


class Gang:
    """`world` worker processes that form one torch.distributed world over a file store. nursery: of its own without one."""

    def __init__(self, world: int, nursery: _Nursery | None = None) -> None:
        self.world = world
        self._store = tempfile.mkdtemp(prefix="gang")
        self._own_nursery = None if nursery else _Nursery()
        self._workers = [self._start(nursery or self._own_nursery, rank) for rank in range(world)]

    def _start(self, nursery: _Nursery, rank: int) -> _Worker:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)}
        return _Worker(nursery, {**ranks, "GANG_STORE": f"file://{self._store}/store"})

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

    imports: modules that their process has before it forks; none if there is a GPU, as importing Megatron may initialise CUDA,
    which forked processes then cannot use.
    """

    def __init__(self, *imports: str) -> None:
        self._imports = () if os.path.exists("/dev/nvidiactl") else imports
        self._nursery: _Nursery | None = None
        self._running: dict[int, Gang] = {}

    def __call__(self, world: int) -> Gang:
        gang = self._running.get(world)
        if gang is None or not gang.alive or gang.is_worn_out:
            if gang is not None:
                gang.stop()
            self._nursery = self._nursery or _Nursery(*self._imports)
            gang = self._running[world] = Gang(world, self._nursery)
        return gang

    def stop(self) -> None:
        for gang in self._running.values():
            gang.stop()
        if self._nursery:
            self._nursery.stop()
