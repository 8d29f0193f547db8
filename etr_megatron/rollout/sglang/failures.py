"""The failures of one request, to decide whether the request or the servers are at fault."""

from __future__ import annotations

from dataclasses import dataclass, field

_AT_WELL_SERVERS = 2
"""After this many failures at servers that were healthy afterwards, the request itself is at fault."""


class GivenUpError(RuntimeError):
    """The request itself is at fault and is not repeated."""


@dataclass
class Failures:
    """Failures of one request over all its attempts.

    said: the errors, in order. at_well: number of errors after which the server was healthy. deaths: number of errors after
    which it was not. broke: whether a connection has broken once, which does not count as a failure.
    """

    said: list[str] = field(default_factory=list)
    at_well: int = 0
    deaths: int = 0
    broke: bool = False

    def add(self, why: str, *, well: bool) -> None:
        """Add a failure. well: whether the server was healthy afterwards."""
        self.said.append(why)
        self.at_well += well
        self.deaths += not well

    @property
    def are_its_own(self) -> bool:
        """Whether the request itself is at fault."""
        return self.at_well >= _AT_WELL_SERVERS
