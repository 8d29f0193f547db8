"""When servers that have failed are brought back: at once, but one that keeps failing less and less often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

_LONGEST = 32
"""Weight syncs between two attempts at most."""


class Comebacks:
    """Which failed servers are to be brought back at a weight sync.

    All ranks wait while a server starts, and in a sync that it fails at, for nothing where it fails again: its next attempt is
    2, then 4, 8, ... syncs later. One that has served for as long as its last pause was has its failures forgotten. names: of
    all servers.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = list(names)
        self._attempts: Counter[str] = Counter()
        self._pause: Counter[str] = Counter()
        self._before: dict[str, tuple[int, int]] = {}

    def due(self, failed: Collection[str]) -> list[str]:
        """Call once for every sync; a server that is returned is taken to be tried. failed: those that do not serve now.

        When none serves all are due, as there is nothing to lose by it.
        """
        found = []
        for name in self._names:
            is_resting = self._pause[name] > 0
            self._pause[name] -= is_resting
            if name not in failed:
                self._attempts[name] *= is_resting
            elif not is_resting or len(failed) == len(self._names):
                self._before[name] = self._attempts[name], self._pause[name]
                self._attempts[name] += 1
                self._pause[name] = min(2 ** self._attempts[name], _LONGEST) - 1
                found.append(name)
        return found

    def do_not_count(self, name: str) -> None:
        """The attempt that `due` began last: it came to no more than a question. The next sync may make it again."""
        self._attempts[name], self._pause[name] = self._before[name]
