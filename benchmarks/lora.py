"""Low-rank adapters against training all weights, on CPU: time, memory, checkpoints, and what rounding leaves.

    python -m benchmarks.lora            # 57M parameters on one rank; needs an otherwise idle machine
    python -m benchmarks.lora --quick    # a tiny model, whose figures mean nothing

Contestants of the first part run round robin, each in a fresh process. Seconds are the median of updates in fp32, in which CPUs
are fast. The memory of gradients, optimizer and original values is that of their tensors, and a checkpoint is counted on the
disk, all for a bf16 model.

The second part trains adapters in a bf16 model on one batch and looks at them after 1, 4, 16 and 64 updates. The improvement of
the batch's surrogate objective (mean advantage times log-prob, computed in fp32) with the exact sums of weights and products
is 1.
`nearest` is the share of it that remains if the sums are rounded to the nearest bf16, as adapters are usually merged for
servers; `ours` is what the policy trains and exports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import TINY, WIDE, write_model
from benchmarks.experiment_environment import environment
from benchmarks.fresh_ranks import run_ranks
from benchmarks.output import code_of_stoppable, prepare_output
from etr_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CONTESTANTS = ("all_weights", "adapters")
BYTES = ("gradient_bytes", "optimizer_bytes", "base_bytes", "checkpoint_bytes")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; exits with 2 if an option is wrong. Raises `UserError` for values that do not fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, 1 round")
    parser.add_argument("--rounds", type=int, help="processes of each contestant (default 3, quick 1)")
    parser.add_argument("--output", type=Path, help="JSON (default benchmarks/results/lora[_quick].json)")
    options = parser.parse_args(argv)
    options.rounds = options.rounds if options.rounds is not None else 1 if options.quick else 3
    options.output = options.output or RESULTS / ("lora_quick.json" if options.quick else "lora.json")
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}; it must be at least 1")
    prepare_output(options.output)
    return options


def measure(model: Path, rounds: int, job: dict[str, Any]) -> dict[str, Any]:
    """Both parts. job: what every process gets besides its contestant's settings, and the rank of adapters."""
    settings = {"all_weights": [], "adapters": [f"lora.rank={job['rank_of_adapters']}"]}

    def run(part: str, name: str, **more: Any) -> Any:
        (found,) = run_ranks("benchmarks.lora_rank", {**job, "part": part, "overrides": settings[name], **more}, 1, name)
        return found

    seconds: dict[str, list[list[float]]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds):
        for name in CONTESTANTS[:: -1 if number % 2 else 1]:
            seconds[name].append(run("seconds", name))
    medians: dict[str, dict[str, float]] = {}
    for name, rounds_of_it in seconds.items():
        with tempfile.TemporaryDirectory(prefix="lora", dir=model.parent) as folder:
            sizes = run("sizes", name, folder=folder)
        medians[name] = {"update_s": statistics.median(one for some in rounds_of_it for one in some), **sizes}
    return {"update_s": seconds, "medians": medians, "effect": run("effect", "adapters")}


def table(result: dict[str, Any]) -> str:
    """Both parts as text."""
    lines = [f"{'':<14}{'update s':>10}{'gradients':>12}{'optimizer':>12}{'base':>12}{'checkpoint':>12}  (MiB)"]
    for name, one in result["medians"].items():
        lines.append(f"{name:<14}{one['update_s']:>10.2f}" + "".join(f"{one[key] / 2**20:>12.1f}" for key in BYTES))
    full, lora = result["medians"].values()
    ratios = {key: lora[key] / full[key] for key in full if full[key]}
    lines.append("adapters / all_weights: " + ", ".join(f"{key} {ratio:.3f}" for key, ratio in ratios.items()))
    lines.append(f"{'updates':<10}{'exact gain':>12}{'nearest':>10}{'ours':>10}{'changed':>10}{'ours':>10}")
    for one in result["effect"]:
        cells = f"{one['exact_gain']:>12.2e}{one['nearest']:>10.3f}{one['ours']:>10.3f}"
        lines.append(f"{one['updates']:<10}{cells}{one['nearest_changed']:>10.3f}{one['ours_changed']:>10.3f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit code: 0, or 2 if an option is wrong."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="lora") as folder:
        model = Path(folder) / "model"
        parameters = write_model(model, TINY if options.quick else WIDE)
        job = {"model": str(model), "samples": 4 if options.quick else 16, "tokens": 16 if options.quick else 64}
        job["updates"] = [1, 2] if options.quick else [1, 4, 16, 64]
        job["rank_of_adapters"] = 4 if options.quick else 32
        result = {"environment": environment(ROOT), "parameters": parameters, **measure(model, options.rounds, job)}
    print(table(result))
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(code_of_stoppable(main))
