"""Programs that start warm: forks of a process that has the imports of most of them (tests/nursery.py).

These imports take most of the time of a small run. All else is as after `python -m etr_megatron.launch ...`: the ranks are
children of the launcher, in sessions of their own, which torchrun watches, and each process imports its entry point and the
user's functions. /proc shows the nursery's command line and environment, nothing is done at the interpreter's exit, and all
forks have the same hash seed.
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from etr_megatron.platform.lifetime import die_with_parent
from etr_megatron.status import run_and_exit
from tests.nursery import CAN_IMPORT, IGNORED, ROOT, of_session


def _is_possible() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return CAN_IMPORT


IS_POSSIBLE = _is_possible()
"""Otherwise programs start as usual."""


class Process:
    """What tests and torchrun use of `subprocess.Popen`, for a process that was forked otherwise.

    reap: waits for it to end and returns its exit code.
    """

    def __init__(self, pid: int, reap: Callable[[], int], stdout: IO[str] | None = None, stderr: IO[str] | None = None) -> None:
        self.pid, self.returncode = pid, None
        self.stdout, self.stderr = stdout, stderr
        self._reap = reap
        self._end = os.pidfd_open(pid)

    def poll(self) -> int | None:
        if self.returncode is None and self._has_ended(0.0):
            self.returncode = self._reap()
            os.close(self._end)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not self._has_ended(timeout):
            raise subprocess.TimeoutExpired("a fork", timeout)
        return self.poll()

    def _has_ended(self, timeout: float | None) -> bool:
        end = select.poll()
        end.register(self._end, select.POLLIN)
        return bool(end.poll(None if timeout is None else 1000 * timeout))

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        end = None if timeout is None else time.monotonic() + timeout
        said: dict[IO[str], str] = {}
        streams = (self.stdout, self.stderr)
        readers = [threading.Thread(target=lambda one=one: said.update({one: one.read()}), daemon=True) for one in streams]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if end is None else max(0.0, end - time.monotonic()))
        if any(reader.is_alive() for reader in readers):
            raise subprocess.TimeoutExpired("a fork", timeout)
        for stream in streams:
            stream.close()
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        return said[self.stdout], said[self.stderr]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            stream.close()
        self.wait()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    command: Sequence[str], environment: dict[str, str], output: Path | None = None, **how: Any
) -> subprocess.Popen[str] | Process:
    """`python -m MODULE ARGUMENTS...`, `python SCRIPT ARGUMENTS...` or `python -c CODE ARGUMENTS...` in the repository, with
    pipes as stdout and stderr.

    output: a file that both go to instead. how: see `enter`; of use only where warm starts are possible.
    """
    if output is None:
        (out, stdout), (err, stderr) = os.pipe(), os.pipe()
        ours = [os.fdopen(out), os.fdopen(err)]
    else:
        stdout = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        stderr, ours = os.dup(stdout), [None, None]
    if IS_POSSIBLE:
        process = _fork(command, environment, stdout, stderr, **how)
    else:
        stdin = subprocess.DEVNULL
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=stdin, stdout=stdout, stderr=stderr, text=True)
    process.stdout, process.stderr = ours
    for file in (stdout, stderr):
        os.close(file)
    return process


def _fork(command: Sequence[str], environment: dict[str, str], stdout: int, stderr: int, **how: Any) -> Process:
    nursery, stdin = of_session(), os.open(os.devnull, os.O_RDONLY)
    pid = nursery.start("tests.warm:enter", stdin, stdout, stderr, command=[*command], environment=environment, **how)
    os.close(stdin)
    return Process(pid, lambda: nursery.end(pid))


class Subprocess:
    """What benchmarks use of the module `subprocess`; Python starts warm. Output that goes to no file is the test's."""

    DEVNULL, STDOUT, TimeoutExpired = subprocess.DEVNULL, subprocess.STDOUT, subprocess.TimeoutExpired

    class Popen:
        __class_getitem__ = classmethod(types.GenericAlias)  # local variables are annotated with `subprocess.Popen[bytes]`

        def __new__(cls, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes] | Process:
            if not IS_POSSIBLE or command[0] != sys.executable:
                return subprocess.Popen(command, **options)
            assert options.keys() <= {"cwd", "env", "stdin", "stdout", "stderr", "start_new_session"}
            assert options.get("cwd", ROOT) == ROOT and options.get("stdin", subprocess.DEVNULL) == subprocess.DEVNULL
            if command[1] == "-c" and command[3] == str(os.getpid()):
                command = [*command[:3], str(of_session().pid), *command[4:]]  # it checks that this is its parent
            out, err, session = options.get("stdout"), options.get("stderr"), options.get("start_new_session", False)
            with open(os.devnull, "w") as nothing:
                out = nothing if out == subprocess.DEVNULL else out
                stdout = 1 if out is None else out.fileno()
                stderr = stdout if err == subprocess.STDOUT else 2
                return _fork(command, options.get("env") or {**os.environ}, stdout, stderr, session=session)

    @classmethod
    def run(cls, command: Sequence[str], *, check: bool = False, **options: Any) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.CompletedProcess(command, cls.Popen(command, **options).wait())
        if check:
            done.check_returncode()
        return done


