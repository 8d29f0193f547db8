"""`python -m etr_megatron.config > docs/config.md`: print the reference of every key."""

from __future__ import annotations

import argparse
import sys

from etr_megatron.config.reference import render_reference
from etr_megatron.status import run_cli


def main(argv: list[str] | None = None) -> int:
    """Print the reference; returns the exit code. There are no options."""
    argparse.ArgumentParser(prog="python -m etr_megatron.config", description=__doc__).parse_args(argv)
    print(render_reference(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
