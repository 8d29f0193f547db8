"""The sources of problems in a config."""

from __future__ import annotations

from dataclasses import dataclass
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
    return [
        Source("data.train", config.train, config.train_split, "train"),
        *(
            Source(f"data.eval.{name}" if name else "data.eval", location, config.eval_split, "eval", name)
            for name, location in sets.items()
        ),
    ]
