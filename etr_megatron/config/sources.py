"""Which sources of problems a config names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from etr_megatron.config.schema import DataConfig

ARITHMETIC = "arithmetic"
"""The source that is generated."""


@dataclass(frozen=True, slots=True)
class Source:
    """One source of problems.

    key: what names it, for messages: `data.train`, `data.eval`, or `data.eval.<name>`.
    location: `arithmetic`, a .jsonl or .parquet file, or a hub dataset (`name`, `name:config` or its directory).
    hub_split: the split of a hub dataset.
    split: which of the generated problems.
    name: of a held-out set that has one, as its metrics are called; else empty.
    """

    key: str
    location: str
    hub_split: str
    split: Literal["train", "eval"]
    name: str = ""

    @property
    def is_file(self) -> bool:
        """Whether it is named like a file of rows, be it there or not."""
        return Path(self.location).suffix.lower() in (".jsonl", ".parquet")


def sources_of(config: DataConfig) -> list[Source]:
    """That of `data.train`, and after it the held-out sets of `data.eval` in its order; none of these where it is null."""
    sets = {"": config.eval} if isinstance(config.eval, str) else (config.eval or {})
    return [
        Source("data.train", config.train, config.train_split, "train"),
        *(
            Source(f"data.eval.{name}" if name else "data.eval", location, config.eval_split, "eval", name)
            for name, location in sets.items()
        ),
    ]
