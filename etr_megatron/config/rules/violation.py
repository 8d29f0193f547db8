"""The result of a rule, and access to values by key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from etr_megatron.config.schema import Config


@dataclass(frozen=True)
class Violation:
    """A constraint that does not hold.

    keys: the `section.key`s it is about, or `section.key.name` of one entry of a mapping. message: the constraint and the fix.
    given: further keys that it depends on, which are not shown.
    """

    keys: tuple[str, ...]
    message: str
    given: tuple[str, ...] = ()


def get(config: Config, key: str) -> Any:
    """The value at `section.key`, or at `section.key.name`."""
    section, name, *entry = key.split(".", 2)
    value = getattr(getattr(config, section), name)
    return value[entry[0]] if entry else value


def without_entry(key: str) -> str:
    """`section.key` of a key that may name an entry."""
    return ".".join(key.split(".", 2)[:2])
