"""The sources of problems in a config, and the settings of each."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from etr_megatron.config.schema import Config, DataConfig

ARITHMETIC = "arithmetic"
"""The generated source."""


@dataclass(frozen=True, slots=True)
class Source:
    """One source of problems.

    key: the config key, for messages: `data.train` or `data.eval`, followed by `.<name>` for a named set.
    location: `arithmetic`, a .jsonl or .parquet file, or a hub dataset (`name`, `name:config` or its directory).
    hub_split: the split of a hub dataset.
    split: whether the problems are trained on or held out; generated ones differ between the two.
    name: the name of the set, which its metrics use; empty if it has none.
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
    """The sets of `data.train`, followed by those of `data.eval`, in order."""
    return [
        *(_source("train", config.train_split, name, location) for name, location in sets_by_name(config.train).items()),
        *(_source("eval", config.eval_split, name, location) for name, location in sets_by_name(config.eval).items()),
    ]


def sets_by_name(value: dict[str, str] | str | None) -> dict[str, str]:
    """`data.train` or `data.eval` as locations by name; a single unnamed set has the empty name."""
    return {"": value} if isinstance(value, str) else (value or {})


def samples_of_set(config: Config, name: str) -> int:
    """Responses per problem of a held-out set."""
    samples = config.eval.samples
    return samples if isinstance(samples, int) else samples.get(name, 1)


def _source(split: Literal["train", "eval"], hub_split: str, name: str, location: str) -> Source:
    source = Source(f"data.{split}.{name}" if name else f"data.{split}", location, hub_split, split, name)
    if "@" not in location or source.is_file or os.path.exists(location):  # `Path.exists` raises where it may not look
        return source
    location, _, hub_split = location.rpartition("@")
    return replace(source, location=location, hub_split=hub_split)
