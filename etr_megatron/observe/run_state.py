"""`python -m etr_megatron.observe.run_state [--written] CONFIG [key=value ...]`: the state of the run with these arguments.

Prints one word: the state in the run's status.json (running, finished, failed, requeue), `interrupted` if the run was killed or
ended by Ctrl-C, or `none` if there is no run yet.
With --written it also prints when the state was written, in nanoseconds, so that a script can tell an old state from a new one
of the same name. For scheduler scripts: torchrun's own exit code is 1 for everything but success.
"""

from __future__ import annotations

import sys
from pathlib import Path

from etr_megatron.cli import asks_for_help, parse_args
from etr_megatron.config import load_config
from etr_megatron.errors import UserError
from etr_megatron.observe.run_directory import RunDirectory
from etr_megatron.platform.files import path_errors
from etr_megatron.status import run_cli


def main(argv: list[str] | None = None) -> int:
    """Print the state; the exit code is 2 for a user error."""
    arguments = sys.argv[1:] if argv is None else argv
    if asks_for_help(arguments):
        print(f"usage: {__doc__.replace('`', '')}", end="")
        return 0
    words: tuple[object, ...] = ("none", 0)
    try:
        config = load_config(*parse_args([argument for argument in arguments if argument != "--written"]))
        directory = RunDirectory(Path(config.run.dir) / config.run.name)
        with path_errors():
            if state := directory.read_state():
                words = state, directory.status_file.stat().st_mtime_ns
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*(words if "--written" in arguments else words[:1]))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
