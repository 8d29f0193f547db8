"""Runs the ranks of a benchmark in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(module: str, job: dict[str, Any], ranks: int, what: str) -> list[dict[str, Any]]:
    """Results of `python -m MODULE JOB` in fresh processes with one thread each, ordered by rank.

    A rank's JOB is `job` as JSON plus rank, world, store (rendezvous file) and result (JSON file to write). If a rank fails,
    ends the others and raises RuntimeError, which names `what` was run.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory(prefix="benchmark") as folder:
        results = [Path(folder) / f"rank{rank}.json" for rank in range(ranks)]
        common = {**job, "world": ranks, "store": f"{folder}/store"}
        jobs = [json.dumps({**common, "rank": rank, "result": str(path)}) for rank, path in enumerate(results)]
        started = [subprocess.Popen([sys.executable, "-m", module, one], cwd=ROOT, env=env) for one in jobs]
        try:
            while any(rank.poll() is None for rank in started) and not any(rank.poll() for rank in started):
                time.sleep(0.05)
            if any(rank.poll() != 0 for rank in started):
                raise RuntimeError(f"a rank of {what} failed, see above")
            return [json.loads(path.read_text()) for path in results]
        finally:
            for rank in started:
                rank.kill()
                rank.wait()
