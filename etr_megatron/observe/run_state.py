"""`python -m etr_megatron.observe.run_state CONFIG [key=value ...]`: what became of the run that these arguments describe.

Prints one word: the state in the run's status.json (running, finished, failed, requeue), or `none` where there is no run yet.
For the scripts of a scheduler: torchrun's own exit code is 1 for all but success.
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
    try:
        config = load_config(*parse_args(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = RunDirectory(Path(config.run.dir) / config.run.name).status_file
    print(json.loads(file.read_text())["state"] if file.exists() else "none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
