"""Errors of transformers as one sentence. It reads more of config.json than the policy does, and may fail to build a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etr_megatron.errors import UserError


@contextmanager
def transformers_errors(model_dir: str | Path) -> Iterator[None]:
    """Turn any exception inside the block, which reads or builds the model in `model_dir`, into a `UserError`."""
    try:
        yield
    except Exception as error:  # transformers has no common base class of errors
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"transformers cannot build the model of {Path(model_dir) / 'config.json'} ({type(error).__name__}: {reason})"
        ) from error
