"""Servers that span several nodes: each node starts its part of one, and none waits in vain for another that failed.

A part is SGLang's process on one node. The first, the head, answers requests; the others only compute. Parts find each other at
an address of the head's machine, where another process may take the port before the head binds it, as with every server's port
(see `free_port`): then all parts are started again.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from etr_megatron.config import SglangConfig
from etr_megatron.platform.phases import StopAskedError
from etr_megatron.rollout.engine import MustStop, never
from etr_megatron.rollout.sglang.hosts import POLL_S, Host, Started, is_ours
from etr_megatron.rollout.sglang.server import ServerCommand, ServerProcess, free_port

_LATE_S = 30.0
"""By how much longer the other parts wait than the head, which knows more of why it does not answer."""


class Meeting:
    """What the parts of a server tell each other during one start of it. store: of the job. attempt: the start's name."""

    def __init__(self, store: dist.Store, attempt: str, server: str) -> None:
        self._store = dist.PrefixStore(f"{attempt}/{server}", store)

    def invite(self, address: str) -> None:
        """The head: where the parts meet, as host:port."""
        self._store.set("address", address)

    @property
    def address(self) -> str | None:
        """What the head has said, if it has."""
        return self._store.get("address").decode() if self._store.check(["address"]) else None

    def complete(self) -> None:
        """The head: the server answers, which it does only when all parts are there."""
        self._store.set("complete", "")

    @property
    def is_complete(self) -> bool:
        """Whether the head has said so."""
        return bool(self._store.check(["complete"]))

    def fail(self) -> None:
        """A part has failed."""
        self._store.set("failed", "")

    @property
    def has_failed(self) -> bool:
        """Whether a part has said so."""
        return bool(self._store.check(["failed"]))


def merged(of_nodes: Iterable[Mapping[str, Started]]) -> dict[str, Started]:
    """Server -> its state, from the states of its parts on all nodes: the head's address and all problems."""
    parts: dict[str, list[Started]] = {}
    for started in of_nodes:
        for name, one in started.items():
            parts.setdefault(name, []).append(one)
    found = {}
    for name, some in parts.items():
        problems = [one.problem for one in some if one.problem is not None]
        url = next((one.url for one in some if one.url), "")
        found[name] = Started(url, "\n".join(problems) or None, any(one.port_taken for one in some))
    return found


def places_of(names: Sequence[str], nodes: int, config: SglangConfig) -> list[tuple[list[str], int]]:
    """For each node that has servers: names of its servers, and the number of its part of one that spans nodes."""
    span, each = config.nodes_per_server, config.servers
    return [(list(names[node // span * each : (node // span + 1) * each]), node % span) for node in range(nodes)]


def _is_taken(address: str | None) -> bool:
    """Whether a process listens at an address of this machine."""
    host, _, port = (address or "").partition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
        try:
            probe.bind((host, int(port)))
        except (OSError, ValueError) as error:
            return getattr(error, "errno", None) == errno.EADDRINUSE
    return False


class PartsHost(Host):
    """The parts of servers on one machine, at most one of each; see `Host`. store: of the job, for this thread alone."""

    def __init__(self, commands: Mapping[str, ServerCommand], logs: Path, startup_timeout_s: float, store: dist.Store) -> None:
        super().__init__(commands, logs, startup_timeout_s)
        self._store = store

    def start(self, names: Iterable[str], must_stop: MustStop = never, attempt: str = "") -> dict[str, Started]:
        """See `Host.start`. The hosts of all nodes of a server must be called, with the same `attempt`, new for each call.

        Each host returns the state of its own part, see `merged`: "" as address of all but the head, and no problem for a part
        that was stopped because another failed.
        """
        own = [name for name in names if name in self._commands]
        self.stop(own)
        deadline = time.monotonic() + self._timeout_s
        return {name: self._start_part(name, Meeting(self._store, attempt, name), deadline, must_stop) for name in own}

    def _start_part(self, name: str, meeting: Meeting, deadline: float, must_stop: MustStop) -> Started:
        is_head = self._commands[name].part == 0
        try:
            found = self._wait_for_part(name, meeting, deadline if is_head else deadline + _LATE_S, must_stop)
        except BaseException:
            self.stop([name])
            meeting.fail()
            raise
        if found.problem is not None:
            meeting.fail()
        elif is_head and not meeting.has_failed:
            meeting.complete()
        if meeting.has_failed:
            self.stop([name])
            return Started("", found.problem, found.port_taken or (is_head and _is_taken(meeting.address)))
        return found

    def _wait_for_part(self, name: str, meeting: Meeting, deadline: float, must_stop: MustStop) -> Started:
        command, process = self._commands[name], None
        if command.part == 0:
            meeting.invite(f"{command.host}:{free_port(command.host)}")
        while True:
            # What it died of comes first, even if that has killed another part, too.
            if process is not None and (found := self._state(process, command, meeting)) is not None:
                return found
            if meeting.has_failed:
                return Started("", None)
            if process is None and (address := meeting.address) is not None:
                process = self._launch_at(name, address)
            if must_stop():
                raise StopAskedError(f"told to stop (SIGTERM) while waiting for {name}")
            if time.monotonic() >= deadline:
                what = f"its log is {process.log}" if process is not None else "its first node did not tell its address"
                return Started("", f"{self._called(name)} was not ready within {self._timeout_s:g} s; {what}")
            time.sleep(POLL_S)

    def _launch_at(self, name: str, address: str) -> ServerProcess:
        command = self._commands[name]
        command = replace(command, arguments=(*command.arguments, "--dist-init-addr", address))
        process = self._processes[name] = ServerProcess(name, command, self._log_of(name))
        return process

    def _state(self, process: ServerProcess, command: ServerCommand, meeting: Meeting) -> Started | None:
        """What has become of a part; None while it starts."""
        if not process.is_running:
            process.stop()
            taken = "address already in use" in process.said().lower()
            what = f"{self._called(process.name)} ended while it started; its log, {process.log}, ends:\n{process.last_words()}"
            return Started("", what, taken)
        if command.part > 0:
            return Started("", None) if meeting.is_complete else None
        answers = is_ours(process)
        if answers is False:
            return Started("", f"another process had taken the port of {process.name}, {process.url}", port_taken=True)
        return Started(process.url, None) if answers else None

    def _called(self, name: str) -> str:
        """A server's name, with the node of this part of it."""
        command = self._commands[name]
        return f"{name} (node {command.part} of its {command.parts}, {command.host})"

    def _log_of(self, name: str) -> Path:
        log = super()._log_of(name)
        part = self._commands[name].part
        return log.with_stem(f"{log.stem}_node_{part}") if part else log
