"""The sources of problems in a config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from etr_megatron.config.schema import DataConfig

ARITHMETIC = "arithmetic"
"""The generated source."""


@dataclass(frozen=True, slots=True)
class Source:
    """One source of problems.

    key: the config key, for messages: `data.train`, `data.eval`, or `data.eval.<name>`.
    location: `arithmetic`, a .jsonl or .parquet file, or a hub dataset (`name`, `name:config` or its directory).
    hub_split: the split of a hub dataset.
    split: the split of generated problems.
    name: the name of a held-out set, which its metrics use; empty if it has none.
    """

    key: str
    location: str
    hub_split: str
    split: Literal["train", "eval"]
    name: str = ""

    @property
    def is_file(self) -> bool:
        """Whether the location has a suffix of a data file, whether or not it exists."""
        return Path(self.location).suffix.lower() in (".jsonl", ".parquet")


def sources_of(config: DataConfig) -> list[Source]:
    """The source of `data.train`, followed by the held-out sets of `data.eval` in order, none if that is null."""
    sets = {"": config.eval} if isinstance(config.eval, str) else (config.eval or {})
    held_out = ((f"data.eval.{name}" if name else "data.eval", location, name) for name, location in sets.items())
    return [
        _source("data.train", config.train, config.train_split, "train"),
        *(_source(key, location, config.eval_split, "eval", name) for key, location, name in held_out),
    ]


def _source(key: str, location: str, hub_split: str, split: Literal["train", "eval"], name: str = "") -> Source:
    source = Source(key, location, hub_split, split, name)
    if "@" not in location or source.is_file or Path(location).exists():
        return source
    location, _, hub_split = location.rpartition("@")
    return replace(source, location=location, hub_split=hub_split)
