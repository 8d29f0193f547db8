"""Lists of many names in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

LIMIT = 10
"""Default number of names in a list; longer lists make messages hard to read."""


def listed(items: Sequence[str], separator: str = ", ", limit: int = LIMIT) -> str:
    """The first `limit` items, and how many more there are."""
    more = len(items) - limit
    return separator.join([*items[:limit], *([f"and {more} more"] if more > 0 else [])])
