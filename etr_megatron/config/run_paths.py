"""Resolve paths in a run's config from a working directory other than the one it was started in."""

from __future__ import annotations

import os
from pathlib import Path

from etr_megatron.config.schema import Config


def path_of_run(path: str | Path, run: Path, config: Config) -> Path:
    """Resolve a path in `config`, the config of the run in the directory `run`.

    A relative path is first tried from where the job was started, the directory above `run.dir`/`run.name`, and then from the
    working directory, because a run may have been copied without its inputs.
    """
    name = Path(config.run.dir) / config.run.name
    here = Path(os.path.abspath(run)).parts  # does not follow links: `runs` may be one
    if name.is_absolute() or ".." in name.parts or here[-len(name.parts) :] != name.parts:
        return Path(path)
    found = Path(*here[: -len(name.parts)]) / path
    return found if found.exists() else Path(path)
