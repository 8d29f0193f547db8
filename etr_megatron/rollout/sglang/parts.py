"""Servers that span several nodes: each node starts its part of a server, and stops waiting when another part has failed.

A part is SGLang's process on one node. Part 0, the head, answers requests; the others only compute. Parts find each other at an
address of the head's machine. As with every server's port (see `free_port`), another process may take the port of this address
before the head binds it: then all parts are started again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from etr_megatron.platform.phases import StopAskedError
from etr_megatron.rollout.engine import MustStop, never
from etr_megatron.rollout.sglang.hosts import POLL_S, Machine, Started, is_ours
from etr_megatron.rollout.sglang.server import ServerCommand, ServerProcess, free_port, is_listened_to, share_of_free

LATE_S = 30.0
"""Seconds that the other parts wait longer than the head, because the head can report better why the server does not answer."""


class Rendezvous:
    """Messages between the parts of a server during one start of it.

    store: of the job, with the same prefix on all nodes. attempt: name of the start. It must be unique: keys are never deleted.
    """

    def __init__(self, store: dist.Store, attempt: str, server: str) -> None:
        assert attempt
        self._store = dist.PrefixStore(f"{attempt}/{server}", store)

    def arrive(self, part: int, share: float | None) -> None:
        """Announce part number `part`. share: the `--mem-fraction-static` that it needs; None if it needs none."""
        self._store.set(f"part {part}", json.dumps(share))

    def missing(self, parts: int) -> list[int]:
        """The parts that have not arrived."""
        return [part for part in range(parts) if not self._store.check([f"part {part}"])]

    def share(self, parts: int) -> float | None:
        """The `--mem-fraction-static` for all parts, once none is missing; None if none was announced.

        Every rank of a server applies its own argument to the least free memory of all the server's GPUs. With different
        arguments, ranks would have caches of different sizes.
        """
        shares = [json.loads(self._store.get(f"part {part}")) for part in range(parts)]
        return max((share for share in shares if share is not None), default=None)

    def invite(self, address: str) -> None:
        """Called by the head: publish the address, host:port, at which the parts find each other."""
        self._store.set("address", address)

    @property
    def address(self) -> str | None:
        """The address that the head has published; None before that."""
        return self._store.get("address").decode() if self._store.check(["address"]) else None

    def complete(self) -> None:
        """Called by the head when the server answers, which it does only when all parts run."""
        self._store.set("complete", "")

    @property
    def is_complete(self) -> bool:
        """Whether the head has called `complete`."""
        return bool(self._store.check(["complete"]))

    def fail(self) -> None:
        """Called by a part that has failed."""
        self._store.set("failed", "")

    @property
    def has_failed(self) -> bool:
        """Whether a part has called `fail`."""
        return bool(self._store.check(["failed"]))


def merged(of_nodes: Iterable[Mapping[str, Started]]) -> dict[str, Started]:
    """Server -> its state, combined from the states of its parts on all nodes: the head's URL, and the problems of all."""
    parts: dict[str, list[Started]] = {}
    for started in of_nodes:
        for name, one in started.items():
            parts.setdefault(name, []).append(one)
    found = {}
    for name, some in parts.items():
        url = next((one.url for one in some if one.url), "")
        problems = [one.problem for one in some if one.problem is not None]
        if not problems and not url:
            problems = [f"{name} was not started, and none of its nodes said why"]
        found[name] = Started(url, "\n".join(problems) or None, any(one.port_taken for one in some))
    return found


