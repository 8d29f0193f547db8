"""The cost of a command: `python process_cost.py COMMAND...` prints its seconds and its peak resident bytes as a JSON object.

This is a small process of its own because Linux counts the memory that the parent held before the exec in a new process's peak.
For the same reason it imports only the standard library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    """seconds: wall-clock time. peak_resident_bytes: peak of the largest of the command's processes."""

    seconds: float
    peak_resident_bytes: int


def cost_of(command: Sequence[str]) -> Cost:
    """Run a command, discarding its stdout. Raises SystemExit, which names the command, if it fails."""
    measuring = [sys.executable, "-S", __file__, *command]
    measured = subprocess.run(measuring, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
    found = json.loads(measured.stdout)
    if found["exit_code"]:
        raise SystemExit(f"{' '.join(command)} ended with {found['exit_code']}")
    return Cost(found["seconds"], found["peak_resident_bytes"])


def main(command: Sequence[str]) -> int:
    """Run, measure, print."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    print(json.dumps({"seconds": seconds, "peak_resident_bytes": usage.ru_maxrss * 1024, "exit_code": process.returncode}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
