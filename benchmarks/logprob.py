"""Log-prob, entropy and policy loss from a vocabulary shard: time and memory of this project's head and of others, on CPU.

    python -m benchmarks.logprob            # all sizes, TP1 and TP2, fp32 and bf16; needs an otherwise idle machine
    python -m benchmarks.logprob --quick    # the same at one small size, whose times mean nothing

Measures forward and backward of a clipped surrogate with entropy bonus, from hidden states [T, H], a shard of the head [V/TP,
H] and one preallocated fp32 weight gradient, to which every contestant adds its own.

Contestants, all in `logprob_contestants.py`:

- `single_pass` and `recompute`: ours.
- (a) `gathered`: the vocabulary gathered over TP, log_softmax and entropy by autograd.
- (b) `megatron_core`: its vocab_parallel_cross_entropy, which has no entropy.
- (c) `shard_softmax`: works on shards, saves the softmax and computes entropy.
- (d) `gemms` and `gemms_chunked` by torch.mm, `gemms_ours` by the functions that our head uses: only the three matrix products.
  The fastest of these is the floor.

Loss and gradients of each are compared with (a) before any is timed.

Time: one process per rank with one thread and gloo; all contestants in the same processes, round robin; the slowest rank
counts. Memory: fresh processes for each contestant; peak resident memory of one pass beyond inputs, weight and weight gradient,
whose pages are already mapped. A tiny problem runs first, so that one-time allocations of libraries do not count; the largest
rank counts. The result file has seconds, bytes, differences to (a), and which targets were met or missed. It keeps cases of
earlier runs that this run does not measure. Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import fresh_ranks
from benchmarks.experiment_environment import environment
from benchmarks.logprob_report import table, targets_as_json
from benchmarks.output import code_of_stoppable, prepare_output
from benchmarks.targets import summary
from etr_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

SIZES = [(2048, 512, 32_000), (512, 1024, 151_936)]
QUICK_SIZES = [(40, 48, 1506)]
"""(T, H, V)."""

NAMES = ["single_pass", "recompute", "gathered", "megatron_core", "shard_softmax", "gemms", "gemms_chunked", "gemms_ours"]
DTYPES = ["float32", "bfloat16"]


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; exits with 2 if an option is wrong. Raises `UserError` for values that do not fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logprob", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small size, 3 rounds")
    parser.add_argument("--rounds", type=int, help="timed passes of each contestant (default 9, quick 3)")
    parser.add_argument("--tp", type=int, action="append", help="tensor-parallel ranks; repeatable (default 1 and 2)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable (default both)")
    parser.add_argument("--size", type=_size, action="append", metavar="T,H,V", help="rows, hidden, vocabulary; repeatable")
    parser.add_argument("--output", type=Path, help="JSON (default benchmarks/results/logprob.json or logprob_quick.json)")
    options = parser.parse_args(argv)
    options.rounds = options.rounds if options.rounds is not None else 3 if options.quick else 9
    options.tp = options.tp or [1, 2]
    options.dtype = options.dtype or DTYPES
    options.size = options.size or (QUICK_SIZES if options.quick else SIZES)
    options.output = options.output or RESULTS / ("logprob_quick.json" if options.quick else "logprob.json")
    for key, value in (("rounds", options.rounds), *(("tp", tp) for tp in options.tp)):
        if value < 1:
            raise UserError(f"--{key} is {value}; it must be at least 1")
    for tp in options.tp:
        for _, _, vocab in options.size:
            if vocab % tp:
                raise UserError(f"--size has a vocabulary of {vocab}, which --tp {tp} does not divide; choose one that it does")
    return options


def _size(text: str) -> tuple[int, int, int]:
    try:
        rows, hidden, vocab = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three whole numbers T,H,V") from None
    if min(rows, hidden, vocab) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
    return rows, hidden, vocab


def run_ranks(job: dict[str, Any], tp: int) -> list[dict[str, Any]]:
    """Results of `tp` fresh ranks, in order. If a rank fails, ends the others and raises RuntimeError."""
    what = f"the {job['kind']} job of {', '.join(job['contestants'])}"
    return fresh_ranks.run_ranks("benchmarks.logprob_rank", job, tp, what)


def measure(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """`case` (tp, dtype, rows, hidden, vocab) with all its measurements."""
    problem = {key: case[key] for key in ("dtype", "rows", "hidden", "vocab")}
    timed = run_ranks({**problem, "kind": "time", "rounds": rounds, "contestants": NAMES}, case["tp"])
    found = dict(case, contestants={})
    for name in NAMES:
        ranks = run_ranks({**problem, "kind": "memory", "contestants": [name]}, case["tp"])
        errors = [rank["errors"][name] for rank in timed if name in rank["errors"]]
        found["contestants"][name] = {
            **summary(timed[0]["seconds"][name]),
            "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
            "errors": {key: max(rank[key] for rank in errors) for key in errors[0]} if errors else {},
        }
        found["single_pass_formula_bytes"] = ranks[0]["single_pass_formula_bytes"]
    return {**found, "targets": targets_as_json(found)}


def _cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for rows, hidden, vocab in options.size:
        for dtype in options.dtype:
            for tp in options.tp:
                yield {"tp": tp, "dtype": dtype, "rows": rows, "hidden": hidden, "vocab": vocab}


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return case["vocab"], case["rows"], case["hidden"], case["dtype"], case["tp"]


def _earlier(output: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Cases in the result file of earlier runs; a case that is measured again is replaced."""
    try:
        return {_key(case): case for case in json.loads(output.read_text())["cases"]}
    except (ValueError, KeyError, TypeError):  # empty, or not a result of this benchmark
        return {}


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit code: 0 whether targets are met or not, 2 if an option is wrong."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        prepare_output(options.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    cases = _earlier(options.output)
    for case in _cases(options):
        found = {**measure(case, options.rounds), "rounds": options.rounds, "environment": environment(ROOT)}
        cases[_key(case)] = found
        print(table(found), end="\n\n", flush=True)
        in_order = [cases[key] for key in sorted(cases)]
        options.output.write_text(json.dumps({"cases": in_order}, indent=1) + "\n")  # an interrupted run keeps what it has
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(code_of_stoppable(main))
