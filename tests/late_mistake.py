"""A module for `reward.function` that holds the first rank, the only one of a node that imports it as a check, until the second
has joined and waits for it. The function `none` is missing, which shows only then.

With LATE in the environment, the first rank then makes that file and stays, so that it never joins.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil

from tests.rewards import digit_sum_is_even
from tests.runs import rank_of, wait_for

__all__ = ["digit_sum_is_even"]


def _waits() -> bool:
    """Whether the second rank has joined: it has a connection to the job's store."""
    try:
        other = psutil.Process(rank_of(os.getppid(), 1))
    except AssertionError:  # it is not there yet
        return False
    return any(one.status == psutil.CONN_ESTABLISHED for one in other.net_connections("tcp"))


if os.environ.get("RANK") == "0" and "etr_megatron.checks" in sys.modules:  # its graders lack that
    wait_for(_waits)
    if late := os.environ.get("LATE"):
        Path(late).touch()
        time.sleep(3600)
