"""Servers that start warm: they and their watchdogs are forks of a process that has their imports (tests/nursery.py).

These imports take most of the time of a start. All else is as otherwise: the watchdog runs the server in a session of its own,
and ends it when its pipe closes. /proc shows the nursery's command line and environment. Servers of whole runs start cold, by
their command, unless the run has the module tests/warm_run.py.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

from etr_megatron.rollout.sglang import server
from tests.nursery import Nursery
from tests.warm import IS_POSSIBLE, Process

_ADDRESSES: dict[str, str] = {}
"""Of nurseries, by their interpreter."""


@functools.cache
def real_nursery(python: str) -> Nursery:
    """The test session's nursery of real servers. python: the interpreter of SGLang's environment."""
    return Nursery("tests.sglang_cpu.warm", python=python)


@functools.cache
def _client(address: str) -> Nursery:
    return Nursery.at(address)


def _start(command: Sequence[str], *, pass_fds: Any = (), stdout: IO[bytes], env: dict[str, str], **more: Any) -> Any:
    """`subprocess.Popen` for the command of a watchdog."""
    address = _ADDRESSES.get(command[4])
    if address is None:
        return subprocess.Popen(command, pass_fds=pass_fds, stdout=stdout, env=env, **more)
    nursery, (stdin, ours) = _client(address), os.pipe()
    files = (stdin, stdout.fileno(), *pass_fds)
    pid = nursery.start("tests.warm_watchdog:watch", *files, command=[*command], environment=env)
    os.close(stdin)
    process = Process(pid, lambda: nursery.end(pid))
    process.stdin = os.fdopen(ours, "wb")
    return process


_WARM = SimpleNamespace(**{**vars(subprocess), "Popen": _start})


def start_warm(on: bool = True, real: str | None = None) -> None:
    """In a gang's rank: from now on fake servers start warm, or not. real: also real ones, see `real_in_gangs`."""
    if IS_POSSIBLE:
        _ADDRESSES[sys.executable] = os.environ["NURSERY"]
        server.subprocess = _WARM if on else subprocess
        if real is not None:
            address, _, python = real.partition(":")
            _ADDRESSES[python] = address


def real_in_gangs(python: str) -> dict[str, str]:
    """A setting of `sglang_jobs.engine_of` with which real servers start warm. python: of SGLang's environment."""
    return {"real": f"{real_nursery(python).address}:{python}"} if IS_POSSIBLE else {}


@contextlib.contextmanager
def real_servers_start_warm(python: str) -> Iterator[None]:
    """In this context, in the tests' process. python: the interpreter of SGLang's environment."""
    if not IS_POSSIBLE:
        yield
        return
    with mock.patch.dict(_ADDRESSES, {python: real_nursery(python).address}), mock.patch.object(server, "subprocess", _WARM):
        yield
