"""A grader process: `python -m etr_megatron.reward.worker PARENT_PID CONFIG_JSON`, started only by the pool.

Requests and replies are JSON, one object per line, on stdin and stdout: first `{"ready": true}` or `{"fatal": "..."}`, then one
`{"reward", "status", "detail"}` per `{"prompt", "response", "answer", "extra"}`, in order. It exits at the end of input. It has
no time limits: the parent kills it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any, BinaryIO

from etr_megatron.config import RewardConfig
from etr_megatron.imports import ImportPathError
from etr_megatron.platform.lifetime import die_with_parent
from etr_megatron.reward.functions import load_grader
from etr_megatron.reward.grade import GradeRequest

MATH_MEMORY_BYTES = 2 * 2**30
"""Address-space limit of a `math` grader: an answer such as 10^{10^{10}} must not exhaust the machine's memory."""


def main() -> int:
    """Serve until end of input; returns the exit code."""
    parent_pid, config = int(sys.argv[1]), _config(sys.argv[2])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    requests, replies = _take_pipes()
    if config.function == "math":
        _limit_memory()
    try:
        grade = load_grader(config)
    except ImportPathError as error:
        _send(replies, {"fatal": str(error)})
        return 1
    _send(replies, {"ready": True})
    for line in requests:
        _send(replies, asdict(grade(GradeRequest(**json.loads(line)))))
    return 0


def _config(text: str) -> RewardConfig:
    values: dict[str, Any] = json.loads(text)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return RewardConfig(**values)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol's streams away from stdin and stdout, where a reward function may read or print."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = MATH_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MATH_MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _send(replies: BinaryIO, message: dict[str, object]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
