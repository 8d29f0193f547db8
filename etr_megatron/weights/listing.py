"""Many names in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

LIMIT = 10
"""More names do not help anybody."""


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """The first `LIMIT` items, and how many there are besides."""
    more = len(items) - LIMIT
    return separator.join([*items[:LIMIT], *([f"and {more} more"] if more > 0 else [])])
