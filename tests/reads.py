"""What a function reads from files, as the kernel counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def _so_far() -> int:
    """Bytes of all reads of this process and of its copies from file to file; not those of mapped memory."""
    return int(Path("/proc/self/io").read_text().split()[1])


def bytes_read_by(function: Callable[[], Any]) -> int:
    """Bytes that this process reads while the function runs, and some hundred for looking that up."""
    before = _so_far()
    function()
    return _so_far() - before
