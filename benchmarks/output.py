"""Where a benchmark's result goes."""

from __future__ import annotations

from pathlib import Path

from etr_megatron.errors import UserError


def prepare_output(path: Path) -> None:
    """Find out before measuring that the result cannot be written. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}); name a file in a directory of yours") from error
