"""Writing a benchmark's result, and ending the benchmark cleanly."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from etr_megatron.errors import UserError


def prepare_output(path: Path) -> None:
    """Fail before measuring if the result cannot be written. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}); name a file in a directory of yours") from error


def code_of_stoppable(main: Callable[[], int]) -> int:
    """Run `main`; returns its exit code. Ctrl-C and SIGTERM exit with 130 and 143, after processes and temporary files are
    cleaned up (`convert` has 15 GB of temporary files)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    return main()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
