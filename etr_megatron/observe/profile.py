"""A PyTorch trace of what a rank computes."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from etr_megatron import platform

logger = logging.getLogger(__name__)


def profiled(file: Path) -> AbstractContextManager[Any]:
    """Context whose operators and kernels are written to `file` (.json.gz, for Perfetto or chrome://tracing) when it ends.

    A trace that cannot be written is a warning: it must not cost the run.
    """
    from torch.profiler import ProfilerActivity, profile

    def write(profiler: profile) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:  # the latter from the profiler's own writer, which writes to TMPDIR first
            logger.warning("the profile %s could not be written: %s", file, error)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if platform.uses_cuda() else [])]
    return profile(activities=activities, on_trace_ready=write)
