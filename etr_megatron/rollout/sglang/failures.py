"""The failures of one request: when it is the request that fails, and not the servers."""

from __future__ import annotations

from dataclasses import dataclass, field

_AT_WELL_SERVERS = 2
"""Failures of a request after which the server was well: so many are the request's own doing."""

_IN_ALL = 3
"""Failures of whatever kind. One more than above: others are under way at a server that dies as well, and by chance one of them
is at a second that does."""


@dataclass
class Failures:
    """Of one request, while it is given to one server after another.

    said: what went wrong, in order. at_well: after how many of these the server was well. broke: a connection broke once, which
    is nobody's failure.
    """

    said: list[str] = field(default_factory=list)
    at_well: int = 0
    broke: bool = False

    def add(self, why: str, *, well: bool) -> None:
        """One more. well: the server is, after it."""
        self.said.append(why)
        self.at_well += well

    @property
    def are_its_own(self) -> bool:
        """Whether the request failed for its own sake."""
        return self.at_well >= _AT_WELL_SERVERS

    @property
    def may_be_its_own(self) -> bool:
        """Whether so many servers failed with it that no further one is risked, if there is one that is well."""
        return self.are_its_own or len(self.said) >= _IN_ALL
