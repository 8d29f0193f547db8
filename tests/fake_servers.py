"""External fake SGLang servers (tests/fake_sglang.py), forked from one process of the test session.

    with servers({}, {"die_at": 5}) as (first, second): ...

Their imports take longer than most of their tests, so the process that they are forked from does them once. This module, run as
a program, is that process: it reads lines of JSON, `{"start": BEHAVIOUR}` or `{"end": PID}`, and answers each with a line, a
server's `[pid, port]` or null. It does not reap a server until told to end it, so that the pid stays the server's.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from tests.runs import REPO


class _Nursery:
    """The session's handle of the process that servers are forked from."""

    def __init__(self) -> None:
        command, pipe = [sys.executable, "-m", "tests.fake_servers"], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPO)

    def ask(self, **request: Any) -> Any:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


_nursery: _Nursery | None = None


@contextlib.contextmanager
def servers(*behaviours: dict) -> Iterator[tuple[str, ...]]:
    """Addresses of one server per behaviour; the servers are killed at the end."""
    global _nursery
    _nursery = _nursery or _Nursery()  # it ends with this process
    with contextlib.ExitStack() as stack:
        urls = []
        for behaviour in behaviours:
            pid, port = _nursery.ask(start=behaviour)
            stack.callback(_nursery.ask, end=pid)
            urls.append(f"http://127.0.0.1:{port}")
        yield tuple(urls)


def patient_with(clients: Iterable[Any]) -> None:
    """Whatever a test's deadline for a server that hangs, these, which are well, may be as slow as the machine is.

    One of them that hangs until it is started again is found at once by what a weight sync asks failed servers first.
    """
    for client in clients:
        client._request, client._complete = _patient(client._request), partial(_complete_patiently, client._complete)


def _patient(request: Callable[..., Any]) -> Callable[..., Any]:
    from etr_megatron.rollout.sglang.control import _HEALTH_S

    def patient(method: str, route: str, body: Any, timeout_s: float | None) -> Any:
        is_first = route == "/abort_request" and timeout_s == _HEALTH_S
        return request(method, route, body, timeout_s if is_first else 600.0)

    return patient


def _complete_patiently(complete: Callable[..., Any], body: Any, _: float) -> Any:
    return complete(body, 600.0)


@contextlib.contextmanager
def impatient_with(
    client: Any, seconds: float, broadcast: int | None = None, routes: Sequence[str] | None = None
) -> Iterator[None]:
    """A short deadline for requests to this server, which hangs; those to the others, which are well, keep the test's own.

    broadcast: number, from 0, of the broadcast of weights that it does not join. It gets the same deadline, because gloo does
    not end a broadcast that is under way when its group is closed. routes: all requests if None, else only these.
    """
    from torch.distributed import distributed_c10d as c10d

    from etr_megatron.rollout.sglang.update_group import UpdateGroup

    request, send, numbers = client._request, UpdateGroup.broadcast, itertools.count()

    def limited(method: str, route: str, body: Any, timeout_s: float | None) -> Any:
        if routes is not None and route not in routes:
            return request(method, route, body, timeout_s)
        assert timeout_s is None or timeout_s <= 120.0  # it had a deadline of its own, the longest of all tests'
        return request(method, route, body, timeout_s and min(timeout_s, seconds))

    def limited_once(group: UpdateGroup, flat: Any) -> None:
        if next(numbers) == broadcast:
            c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group._group)
        send(group, flat)

    client._request, UpdateGroup.broadcast = limited, limited_once
    try:
        yield
    finally:
        client._request, UpdateGroup.broadcast = request, send


def _fork(behaviour: dict[str, Any]) -> list[int]:
    """[pid, port] of a new server."""
    reads, writes = os.pipe()
    nursery, pid = os.getpid(), os.fork()
    if pid:
        os.close(writes)
        with os.fdopen(reads) as port:
            return [pid, int(port.readline())]
    try:
        sys.stdin.close()
        os.dup2(writes, 1)  # the server prints its port
        os.close(writes)
        from etr_megatron.platform.lifetime import die_with_parent
        from tests import fake_sglang

        die_with_parent(nursery)
        fake_sglang.BEHAVIOUR.update(behaviour)
        server = fake_sglang.start()
        os.dup2(2, 1)
        server.join()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def main() -> None:
    sys.argv[1:] = ["{}"]
    from tests import fake_sglang  # noqa: F401  (what servers are forked with)

    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            found = _fork(request["start"])
        else:
            found = None
            os.kill(request["end"], signal.SIGKILL)
            os.waitpid(request["end"], 0)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
