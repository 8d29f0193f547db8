"""A pool's handle of one worker process: non-blocking pipes, requests in flight, and the times for their deadlines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etr_megatron.platform.lifetime import kill_trees, popen_from_lasting_thread

_READ_BYTES = 1 << 16
_CLOSE_GRACE_S = 1.0


@dataclass(slots=True)
class Job:
    """A request in flight. key: the caller's name for it. crashes: number of workers that ended while they worked on it (a
    concurrent worker works on all its requests). sent: `time.monotonic()` when a piece of it was last written to the worker."""

    key: int
    line: bytes
    crashes: int = 0
    sent: float = 0.0


class WorkerProcess:
    """A started worker. Not thread-safe; the pool's calling thread drives it.

    concurrent: whether it works on all its requests concurrently, or on one after the other. Known once it is ready.
    inflight: jobs that were written or are queued for writing, by key, in this order.
    head_since: start of the time limit of the first job, as `time.monotonic()`; None without jobs. It is the time when the
        previous reply arrived or the last piece of the request was written, whichever is later. While a long reply arrives in
        pieces, it is the time of the latest piece. Startup does not count against the time limit.
    heard: when a piece of a reply last arrived.
    """

    def __init__(self, module: str, config: str) -> None:
        """Start `python -m module PID config`, where PID is this process; see `worker_main.serve`."""
        self._process: subprocess.Popen[bytes] = popen_from_lasting_thread(
            [sys.executable, "-m", module, str(os.getpid()), config],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=False,
            env=_environment(),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        for stream in (self._stdin, self._stdout):
            os.set_blocking(stream.fileno(), False)
        self.pid = self._process.pid
        self.started = time.monotonic()
        self.ready = self.concurrent = False
        self.inflight: dict[int, Job] = {}
        self.head_since: float | None = None
        self.heard = self.started
        self._outgoing = bytearray()
        self._incoming = bytearray()

    @property
    def read_fd(self) -> int:
        """Descriptor that becomes readable with replies and when the worker ends."""
        return self._stdout.fileno()

    @property
    def write_fd(self) -> int:
        """Descriptor that takes requests."""
        return self._stdin.fileno()

    @property
    def wants_to_write(self) -> bool:
        """Whether queued requests are still waiting for room in the pipe."""
        return bool(self._outgoing)

    def send(self, job: Job) -> None:
        """Queue a request and write what fits into the pipe."""
        job.sent = time.monotonic()
        if not self.inflight:
            self.head_since = job.sent
        self.inflight[job.key] = job
        self._outgoing += job.line
        self.flush()

    def flush(self) -> None:
        """Write what fits into the pipe of the queued requests. A dead worker is detected by the end of its output."""
        try:
            written = os.write(self.write_fd, self._outgoing)
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._outgoing.clear()
            return
        now, left = time.monotonic(), len(self._outgoing)
        for job in reversed(self.inflight.values()):
            if left <= 0:
                break
            job.sent = now  # a long request is written in pieces
            left -= len(job.line)
        else:
            self.head_since = now
        del self._outgoing[:written]

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """(complete messages, whether the worker's output has ended). Reads what is available, without waiting."""
        ended = False
        known = len(self._incoming)
        while True:
            try:
                chunk = os.read(self.read_fd, _READ_BYTES)
            except BlockingIOError:
                break
            if not chunk:
                ended = True
                break
            self._incoming += chunk
            self.heard = time.monotonic()
        if self._incoming.find(b"\n", known) < 0:
            if len(self._incoming) > known and self.inflight:
                self.head_since = time.monotonic()  # the reply has begun, and is longer than the pipe's buffer
            return [], ended
        *lines, rest = bytes(self._incoming).split(b"\n")
        self._incoming = bytearray(rest)
        return [json.loads(line) for line in lines], ended

    def finish(self, key: int) -> None:
        """Forget the job whose reply arrived, and start the clock of the next one."""
        del self.inflight[key]
        self.head_since = time.monotonic() if self.inflight else None

    def reap(self) -> str:
        """Wait for the worker, which has ended or been killed, and close its pipes; returns how it ended."""
        code = self._process.wait()
        self._stdin.close()
        self._stdout.close()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def end_input(self) -> None:
        """Close the worker's input, so that it exits by itself when it is idle."""
        self._stdin.close()

    def close(self, deadline: float) -> bool:
        """After `end_input`: wait for the worker until `deadline` (`time.monotonic()`); returns whether it has ended."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        self._stdout.close()
        return True


def close_all(processes: list[WorkerProcess]) -> None:
    """End processes concurrently; kill those that do not exit within a second."""
    deadline = time.monotonic() + _CLOSE_GRACE_S
    for process in processes:
        process.end_input()
    kill_all([process for process in processes if not process.close(deadline)])


def kill_all(processes: list[WorkerProcess]) -> list[str]:
    """SIGKILL processes that still run, with all their descendants; returns how each process ended."""
    kill_trees([process.pid for process in processes])
    return [process.reap() for process in processes]


def _environment() -> dict[str, str]:
    """The parent's environment, with our package's root on PYTHONPATH. (`import_function` adds the working directory.)"""
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
