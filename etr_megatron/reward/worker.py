"""A grader process: `python -m etr_megatron.reward.worker PARENT_PID CONFIG_JSON`, started only by the pool.

A request has `prompt`, `response`, `answer`, `extra` and `messages`; a reply has `reward`, `status`, `detail` and `parts`.
"""

from __future__ import annotations

import sys
from typing import Any

from etr_megatron.config import RewardConfig
from etr_megatron.platform.worker_main import serve
from etr_megatron.reward.functions import AsyncGrader, Grader, load_grader
from etr_megatron.reward.grade import GradeRequest

MATH_MEMORY_BYTES = 2 * 2**30
"""Address-space limit of a `math` grader: an answer such as 10^{10^{10}} must not exhaust the machine's memory."""


def load(values: dict[str, Any]) -> Grader | AsyncGrader:
    """The function that grades a request under this config."""
    config = RewardConfig(**values)
    if config.function == "math":
        _limit_memory()
    return load_grader(config)


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = MATH_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MATH_MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    sys.exit(serve(load, GradeRequest))
