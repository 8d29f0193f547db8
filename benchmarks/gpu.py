"""Performance on a GPU: the head, the policy in bf16 and FP8, and a whole ETR step.

    python -m benchmarks.gpu                           # all parts on one GPU with 80 GB
    python -m benchmarks.gpu --part head               # head, policy or step; repeatable
    python -m benchmarks.gpu --quick                   # tiny sizes, whose times mean nothing
    python -m benchmarks.gpu --quick --device cpu      # the same code without a GPU: float32, no FP8, no Triton

Parts: `head` (gpu_head.py), `policy` (gpu_policy.py), `step` (gpu_step.py); the top of each file says what it compares. Times
are measured with CUDA events after warm-up, as medians over rounds; ratios are to a baseline of the same run. The result file
has the device, versions, date, all times, and which targets were met or missed. It is written after each part. If a part fails,
the file names it, the others still run, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_head, gpu_policy, gpu_step
from benchmarks.experiment_environment import environment
from benchmarks.gpu_device import device_facts, release_memory
from benchmarks.output import code_of_stoppable, prepare_output
from etr_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; exits with 2 if an option is wrong. Raises `UserError` for values that do not fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), action="append", help="repeatable (default all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and 2 rounds: does it work here?")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for --quick")
    parser.add_argument("--rounds", type=int, help="timed calls of each contestant (default 20, quick 2)")
    parser.add_argument("--layers", type=int, help=f"of the slice in part policy (default {gpu_policy.LAYERS}, quick 2)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="config of parts policy and step")
    parser.add_argument("--sglang-python", default=sys.executable, help="interpreter that has SGLang (default this one)")
    parser.add_argument("--work", type=Path, help="directory for checkpoints, 6 GB (default the system's temporary one)")
    parser.add_argument("--output", type=Path, help="JSON (default benchmarks/results/gpu.json or gpu_quick.json)")
    options = parser.parse_args(argv)
    options.part = options.part or list(PARTS)
    options.rounds = options.rounds if options.rounds is not None else 2 if options.quick else 20
    options.output = options.output or RESULTS / ("gpu_quick.json" if options.quick else "gpu.json")
    for key, value in (("rounds", options.rounds), ("layers", options.layers)):
        if value is not None and value < 1:
            raise UserError(f"--{key} is {value}; it must be at least 1")
    if options.device == "cpu" and not options.quick:
        raise UserError("--device cpu takes the sizes of --quick alone; add it")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; --quick --device cpu goes through the same code without one")
    return options


def _head(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    sizes = gpu_head.QUICK_SIZES if options.quick else gpu_head.SIZES
    cases = []
    for size in sizes:
        cases.append(gpu_head.measure(size, options.rounds, torch.device(options.device)))
        print(gpu_head.table(cases[-1]), flush=True)
    return {"cases": cases}


def _step(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    found = gpu_step.measure(options, work)
    print(gpu_step.text(found), flush=True)
    return found


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "head": _head,
    "policy": gpu_policy.measure,
    "step": _step,
}


def has_failed(found: dict[str, Any]) -> bool:
    """Whether a part, or a recipe in it, failed."""
    return "failed" in found or any("failed" in one for one in found.get("recipes", {}).values())


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit code: 0 whether targets are met or not, 1 if a part failed, 2 if an option is
    wrong."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        prepare_output(options.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    os.environ["ETR_PLATFORM"] = options.device
    result: dict[str, Any] = {
        "environment": environment(ROOT),
        "device": device_facts(torch.device(options.device)),
        "quick": options.quick,
        "rounds": options.rounds,
    }
    for part in options.part:
        release_memory()
        with tempfile.TemporaryDirectory(prefix="gpu_", dir=options.work) as work:
            try:
                result[part] = PARTS[part](options, Path(work))
            except UserError as error:
                result[part] = {"failed": str(error)}
                print(error, file=sys.stderr)
            except Exception as error:
                result[part] = {"failed": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")
    return int(any(has_failed(result[part]) for part in options.part))


if __name__ == "__main__":
    sys.exit(code_of_stoppable(main))
