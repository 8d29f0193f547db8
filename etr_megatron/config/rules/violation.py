"""The result of a rule, and access to values by key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from etr_megatron.config.schema import Config


@dataclass(frozen=True)
class Violation:
    """A constraint that does not hold.

    keys: the `section.key`s it is about. message: the constraint and the fix. given: further keys that it depends on, which are
    not shown.
    """

    keys: tuple[str, ...]
    message: str
    given: tuple[str, ...] = ()


def get(config: Config, key: str) -> Any:
    """The value at `section.key`."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
