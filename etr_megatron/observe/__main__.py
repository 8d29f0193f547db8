"""`python -m etr_megatron.observe RUN_DIR [--png FILE]`: the report of a run.

`python -m etr_megatron.observe rollout RUN_DIR --step N [--sample ID]`: a recorded rollout, token by token, or a list of them.
"""

from __future__ import annotations

import argparse
import sys

from etr_megatron.cli import given_path
from etr_megatron.errors import UserError
from etr_megatron.observe.report import load_rows, plot, summary
from etr_megatron.platform.files import path_errors
from etr_megatron.status import run_cli

_RUN_DIR = "a run's directory, such as runs/<run.name>"


def main(argv: list[str] | None = None) -> int:
    """Print the report or rollout, and draw the curves if asked; the exit code is 2 for a user error."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if arguments[:1] == ["rollout"]:
            _rollout(arguments[1:])
        else:
            _report(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _report(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m etr_megatron.observe",
        description="Report of a run directory; `rollout RUN_DIR` shows a recorded rollout instead.",
    )
    parser.add_argument("run_dir", type=given_path, metavar="RUN_DIR", help=_RUN_DIR)
    parser.add_argument("--png", type=given_path, metavar="FILE", help="also draw the curves (needs matplotlib)")
    arguments = parser.parse_args(argv)
    with path_errors():
        rows = load_rows(arguments.run_dir)
    print(summary(rows))
    if arguments.png is not None:
        plot(rows, arguments.png)
        print(f"curves            {arguments.png}")


def _rollout(argv: list[str]) -> None:
    from etr_megatron.observe.rollout_view import listing, tokenizer_pieces, view  # slow to import

    parser = argparse.ArgumentParser(prog="python -m etr_megatron.observe rollout", description="A recorded rollout.")
    parser.add_argument("run_dir", type=given_path, metavar="RUN_DIR", help=f"{_RUN_DIR}, made with rollout.record=true")
    parser.add_argument("--step", type=int, required=True, metavar="N")
    parser.add_argument("--sample", metavar="ID", help="<group>/<number>; without it the step's samples are listed")
    arguments = parser.parse_args(argv)
    run, step, sample = arguments.run_dir, arguments.step, arguments.sample
    with path_errors():
        text = listing(run, step) if sample is None else view(run, step, sample, tokenizer_pieces(run))
    print(text)


if __name__ == "__main__":
    sys.exit(run_cli(main))
