"""When failed servers are brought back: at the next weight sync, with exponential backoff for one that keeps failing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

_LONGEST = 32
"""Maximum number of weight syncs between two attempts."""


class RestartBackoff:
    """Decides which failed servers are brought back at a weight sync.

    All ranks wait while a server starts, and in a sync that it fails at, in vain if it fails again. So its next attempt is 2,
    then 4, 8, ... syncs later. Once it has served for as long as its last pause, its failures are forgotten. names: of all
    servers.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = list(names)
        self._attempts: Counter[str] = Counter()
        self._pause: Counter[str] = Counter()
        self._before: dict[str, tuple[int, int]] = {}

    def due(self, failed: Collection[str]) -> list[str]:
        """The servers to bring back. Call once per sync, and again in one that has lost all; each returned server counts as
        attempted. failed: those not serving.

        When no server serves, all are due, as there is nothing to lose.
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
                self._pause[name] = min(2 ** self._attempts[name], _LONGEST) - 1
                found.append(name)
        return found

    def do_not_count(self, name: str) -> None:
        """Do not count the last attempt from `due`, which was no more than a health check: the next sync may repeat it."""
        self._attempts[name], self._pause[name] = self._before[name]
