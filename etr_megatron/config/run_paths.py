"""Paths in a finished run's config, for who looks at the run from another directory than it was started in."""

from __future__ import annotations

import os
from pathlib import Path

from etr_megatron.config.schema import Config


def path_of_run(path: str | Path, run: Path, config: Config) -> Path:
    """Where a path of `config`, that of the run in the directory `run`, leads.

    A relative one is looked for where the job was started, which is above `run.dir`/`run.name`, and then in the working
    directory: a run may have been copied without what it was made from.
    """
    name = Path(config.run.dir) / config.run.name
    here = Path(os.path.abspath(run)).parts  # links are not followed: `runs` may be one
    if name.is_absolute() or ".." in name.parts or here[-len(name.parts) :] != name.parts:
        return Path(path)
    found = Path(*here[: -len(name.parts)]) / path
    return found if found.exists() else Path(path)
