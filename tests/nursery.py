"""A process that others are forked from, which saves them the seconds of their imports:

    python -m tests.nursery FD MODULE...

It imports the modules and reads requests, a line of JSON each, from a socket that is its stdin. `Nursery` is a test's handle.
Other processes connect to the socket that the file descriptor FD listens at, see `Nursery.at`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
import weakref
from pathlib import Path
from typing import Any

from etr_megatron.platform.lifetime import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
_AT_START = {**os.environ}
"""Before any test changes it for itself."""

_OF_GANGS = ("tests.rollout_jobs",)
_OF_PROGRAMS = (
    "etr_megatron.convert",
    "etr_megatron.evaluation",
    "etr_megatron.metrics",
    "etr_megatron.problem_sets",
    "etr_megatron.rollout.dialogues",
    "etr_megatron.rollout.sglang",
    "etr_megatron.trainer",
    "tokenizers.trainers",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.run",
    "transformers.models.qwen3.modeling_qwen3",
)
CAN_IMPORT = not os.path.exists("/dev/nvidiactl")


class Nursery:
    """The process.

    environment: of it, and of forks that are given no other; what there is when it is made if None. python: its interpreter.
    imports: modules that it has before it forks; none if there is a GPU, as importing Megatron may initialise CUDA, which
    forked processes then cannot use.
    """

    def __init__(self, *imports: str, environment: dict[str, str] | None = None, python: str = sys.executable) -> None:
        folder = tempfile.mkdtemp(prefix="nursery")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.address = f"{folder}/socket"
        ours, theirs = socket.socketpair()
        with theirs, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen()
            fd = listener.fileno()
            command = [python, "-m", "tests.nursery", str(fd), "torch.distributed", *(imports if CAN_IMPORT else ())]
            env = {**(environment or os.environ), "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, stdin=theirs, env=env, cwd=ROOT, pass_fds=(fd,))
        self._talk_through(ours)

    @classmethod
    def at(cls, address: str) -> Nursery:
        """The nursery of another process, which alone may `stop` it."""
        self = cls.__new__(cls)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        self.address = address
        self._talk_through(connection)
        return self

    @property
    def pid(self) -> int:
        """Of the process, which is the parent of all forks."""
        return self._process.pid

    def _talk_through(self, connection: socket.socket) -> None:
        self._socket, self._replies, self._lock = connection, connection.makefile("r"), threading.Lock()

    def start(self, function: str, *files: int, **arguments: Any) -> int:
        """The pid of a fork that calls `module:function` with copies of these file descriptors, a list, and the arguments."""
        return self._ask({"start": function, "arguments": arguments}, *files)

    def has_ended(self, pid: int) -> bool:
        """It is reaped at its `end`, not before, so that the pid is its own until then."""
        return bool(self._ask({"poll": pid}))

    def end(self, pid: int) -> int:
        """Wait for a fork to end; returns its exit code, or minus the signal that ended it."""
        return self._ask({"end": pid})

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._replies.close()
        self._socket.close()

    def _ask(self, request: dict[str, Any], *files: int) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], files)
            return int(self._replies.readline())


@functools.cache
def of_session() -> Nursery:
    """The one that a test session shares; it ends with this process."""
    return Nursery(*_OF_GANGS, *_OF_PROGRAMS, environment=_AT_START)


IGNORED = ("ignore", None, Warning, None, 0)
"""The filter of warnings during imports, and for those forks that leave it there."""


def _main() -> None:
    die_with_parent()
    gc.disable()  # during imports, collections take a fifth of the time
    warnings.simplefilter("ignore")
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # forks never look at, and so never copy, what is there
    first, listener = socket.socket(fileno=os.dup(0)), socket.socket(fileno=int(sys.argv[1]))
    with selectors.DefaultSelector() as ready:
        ready.register(first, selectors.EVENT_READ)
        ready.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is listener:
                    ready.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                try:
                    _serve(key.fileobj, ready)
                except (ConnectionError, EOFError):  # the other process has ended
                    if key.fileobj is first:
                        return
                    ready.unregister(key.fileobj)
                    key.fileobj.close()


def _serve(requests: socket.socket, ready: selectors.BaseSelector) -> None:
    """Answer one request. Raises EOFError when no more come."""
    data, files, _, _ = socket.recv_fds(requests, 1 << 16, 8)
    while not data.endswith(b"\n"):
        if not (more := requests.recv(1 << 16) if data else b""):
            raise EOFError
        data += more
    request = json.loads(data)  # one at a time: the next is sent only after the answer
    requests.sendall(f"{_answer(request, files, ready)}\n".encode())


def _answer(request: dict[str, Any], files: list[int], ready: selectors.BaseSelector) -> int:
    """See `Nursery`. ready: of sockets that a fork closes."""
    if "poll" in request:
        return int(os.waitid(os.P_PID, request["poll"], os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None)
    if "end" in request:
        return os.waitstatus_to_exitcode(os.waitpid(request["end"], 0)[1])
    nursery, pid = os.getpid(), os.fork()
    if not pid:
        code = 1
        try:
            die_with_parent(nursery)
            for key in [*ready.get_map().values()]:
                key.fileobj.close()
            ready.close()
            module, name = request["start"].split(":")
            getattr(importlib.import_module(module), name)(files, **request["arguments"])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)
    for file in files:
        os.close(file)
    return pid


if __name__ == "__main__":
    _main()
