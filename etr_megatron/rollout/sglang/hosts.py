"""The servers of one machine, in the hands of the rank that starts them there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import httpx

from etr_megatron.rollout.sglang.server import ServerCommand, ServerProcess

_POLL_S = 0.5


class Started(NamedTuple):
    """Where a server listens, and why it does not serve, if so."""

    url: str
    problem: str | None


class Host:
    """Starts, restarts and ends servers. commands: by the servers' names. logs: directory for what they print."""

    def __init__(self, commands: Mapping[str, ServerCommand], logs: Path, startup_timeout_s: float) -> None:
        self._commands, self._logs, self._timeout_s = dict(commands), logs, startup_timeout_s
        self._processes: dict[str, ServerProcess] = {}

    def start(self, names: Iterable[str]) -> dict[str, Started]:
        """Start those of these servers that are of this machine, anew if they run, and wait until each answers or has failed.

        Raises UserError when the interpreter does not exist.
        """
        own = [name for name in names if name in self._commands]
        self.stop(own)
        for name in own:
            self._launch(name)
        deadline = time.monotonic() + self._timeout_s
        return {name: self._wait_for(name, deadline, again=True) for name in own}

    def _launch(self, name: str) -> None:
        log = self._logs / f"{name.replace(' ', '_').lower()}.log"
        self._processes[name] = ServerProcess(name, self._commands[name], log)

    def _wait_for(self, name: str, deadline: float, *, again: bool) -> Started:
        process = self._processes[name]
        while process.is_running:
            if _answers(process.url):  # asked once even when others took all of the time
                return Started(process.url, None)
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_S)
        if process.is_running:
            process.stop()  # nobody would use it, and beside the ranks it would hold memory that they train in
            what = f"{name} did not answer within {self._timeout_s:g} s at {process.url}; its log is {process.log}"
            return Started(process.url, what)
        words = process.last_words()
        process.stop()
        if again and "address already in use" in words.lower():  # somebody took the port since it was found free
            self._launch(name)
            return self._wait_for(name, deadline, again=False)
        return Started(process.url, f"{name} ended while it started; its log, {process.log}, ends:\n{words}")

    def stop(self, names: Iterable[str] | None = None) -> None:
        """End those of these servers (None: all) that run on this machine and wait until nothing of them is left."""
        for name in list(self._processes if names is None else names):
            if name in self._processes:
                self._processes.pop(name).stop()


def _answers(url: str) -> bool:
    try:
        with httpx.stream("GET", f"{url}/health", timeout=5.0) as reply:  # a body that never ends is not waited for
            return reply.status_code == 200
    except httpx.HTTPError:
        return False
