"""The failures of one request: when it is the request that fails, and not the servers."""

from __future__ import annotations

from dataclasses import dataclass, field

_AT_WELL_SERVERS = 2
"""Failures of a request after which the server was well: so many are the request's own doing."""


class GivenUpError(RuntimeError):
    """A request fails for its own sake, and is not tried again; no server has failed by it."""


@dataclass
class Failures:
    """Of one request, while it is given to one server after another.

    said: what went wrong, in order. at_well: after how many of these the server was well. deaths: after how many it was not.
    broke: a connection broke once, which is nobody's failure.
    """

    said: list[str] = field(default_factory=list)
    at_well: int = 0
    deaths: int = 0
    broke: bool = False

    def add(self, why: str, *, well: bool) -> None:
        """One more. well: the server is, after it."""
        self.said.append(why)
        self.at_well += well
        self.deaths += not well

    @property
    def are_its_own(self) -> bool:
        """Whether the request failed for its own sake."""
        return self.at_well >= _AT_WELL_SERVERS
