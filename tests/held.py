"""A reward function whose module holds rank 0 of a run at a point that a test chooses, however fast or slow the machine is.

    process = runs.held("step 2", ...)

HOLD is the point and a file. Rank 0, which imports the function to check it, makes the file when it first reaches the point,
and goes on only after a SIGTERM or `runs.let_go()`; if a thread writes the checkpoint, the thread is held, and goes on only
after `runs.let_go()`. From then on, a node of servers counts as lost after LOST_S seconds, if that is set. Points:

    loading 0     before the model is loaded
    step N        when the row of step N is written; 0: before the first step, or after a resume
    saving N      when the checkpoint of step N is complete but for its name
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.rewards import digit_sum_is_even
from tests.runs import wait_for

__all__ = ["digit_sum_is_even"]


def _hold(file: Path) -> None:
    told, is_over = threading.Event(), file.with_suffix(".over").exists
    if threading.current_thread() is not threading.main_thread():  # which gets the signal
        file.touch()
        wait_for(is_over)
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())  # the run hears of it by the wakeup descriptor
    file.touch()
    wait_for(lambda: told.is_set() or is_over())
    signal.signal(signal.SIGTERM, before)
    if "LOST_S" in os.environ:
        from etr_megatron.rollout.sglang import server_nodes

        server_nodes.LOST_S = float(os.environ["LOST_S"])


def _arm(point: str, number: int, file: Path) -> None:
    from etr_megatron.data import PromptCursor
    from etr_megatron.observe import RunDirectory

    owner, name, is_there = {
        "loading": (PromptCursor, "__init__", lambda *_: True),
        "step": (RunDirectory, "write_status", lambda _, state, step, *__: (state, step) == ("running", number)),
        "saving": (Path, "rename", lambda path, _: path.name == f".step_{number:06d}.unfinished"),
    }[point]
    method: Callable[..., Any] = getattr(owner, name)

    def held(*arguments: Any, **options: Any) -> Any:
        if is_there(*arguments) and not file.exists():
            _hold(file)
        return method(*arguments, **options)

    setattr(owner, name, held)


if os.environ.get("HOLD") and os.environ.get("RANK") == "0" and "etr_megatron.observe" in sys.modules:  # its graders lack that
    point, number, file = os.environ["HOLD"].split(" ", 2)
    _arm(point, int(number), Path(file))
