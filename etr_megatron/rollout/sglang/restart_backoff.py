"""Decides when failed servers are brought back: at the next weight sync, with exponential backoff if they keep failing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

_MAX_INTERVAL = 32
"""Maximum number of weight syncs between two attempts."""


class RestartBackoff:
    """Decides which failed servers are brought back at a weight sync.

    All ranks wait while a server starts, and in a sync at which it fails. To limit this cost, a server's next attempt is 2,
    then 4, 8, ... syncs after the last. Once a server has served for as long as its last pause, its failures are forgotten.
    names: of all servers.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = list(names)
        self._attempts: Counter[str] = Counter()
        self._pause: Counter[str] = Counter()
        self._before: dict[str, tuple[int, int]] = {}

    def due(self, failed: Collection[str]) -> list[str]:
        """The servers to bring back; each of them counts as attempted. failed: the servers that do not serve.

        Call this once per sync, and once more in a sync that has lost all servers. When no server serves, all are due, because
        the run cannot go on without one.
        """
        found = []
        for name in self._names:
            is_resting = self._pause[name] > 0
            if is_resting:
                self._pause[name] -= 1
            if name not in failed:
                if not is_resting:
                    self._attempts[name] = 0
            elif not is_resting or len(failed) == len(self._names):
                self._before[name] = self._attempts[name], self._pause[name]
                self._attempts[name] += 1
                self._pause[name] = min(2 ** self._attempts[name], _MAX_INTERVAL) - 1
                found.append(name)
        return found

    def is_first(self, name: str) -> bool:
        """Whether the last attempt from `due` was the first since the server's failures were forgotten."""
        return self._attempts[name] == 1

    def do_not_count(self, name: str) -> None:
        """Do not count the last attempt from `due`, because it was only a health check, which the next sync may repeat."""
        self._attempts[name], self._pause[name] = self._before[name]
