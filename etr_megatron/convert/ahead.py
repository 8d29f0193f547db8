"""Making the next values while those before are written."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; each is made in another thread while the caller works on the one before, so that two exist at a time.

    Raises, at its place, what making an item raised. An item must be memory of its own.
    """
    end = object()
    with ThreadPoolExecutor(1, "one_ahead") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]
