"""The other end of a `WorkerPool`: the main function of its processes, `python -m MODULE PARENT_PID CONFIG_JSON`.

Requests and replies are JSON, one object per line, on stdin and stdout: first `{"ready": true}` or `{"fatal": "..."}`, then one
reply per request, in order. A worker exits at the end of input. It has no time limits: the parent kills it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from etr_megatron.imports import ImportPathError
from etr_megatron.platform.lifetime import die_with_parent

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def serve(load: Callable[[dict[str, Any]], Answer]) -> int:
    """Serve until end of input; returns the exit code.

    load: called once, with the config's values (lists as tuples, as in the config's dataclasses); returns what makes a reply
        of a request. May raise ImportPathError, which is the pool's error.
    """
    parent_pid, config = int(sys.argv[1]), json.loads(sys.argv[2])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    requests, replies = _take_pipes()
    try:
        answer = load({key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})
    except ImportPathError as error:
        _send(replies, {"fatal": str(error)})
        return 1
    _send(replies, {"ready": True})
    for line in requests:
        _send(replies, answer(json.loads(line)))
    return 0


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol's streams away from stdin and stdout, where a user's function may read or print."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()