class SpanningServers(Machine):
    """The parts of servers on one machine, at most one part per server. store: of the job, on a connection of its own."""

    def __init__(self, commands: Mapping[str, ServerCommand], logs: Path, startup_timeout_s: float, store: dist.Store) -> None:
        super().__init__(commands, logs, startup_timeout_s)
        self._store = store

    def start(self, names: Iterable[str], must_stop: MustStop = never, attempt: str = "") -> dict[str, Started]:
        """See `Machine.start`. Must be called on all nodes of a server, with the same `attempt`, which is new for each start.

        Returns the state of this machine's part, see `merged`. The URL is "" for all parts but the head. A part that was
        stopped because another one failed has no problem.
        """
        own = [name for name in names if name in self._commands]
        deadline = time.monotonic() + self._timeout_s
        return {name: self._start_part(name, Rendezvous(self._store, attempt, name), deadline, must_stop) for name in own}

    def _start_part(self, name: str, rendezvous: Rendezvous, deadline: float, must_stop: MustStop) -> Started:
        is_head = self._commands[name].part == 0
        try:
            self._stop_to_start([name])
            found = self._wait_for_part(name, rendezvous, deadline if is_head else deadline + LATE_S, must_stop)
        except BaseException:
            with suppress(dist.DistError):  # the first error is the one to raise
                rendezvous.fail()
            self.stop([name])
            raise
        if found.problem is not None:
            rendezvous.fail()
        elif is_head and not rendezvous.has_failed:
            rendezvous.complete()
        if rendezvous.has_failed:
            self.stop([name])
            address = rendezvous.address
            is_taken = is_head and (found.port_taken or (address is not None and is_listened_to(address)))
            return Started("", found.problem, is_taken)
        return found

    def _wait_for_part(self, name: str, rendezvous: Rendezvous, deadline: float, must_stop: MustStop) -> Started:
        command, process = self._commands[name], None
        devices = command.environment.get("CUDA_VISIBLE_DEVICES")
        rendezvous.arrive(command.part, None if command.memory is None else share_of_free(command.memory, devices))
        if command.part == 0:
            rendezvous.invite(f"{command.host}:{free_port(command.host)}")
        while True:
            # The part's own error comes first, even if another part has failed too.
            if process is not None and (found := self._state(process, command, rendezvous)) is not None:
                return found
            if rendezvous.has_failed:
                return Started("", None)
            missing = rendezvous.missing(command.parts)
            if process is None and not missing and (address := rendezvous.address) is not None:
                process = self._launch(name, address, rendezvous.share(command.parts))
            if must_stop():
                raise StopAskedError(f"told to stop (SIGTERM) while waiting for {name}")
            if time.monotonic() >= deadline:
                return Started("", self._lateness(name, missing))
            time.sleep(POLL_S)

    def _launch(self, name: str, address: str, share: float | None) -> ServerProcess:
        command = self._commands[name]
        memory = () if share is None else ("--mem-fraction-static", str(share))
        arguments = (*command.arguments, *memory, "--dist-init-addr", address)
        process = ServerProcess(name, replace(command, arguments=arguments, memory=None), self._log_of(name))
        self._processes[name] = process
        return process

    def _state(self, process: ServerProcess, command: ServerCommand, rendezvous: Rendezvous) -> Started | None:
        """Result of a part's start; None while it starts."""
        if not process.is_running:
            what = f"{self._called(process.name)} ended while it started; its log, {process.log}, ends:\n{process.last_words()}"
            return Started("", what, process.missed_a_port)
        if command.part > 0:
            return Started("", None) if rendezvous.is_complete else None
        answers = is_ours(process)
        if answers is False:
            return Started("", f"another process had taken the port of {process.name}, {process.url}", port_taken=True)
        return Started(process.url, None) if answers else None

    def _lateness(self, name: str, missing: list[int]) -> str:
        what = f"{self._called(name)} was not ready within {self._timeout_s:g} s"
        if missing:
            return f"{what}: its --node-rank {', '.join(map(str, missing))} did not take part"
        log = super()._log_of(name)
        return f"{what}; its logs are {log} and, of other nodes, {log.with_stem(log.stem + '_node_*')}"

    def _called(self, name: str) -> str:
        """The server's name, with the number and host of this part, as in the arguments of its process."""
        command = self._commands[name]
        return f"{name} (its --node-rank {command.part} of --nnodes {command.parts}, {command.host})"

    def _log_of(self, name: str) -> Path:
        log, part = super()._log_of(name), self._commands[name].part
        return log.with_stem(f"{log.stem}_node_{part}") if part else log
