"""`python -m etr_megatron.observe.run_state [--written] CONFIG [key=value ...]`: what became of the run of these arguments.

Prints one word: the state in the run's status.json (running, finished, failed, requeue), or `none` where there is no run yet.
With --written a second one: when that was written, in nanoseconds, so that a script can tell the state that it has found before
from a new one of the same name. For the scripts of a scheduler: torchrun's own exit code is 1 for all but success.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from etr_megatron.cli import parse_args
from etr_megatron.config import load_config
from etr_megatron.errors import UserError
from etr_megatron.observe.run_directory import RunDirectory


def main(argv: list[str] | None = None) -> int:
    """Print the state; the exit code is 2 for a user's mistake."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        config = load_config(*parse_args([argument for argument in arguments if argument != "--written"]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = RunDirectory(Path(config.run.dir) / config.run.name).status_file
    words = ["none", 0]
    if file.exists():
        words = [json.loads(file.read_text())["state"], file.stat().st_mtime_ns]
    print(*(words if "--written" in arguments else words[:1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
