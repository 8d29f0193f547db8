"""`python -m etr_megatron.observe RUN_DIR [--png FILE]`: the report of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from etr_megatron.errors import UserError
from etr_megatron.observe.report import load_rows, plot, summary


def main(argv: list[str] | None = None) -> int:
    """Print the report, draw the picture if asked; the exit code is 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m etr_megatron.observe", description="Report of a run directory.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's directory, such as runs/<run.name>")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the curves (needs matplotlib)")
    arguments = parser.parse_args(argv)
    try:
        rows = load_rows(arguments.run_dir)
        print(summary(rows))
        if arguments.png is not None:
            plot(rows, arguments.png)
            print(f"curves            {arguments.png}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
