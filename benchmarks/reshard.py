"""Weights from one layout to another: bytes and seconds of this project's transports and of others, on CPU over gloo.

    python -m benchmarks.reshard            # all cases, 125M parameters in bf16; needs an otherwise idle machine
    python -m benchmarks.reshard --quick    # the same at a tiny size, whose times mean nothing

Contestants, all in `reshard_contestants.py`:

- `sharded`: ours.
- `broadcast`: tensors gathered on rank 0, as for servers, and broadcast in buckets, with our parts (`reshard_broadcast.py`).
- `gather_broadcast`: the same by plain torch.distributed.
- `megatron_core`: its own `resharding` over gloo. It needs both models in the same processes, so it is left out of cases with
  servers. `BareModel` gives it experts.
- `bare_copy`: as many bytes between the same ranks without packing.

The output of each is compared bit for bit with the destination's shards before any is timed.

One process with one thread per rank; all contestants in the same processes, round robin; the slowest rank counts. In cases
"A -> B", both layouts are in the same processes, and what a process already holds is not sent; in "A -> server B" they are in
different ones. The lower bound counts what each rank needs and does not hold, element by element. Planning is timed separately,
as the median of 5 in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import fresh_ranks
from benchmarks.experiment_environment import environment
from benchmarks.output import code_of_stoppable, prepare_output
from benchmarks.reshard_problem import CASES, LLAMA_70B, elements, lower_bound
from benchmarks.reshard_report import PLANNING_LIMITS, case_result, table
from etr_megatron.errors import UserError
from etr_megatron.weights import Architecture, ServerLayout, TrainingLayout
from etr_megatron.weights.reshard import make_reshard_plan

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; exits with 2 if an option is wrong. Raises `UserError` for values that do not fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reshard", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, 3 rounds")
    parser.add_argument("--rounds", type=int, help="timed runs of each contestant (default 15, quick 3)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--case", type=int, action="append", choices=range(len(CASES)), help="its number; repeatable (all)")
    parser.add_argument("--output", type=Path, help="JSON (default benchmarks/results/reshard.json or reshard_quick.json)")
    options = parser.parse_args(argv)
    options.rounds = options.rounds if options.rounds is not None else 3 if options.quick else 15
    options.case = options.case if options.case is not None else list(range(len(CASES)))
    options.output = options.output or RESULTS / ("reshard_quick.json" if options.quick else "reshard.json")
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}; it must be at least 1")
    prepare_output(options.output)
    return options


def run_ranks(number: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of fresh ranks, in order. If a rank fails, ends the others and raises RuntimeError."""
    case = CASES[number]
    job = {"case": number, "quick": options.quick, "dtype": options.dtype, "rounds": options.rounds}
    return fresh_ranks.run_ranks("benchmarks.reshard_rank", job, case.processes, case.name)


def planning_seconds(arch: Architecture, source: TrainingLayout, destination: Any, start: int | None = None) -> float:
    """Median planning time of 5."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        make_reshard_plan(source, destination, arch, destination_start=start)
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def measure_planning(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Planning times of the cases, and of 128 ranks of a 70B model to 1 and to 16 servers."""
    large = TrainingLayout(tp=8, pp=8, dp=2)
    found = []
    for case in (CASES[number] for number in options.case):
        seconds = planning_seconds(case.architecture(options.quick), case.source, case.destination, case.start)
        found.append({"case": case.name, "size": "small", "seconds": seconds})
    for servers in (1, 16):
        name = f"70B: TP8xPP8xDP2 -> {servers} server{'s' if servers > 1 else ''} TP8"
        seconds = planning_seconds(LLAMA_70B, large, ServerLayout(tp=8, servers=servers))
        found.append({"case": name, "size": "70B", "seconds": seconds})
    return [
        {**one, "limit_s": PLANNING_LIMITS[one["size"]], "met": one["seconds"] <= PLANNING_LIMITS[one["size"]]} for one in found
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit code: 0 whether targets are met or not, 2 if an option is wrong."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    result: dict[str, Any] = {"environment": environment(ROOT), "rounds": options.rounds, "dtype": options.dtype}
    result.update(planning=measure_planning(options), cases=[])
    for one in result["planning"]:
        print(
            f"planning {one['case']}: {one['seconds']:.3f} s ({'met' if one['met'] else 'missed'}, target {one['limit_s']:g} s)"
        )
    itemsize = getattr(torch, options.dtype).itemsize
    for number in options.case:
        case, arch = CASES[number], CASES[number].architecture(options.quick)
        found = case_result(case.name, lower_bound(case, arch, itemsize), run_ranks(number, options))
        result["cases"].append({**found, "parameters": elements(arch), "load": os.getloadavg()[0]})
        print("\n" + table(result["cases"][-1]), flush=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")  # an interrupted run keeps what it has
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(code_of_stoppable(main))
