#!/usr/bin/env python
"""Plan a run: `tools/plan.py --config CONFIG --gpus N [--gpu NAME] [key=value ...]`, on any machine.

Prints the memory of every pipeline stage, whether it fits and which setting to change if not, and an estimate of a step's time.
Exits with 0 if it fits, 1 if it does not, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import json
import sys

from etr_megatron.cli import given_path, last_of_each
from etr_megatron.config import load_config
from etr_megatron.errors import UserError
from etr_megatron.planner import GPUS, make_plan, render, suggestions
from etr_megatron.status import run_cli


def main() -> int:
    """Parse, plan, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=given_path, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="all GPUs of the job, including those of its servers")
    parser.add_argument("--gpu", type=str.lower, choices=GPUS, default="h100", help="type of the GPUs (default: h100)")
    parser.add_argument("--gpu-memory", type=float, help="memory of a GPU in GiB (default: that of --gpu)")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--mean-prompt", type=float, help="mean tokens of a prompt (default: a quarter of data.max_prompt_tokens)"
    )
    parser.add_argument(
        "--mean-response", type=float, help="mean tokens of a response (default: half of rollout.max_response_tokens)"
    )
    parser.add_argument("--json", action="store_true", help="print every rank as JSON, in bytes and seconds")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    options = dict(
        gpu=GPUS[args.gpu],
        gpu_memory=args.gpu_memory,
        gpus_per_node=args.gpus_per_node,
        prompt=args.mean_prompt,
        response=args.mean_response,
    )
    try:
        config = load_config(args.config, last_of_each(args.overrides))
        plan = make_plan(config, args.gpus, **options)
        advice = [] if args.json else suggestions(config, plan, **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(plan.as_dict(), indent=2) if args.json else render(plan, advice))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(run_cli(main))
