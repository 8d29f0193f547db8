"""The main function of a `WorkerPool`'s processes, `python -m MODULE PARENT_PID CONFIG_JSON`.

Requests and replies are JSON, one object per line, on stdin and stdout. The first line is `{"ready": true, "concurrent": ...}`
or `{"fatal": "..."}`. Then every `{"key": ..., "request": {...}}` gets a `{"key": ..., "reply": {...}}`: in the order of the
requests or, from a coroutine function, when its call ends. A worker exits at the end of input.

The parent kills a worker whose call takes too long. A call of a coroutine function is cancelled here instead, with the reply
`{"key": ..., "late": true}`. Its worker is killed only if the call blocks the event loop.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, BinaryIO

from etr_megatron.imports import ImportPathError
from etr_megatron.platform.lifetime import die_with_parent, kill_descendants

_MAX_LINE_BYTES = 1 << 40


def serve(load: Callable[[dict[str, Any]], Callable[[Any], Any]], request_type: Callable[..., Any]) -> int:
    """Serve until end of input; returns the exit code.

    load: called once, with the config's values (lists as tuples, as in the config's dataclasses). Returns a function of a
        request, which returns a dataclass and never raises an Exception. If this is a coroutine function, requests are answered
        concurrently, each within the config's `timeout_s`. May raise ImportPathError, which the pool raises as a UserError.
    request_type: makes a request from its fields.
    """
    parent_pid, config = int(sys.argv[1]), json.loads(sys.argv[2])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    requests, replies = _take_pipes()
    try:
        function = load({key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})
    except ImportPathError as error:
        _send(replies, {"fatal": str(error)})
        return 1
    concurrent = inspect.iscoroutinefunction(function)
    _send(replies, {"ready": True, "concurrent": concurrent})

    def called(message: dict[str, Any]) -> Any:
        return function(request_type(**message["request"]))

    if concurrent:
        asyncio.run(_serve_at_once(called, requests, replies, config["timeout_s"]))
    else:
        for message in map(json.loads, requests):
            _send(replies, {"key": message["key"], "reply": asdict(called(message))})
    kill_descendants()  # processes that calls have left running would outlive the job
    return 0


async def _serve_at_once(
    called: Callable[[dict[str, Any]], Awaitable[Any]], requests: BinaryIO, replies: BinaryIO, timeout_s: float
) -> None:
    reader = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), requests)
    calls: set[asyncio.Task[None]] = set()  # the loop itself keeps no reference to a task
    with ThreadPoolExecutor(1) as writer:  # a thread, because a full pipe must not block other calls

        async def reply_to(message: dict[str, Any]) -> None:
            reply = await _in_time(called(message), timeout_s)
            await loop.run_in_executor(writer, _send, replies, {"key": message["key"], **reply})

        while (line := await reader.readline()).endswith(b"\n"):  # else the parent ended in the middle of a line
            task = loop.create_task(reply_to(json.loads(line)))
            calls.add(task)
            task.add_done_callback(calls.discard)


async def _in_time(reply: Awaitable[Any], timeout_s: float) -> dict[str, Any]:
    call = asyncio.ensure_future(reply)
    await asyncio.wait({call}, timeout=timeout_s)
    if call.done():
        return {"reply": asdict(call.result())}
    call.cancel()  # not awaited, because it may ignore the cancellation
    return {"late": True}


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol's streams away from stdin and stdout, because a user's function may read and print there."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()