def enter(
    files: list[int],
    command: list[str],
    environment: dict[str, str],
    host: str | None = None,
    spares: int = 0,
    privileged: bool = True,
    session: bool = False,
) -> NoReturn:
    """In a fork of the nursery: become the program.

    files: its stdin, stdout and stderr. host: the network namespace that it and its ranks are in, in a session of their own.
    spares: how many ranks start warm besides the first two, or when torchrun starts its ranks again. privileged: whether it
    keeps the privileges of root. session: whether it begins a session of its own; so it does on another host.
    """
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    warnings.filters.remove(IGNORED)
    gc.enable()
    if session or host is not None:
        os.setsid()
    if host is not None:
        _move_to(host)
    if not privileged:
        _drop_privileges()
    starts_ranks = re.search(r"\betr_megatron\.launch\b|\btorch\.distributed\.run\b", "\n".join(command[:4]))
    _prepare_torchrun([_Blank() for _ in range(2 + spares)] if starts_ranks else [], spares)
    _become(command, environment)


def _move_to(host: str) -> None:
    """As `ip netns exec` does but for /sys, and with a /dev/shm of its own: processes that share one take themselves for one
    machine's."""
    new_mounts, new_network, private = 0x20000, 0x40000000, 0x44000  # CLONE_NEWNS, CLONE_NEWNET, MS_REC | MS_PRIVATE
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{host}") as namespace:
        failed = (
            libc.setns(namespace.fileno(), new_network)
            or libc.unshare(new_mounts)
            or libc.mount(b"none", b"/", None, ctypes.c_ulong(private), None)
            or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", ctypes.c_ulong(0), None)
        )
    if failed:
        raise OSError(ctypes.get_errno(), f"cannot move to {host}")


def _drop_privileges() -> None:
    """As `setpriv --bounding-set=-all --inh-caps=-all` does."""
    libc = ctypes.CDLL(None, use_errno=True)
    version_3, pr_capbset_drop = 0x20080522, 24
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    failed = any(libc.prctl(pr_capbset_drop, number, 0, 0, 0) for number in range(last + 1))
    if failed or libc.capset((ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "cannot drop privileges")


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Go on as `python [-u] -m MODULE ARGUMENTS...`, `python [-u] SCRIPT ARGUMENTS...` or `python -c CODE ARGUMENTS...`"""
    os.environ.clear()
    os.environ.update(environment)
    if "RANK" in environment:
        Path("/proc/self/comm").write_text(f"rank {environment['RANK']}")  # /proc/self/environ keeps the nursery's
    arguments = command[1:]
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, "w", closefd=False), errors=errors, write_through=True)
            for number, errors in ((1, "strict"), (2, "backslashreplace"))
        )
    if not arguments[0].startswith("-"):
        sys.argv[:] = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        run_and_exit(lambda: runpy.run_path(arguments[0], run_name="__main__") and 0)
    option, program, *sys.argv[1:] = arguments
    sys.argv[0] = option
    if option == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        run_and_exit(lambda: exec(program, vars(main)) or 0)
    assert option == "-m"
    run_and_exit(lambda: runpy.run_module(program, run_name="__main__", alter_sys=True) and 0)


class _Blank:
    """A child of a launcher, forked before that does anything else, which waits to become one of its ranks."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        launcher, self.pid = os.getpid(), os.fork()
        if self.pid:
            theirs.close()
            return
        try:
            die_with_parent(launcher)
            self._socket.close()
            os.setsid()  # as torchrun wants it
            with theirs, theirs.makefile("rw") as stream:
                line = stream.readline()
                stream.write("ready\n")
            _become(**json.loads(line))
        finally:
            os._exit(1)

    def become(self, command: Sequence[str], environment: dict[str, str]) -> Process:
        with self._socket, self._socket.makefile("rw") as stream:
            stream.write(json.dumps({"command": [*command], "environment": environment}) + "\n")
            stream.flush()
            assert stream.readline() == "ready\n"
        return Process(self.pid, self._reap)

    def end(self) -> None:
        self._socket.close()
        os.kill(self.pid, signal.SIGKILL)
        self._reap()

    def _reap(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _prepare_torchrun(blanks: list[_Blank], spares: int) -> None:
    """Ranks are started in these while there are any; but for the spare ones, those that are not needed end."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    popen = SubprocessHandler._popen

    def given(handler: Any, args: tuple[str, ...], env: dict[str, str]) -> Any:
        while len(blanks) > spares + int(env["LOCAL_WORLD_SIZE"]) - int(env["LOCAL_RANK"]):
            blanks.pop().end()
        is_rank = [*args[:2]] == [sys.executable, "-u"] and not handler._stdout and not handler._stderr
        return blanks.pop().become(args, env) if blanks and is_rank else popen(handler, args, env)

    SubprocessHandler._popen = given
    # For names in its log torch describes whole stacks, which takes seconds with this many modules.
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name
