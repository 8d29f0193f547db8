"""Many names in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

LIMIT = 10
"""More names do not help anybody."""


def listed(items: Sequence[str], separator: str = ", ", limit: int = LIMIT) -> str:
    """The first `limit` items, and how many there are besides."""
    more = len(items) - limit
    return separator.join([*items[:limit], *([f"and {more} more"] if more > 0 else [])])
