"""A module for `reward.function` that lacks the function, which shows late: only a node's first rank imports it as a check."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.runs import wait_for


def _listens() -> bool:
    """Whether the second rank would handle SIGTERM: it has joined, and waits for the first."""
    parent = os.getppid()
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        process = Path("/proc", child)
        if "RANK=1" in (process / "environ").read_text().split("\0"):
            caught = next(line for line in (process / "status").read_text().splitlines() if line.startswith("SigCgt:"))
            return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


if os.environ.get("RANK") == "0":
    wait_for(_listens)
