"""What a call needs of resident memory."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _resident(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    return 1024 * int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def peak_beyond(run: Callable[[], Any]) -> int:
    """Bytes of resident memory that a call needs beyond what is there before it.

    The heap's free pages go back to the kernel first, so that none is reused unseen, and the kernel's high-water mark is set
    back to what is resident now (writing 5 to clear_refs), so that nothing earlier hides the call.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before
