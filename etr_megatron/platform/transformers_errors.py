"""A model that transformers does not build, of which it reads more of config.json than the policy does, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etr_megatron.errors import UserError


@contextmanager
def transformers_errors(model_dir: str | Path) -> Iterator[None]:
    """Turn what is raised inside the block, where transformers reads or builds the model in `model_dir`, into a `UserError`."""
    try:
        yield
    except Exception as error:  # whatever any of its modules raises; there is no common base
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"transformers cannot build the model of {Path(model_dir) / 'config.json'} ({type(error).__name__}: {reason})"
        ) from error
