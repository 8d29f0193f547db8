#!/usr/bin/env python
"""Converts checkpoints between HuggingFace's format and megatron's torch_dist, and compares them.

    python tools/convert_hf.py to-megatron --hf DIR --out DIR
    python tools/convert_hf.py to-hf --megatron DIR --out DIR
    python tools/convert_hf.py verify --hf DIR --megatron DIR
    torchrun --nproc-per-node N tools/convert_hf.py ...      (to-megatron and to-hf: the work is split among processes)

The exit code is 0; 1 if `verify` finds a difference; 2 for a mistake, which is reported in one sentence; 130 or 143 after
Ctrl-C or SIGTERM. torchrun itself exits with 1 if any of its processes exits with another code than 0.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from etr_megatron.cli import given_path
from etr_megatron.errors import UserError
from etr_megatron.status import exit_code_of, report_user_error, run_and_exit, run_cli

if TYPE_CHECKING:
    from etr_megatron.convert import Ranks
    from etr_megatron.convert.comparison import Verification


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, parser_class=_Parser)
    command = commands.add_parser("to-megatron", help="HuggingFace to torch_dist, which loads in any layout")
    command.add_argument("--hf", type=given_path, required=True, metavar="DIR", help="HuggingFace checkpoint")
    command.add_argument("--out", type=given_path, required=True, metavar="DIR", help="new directory")
    command.add_argument("--dtype", choices=["bf16", "fp32"], help="dtype of the tensors (default: unchanged)")
    dtype = "dtype of the tensors; those to be quantised are rounded to it first (default: unchanged)"
    command = commands.add_parser("to-hf", help="torch_dist, or a training run's checkpoint, to HuggingFace")
    _add_megatron(command)
    command.add_argument("--out", type=given_path, required=True, metavar="DIR", help="new directory")
    command.add_argument("--dtype", choices=["bf16", "fp32"], help=dtype)
    command.add_argument("--fp8-block", type=int, choices=[128], help="quantise to FP8 in blocks of 128 x 128")
    command.add_argument("--max-shard-gb", type=float, metavar="GB", help="largest size of a file (default: 5)")
    command.add_argument(
        "--config-from", type=given_path, metavar="DIR", help="directory of config.json and the tokenizer, if elsewhere"
    )
    command.add_argument("--adapter", action="store_true", help="of a run with LoRA: the adapters alone, in PEFT's format")
    command = commands.add_parser("verify", help="compare tensor by tensor, then the logits of a prompt")
    command.add_argument("--hf", type=given_path, required=True, metavar="DIR", help="HuggingFace checkpoint")
    _add_megatron(command)
    command.add_argument(
        "--no-logits", action="store_true", help="compare tensors only; logits need both models in memory, in fp32"
    )
    command.add_argument("--prompt", help="prompt whose logits are compared")
    return top


def _add_megatron(command: argparse.ArgumentParser) -> None:
    what = "torch_dist checkpoint, a run's step_* directory, or a run (its newest checkpoint)"
    command.add_argument("--megatron", type=given_path, required=True, metavar="DIR", help=what)
    what = "of a run with LoRA: the model that the adapters belong to (default: the run's model.path)"
    command.add_argument("--base", type=given_path, metavar="DIR", help=what)


def run(argv: list[str]) -> int:
    """Run the command line; returns the exit code. Raises UserError."""
    asked = parser().parse_args(argv)
    refuse_options(asked)
    from etr_megatron import convert  # imports torch: only after the command line is checked
    from etr_megatron.platform.files import path_errors

    ranks = convert.Ranks()
    with convert.detecting_silent_ranks(ranks, give_up), path_errors():
        return convert_or_compare(asked, ranks)


def refuse_options(asked: argparse.Namespace) -> None:
    """Raise UserError for options of `to-hf` that are out of range or contradict each other."""
    if asked.command != "to-hf":
        return
    if asked.max_shard_gb is not None and not 1e-3 <= asked.max_shard_gb <= 1e6:  # also refuses NaN
        raise UserError(f"--max-shard-gb {asked.max_shard_gb}: must be between 0.001 and 1000000")
    if asked.adapter and asked.fp8_block is not None:
        raise UserError("--fp8-block: adapters are not quantised; leave out --fp8-block, or --adapter for the merged model")
    if asked.adapter and asked.max_shard_gb is not None:
        raise UserError("--max-shard-gb: PEFT reads adapters from one file; leave it out, or --adapter for the merged model")


def convert_or_compare(asked: argparse.Namespace, ranks: Ranks) -> int:
    """Run the command on this rank; returns the exit code."""
    from etr_megatron import convert
    from etr_megatron.convert.hf_files import DTYPES

    start = time.monotonic()
    named = {name: getattr(asked, name) for name in ("hf", "megatron", "out") if hasattr(asked, name)}
    convert.check_directories(ranks, **named)
    if asked.command == "verify":
        logits, prompt = not asked.no_logits, asked.prompt
        return report(convert.verify(asked.hf, asked.megatron, ranks, logits=logits, prompt=prompt, base=asked.base))
    dtype = DTYPES[asked.dtype] if asked.dtype else None
    if asked.command == "to-megatron":
        size = convert.to_megatron(asked.hf, asked.out, ranks, dtype)
    elif asked.adapter:
        given = {"config_from": asked.config_from, "base": asked.base}
        size = convert.to_adapter(asked.megatron, asked.out, ranks, dtype=dtype, **given)
    else:
        size = convert.to_hf(
            asked.megatron,
            asked.out,
            ranks,
            dtype=dtype,
            fp8_block=asked.fp8_block,
            max_file_bytes=int((asked.max_shard_gb or 5.0) * 1e9),
            config_from=asked.config_from,
            base=asked.base,
        )
    seconds = time.monotonic() - start
    if ranks.rank == 0:
        print(f"{asked.out}: {size / 1e9:.3f} GB of tensors in {seconds:.1f} s, {size / 1e6 / seconds:.0f} MB/s")
    return 0


def report(found: Verification) -> int:
    """Print the findings of `verify`; returns the exit code."""
    print(f"{found.tensors} tensors, {len(found.differing)} of them different")
    for name in found.differing:
        print(f"  {name}")
    if found.rounded:
        print(f"{len(found.rounded)} are FP8 and equal Megatron's values once quantised; the logits use Megatron's values")
    if found.logits is not None:
        print(f"logits: largest difference {found.logits[0]:.1e}, largest logit {found.logits[1]:.1f}")
    print("the same model" if found.same else "NOT the same model")
    return 0 if found.same else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    from etr_megatron.platform.lifetime import die_with_parent

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        die_with_parent()
    return exit_code_of(lambda: run(arguments))


def give_up(reason: str, code: int = 2) -> NoReturn:
    """Print a sentence and exit, even if another thread waits in a collective."""
    report_user_error(UserError(reason + _unfinished(sys.argv[1:])))
    os._exit(code)


def end_on_signals() -> None:
    """Make Ctrl-C and SIGTERM print a sentence and exit, even while this process waits in a collective.

    Call it before starting other threads, which inherit the signal mask.
    """
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        number = signal.sigwait(signals)
        # Print one sentence per node, and none if torchrun stops the ranks because one of them has reported a mistake.
        give_up(f"stopped by {signal.Signals(number).name}", 128 + number)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _unfinished(argv: list[str]) -> str:
    """The sentence about an output that is left half-written."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--out")
    asked, _ = options.parse_known_args(argv)
    partial = Path(f"{asked.out}.unfinished")
    return f"; {partial} is incomplete, the same command replaces it" if asked.out and partial.exists() else ""


if __name__ == "__main__":
    end_on_signals()
    # By default, the garbage collector runs after every 700 new objects, which takes a fifth of the time of importing modules.
    gc.set_threshold(100_000)
    run_and_exit(lambda: run_cli(main))
