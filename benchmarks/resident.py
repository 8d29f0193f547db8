"""Measures the resident memory that a call needs."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _resident(key: str) -> int:
    """Bytes in a line of /proc/self/status."""
    return 1024 * int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def peak_beyond(run: Callable[[], Any]) -> int:
    """Bytes of peak resident memory during a call beyond what was resident before.

    First, the heap's free pages are returned to the kernel, so that their reuse is counted, and the kernel's high-water mark is
    reset to what is resident now (by writing 5 to clear_refs), so that an earlier peak does not hide the call's.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before
