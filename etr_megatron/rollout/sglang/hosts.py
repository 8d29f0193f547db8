"""The servers of one machine, managed by the process on that machine that starts them."""

from __future__ import annotations

import logging
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import httpx

from etr_megatron.platform.phases import StopAskedError
from etr_megatron.rollout.engine import MustStop, never
from etr_megatron.rollout.sglang.server import ServerCommand, ServerProcess

logger = logging.getLogger(__name__)

POLL_S = 0.5
_ASK_S = 5.0
_MAX_BYTES = 1 << 16


class Started(NamedTuple):
    """Result of a server's start: its URL, and why it does not serve (None if it does). port_taken: another process had taken
    its port, so another start may succeed."""

    url: str
    problem: str | None
    port_taken: bool = False


STARTS = 3
"""Number of starts, each at another port, after which a server is given up if other processes took its port every time."""


class Machine(ABC):
    """The processes of servers on one machine. commands: by server name. logs: directory for their output."""

    def __init__(self, commands: Mapping[str, ServerCommand], logs: Path, startup_timeout_s: float) -> None:
        self._commands, self._logs, self._timeout_s = dict(commands), logs, startup_timeout_s
        self._processes: dict[str, ServerProcess] = {}

    @abstractmethod
    def start(self, names: Iterable[str], must_stop: MustStop = never, attempt: str = "") -> dict[str, Started]:
        """Start or restart those of these servers that belong to this machine; wait until each answers or has failed.

        attempt: unique name of this start, for servers that span machines. Raises UserError when the interpreter does not
        exist, StopAskedError when `must_stop()` becomes true.
        """

    def _stop_to_start(self, names: Iterable[str]) -> None:
        """Stop those of these servers that run. Log the last output of those that have ended by themselves."""
        for name in names:
            process = self._processes.get(name)
            if process is not None and process.is_lost:
                logger.warning("%s had ended; its log, %s, ends:\n%s", self._called(name), process.log, process.last_words(5))
            self.stop([name])

    def _called(self, name: str) -> str:
        return name

    def stop(self, names: Iterable[str] | None = None) -> None:
        """Stop those of these servers (None: all) that run on this machine; wait until all their processes have ended."""
        for name in list(self._processes if names is None else names):
            if name in self._processes:
                self._processes.pop(name).stop()

    def _log_of(self, name: str) -> Path:
        return self._logs / f"{name.replace(' ', '_').lower()}.log"


class Host(Machine):
    """Whole servers on one machine."""

    def start(self, names: Iterable[str], must_stop: MustStop = never, attempt: str = "") -> dict[str, Started]:
        """See `Machine.start`."""
        own = [name for name in names if name in self._commands]
        self._stop_to_start(own)
        for name in own:
            self._launch(name)
        deadline = time.monotonic() + self._timeout_s
        return {name: self._wait_for(name, deadline, must_stop, starts=STARTS) for name in own}

    def _launch(self, name: str) -> None:
        self._processes[name] = ServerProcess(name, self._commands[name], self._log_of(name))

    def _wait_for(self, name: str, deadline: float, must_stop: MustStop, *, starts: int) -> Started:
        """starts: attempts left, including this one."""
        process = self._processes[name]
        while process.is_running:
            answers = is_ours(process)  # asked at least once, even if the servers before it used up all of the time
            if answers:
                self._keep_share(name)
                return Started(process.url, None)
            if answers is False:
                return self._move(name, must_stop, starts)
            if must_stop():
                raise StopAskedError(f"told to stop (SIGTERM) while waiting for {name}")
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_S)
        if process.is_running:
            process.stop()  # it will not be used, and if colocated, it would hold memory that the ranks need
            what = f"{name} did not answer within {self._timeout_s:g} s at {process.url}; its log is {process.log}"
            return Started(process.url, what)
        process.stop()
        # Search all output, not only its end: SGLang then sends its warm-up request to the process that took the port.
        if starts > 1 and process.missed_a_port:
            return self._move(name, must_stop, starts)
        return Started(process.url, f"{name} ended while it started; its log, {process.log}, ends:\n{process.last_words()}")

    def _keep_share(self, name: str) -> None:
        """If SGLang chose a colocated server's memory fraction, keep it for restarts, when the ranks hold memory too."""
        command = self._commands[name]
        if command.shares_gpus and command.memory is None:
            self._commands[name] = replace(command, memory=_share_of(self._processes[name]))

    def _move(self, name: str, must_stop: MustStop, starts: int) -> Started:
        """Restart a server at another port, because another process has taken its port."""
        process = self._processes[name]
        process.stop()
        if starts <= 1:
            what = f"{name} was started {STARTS} times, and each time another process had taken its port"
            return Started(process.url, f"{what}, last {process.url}")
        self._launch(name)
        return self._wait_for(name, time.monotonic() + self._timeout_s, must_stop, starts=starts - 1)


def _asked(url: str, headers: Mapping[str, str] | None = None) -> AbstractContextManager[httpx.Response]:
    """GET without proxies from environment variables; no request to a server uses these."""
    return httpx.stream("GET", url, timeout=_ASK_S, headers=headers, trust_env=False)


def _answers(url: str) -> bool:
    try:
        with _asked(f"{url}/health") as reply:  # streamed, so that an endless body does not block
            return reply.status_code == 200
    except httpx.HTTPError:
        return False


def is_ours(process: ServerProcess) -> bool | None:
    """Whether the process that answers at the server's port is the one that was started, by an identity unique to this start.

    A server that cannot report an identity is trusted. None: nothing answers yet, or the answer does not tell; ask again.
    """
    if not _answers(process.url):
        return None
    if process.told_by == "request_id":
        return _calls_a_request_so(process)
    return _says_its_version(process) if process.told_by == "weight_version" else True


def _calls_a_request_so(process: ServerProcess) -> bool | None:
    name = secrets.token_hex(8)
    try:
        with _asked(f"{process.url}/health", {process.identity: name}) as reply:
            return None if reply.status_code >= 500 else reply.headers.get("x-request-id") == name
    except httpx.HTTPError:
        return None


def _says_its_version(process: ServerProcess) -> bool | None:
    said = _said(process, "/model_info")
    return None if said is None else process.identity.encode() in said


def _share_of(process: ServerProcess) -> float | None:
    """The `--mem-fraction-static` that a server reports, even if it was started without this argument."""
    found = re.search(rb'"mem_fraction_static":\s*(0?\.\d+)', _said(process, "/server_info") or b"")
    return float(found[1]) if found else None


def _said(process: ServerProcess, route: str) -> bytes | None:
    """The first bytes of a server's reply; None if it does not answer yet."""
    said, end = b"", time.monotonic() + _ASK_S
    try:
        with _asked(f"{process.url}{route}", process.headers) as reply:
            if reply.status_code >= 500:
                return None
            for piece in reply.iter_bytes():
                said += piece
                if len(said) > _MAX_BYTES or time.monotonic() > end:  # another process may send an endless body
                    break
    except httpx.HTTPError:
        return None
    return said
