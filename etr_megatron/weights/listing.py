"""Lists of many names in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

LIMIT = 10
"""Names in a list by default; more do not help anybody."""


def listed(items: Sequence[str], separator: str = ", ", limit: int = LIMIT) -> str:
    """The first `limit` items, and how many more there are."""
    more = len(items) - limit
    return separator.join([*items[:limit], *([f"and {more} more"] if more > 0 else [])])
