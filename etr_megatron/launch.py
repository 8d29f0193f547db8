"""`python -m etr_megatron.launch [--nproc N] [CONFIG] [key=value ...]`: check everything, then start the ranks of one node.

`bash examples/run_etr.sh` runs this. Exit codes: 0; 1 for a bug (with the rank's traceback); 2 for a user error (one message,
no traceback); 75 for a run that should be restarted and resumes from its last checkpoint; 128 + n after signal n.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from etr_megatron.checks import check_inputs, dedicated_nodes, nodes_per_server, starts_servers
from etr_megatron.cli import LAUNCHER_USAGE, asks_for_help, last_of_each, parse_args
from etr_megatron.config import Config, load_config, resolve
from etr_megatron.errors import UserError
from etr_megatron.platform.world import node_role
from etr_megatron.quick_checks import adding_input_problems
from etr_megatron.status import REQUEUE_EXIT, STATUS_VARIABLE, USER_ERROR_EXIT, read_status, run_and_exit, run_cli

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


_BYTES_OF_A_PROCESS = 300 * 2**20
"""Private memory of a CPU rank before it has a model: Python, torch, Megatron and transformers."""


def main(argv: list[str] | None = None) -> int:
    """Check the inputs, then start and watch the ranks; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if asks_for_help(arguments):
        print(f"usage: bash examples/run_etr.sh {LAUNCHER_USAGE}")
        return 0
    try:
        if "--dry-run" in arguments:
            from etr_megatron.planner.dry_run import dry_run

            return dry_run([argument for argument in arguments if argument != "--dry-run"])
        nproc, config_path, overrides, grace_s = prepare(arguments)
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return start_ranks(nproc, ["-m", "etr_megatron.train", "--config", str(config_path), *overrides], grace_s)


def prepare(argv: list[str]) -> tuple[int, Path, list[str], float]:
    """Run every check that needs no ranks; returns the number of processes, the config file, overrides and `run.stop_grace_s`.

    The checks run in stages: command line, config, layout, inputs. Raises `UserError` with all problems of the first stage that
    fails. If the config or the layout is invalid, quick checks of the inputs are added.
    """
    asked, rest = _split_nproc(argv)
    config_path, overrides = parse_args(rest, LAUNCHER_USAGE)
    overrides = last_of_each(overrides)  # the ranks get these, and do not repeat the note
    with adding_input_problems():
        config = load_config(config_path, overrides)
    # Called for its UserError: this job has one node, which cannot be dedicated to servers or run a part of a spanning server.
    node_role(dedicated_nodes(config), nodes_per_server(config))

    import torch  # slow, so only after the config is known to be valid

    gpus = torch.cuda.device_count() if config.run.platform != "cpu" else 0
    nproc = asked if asked is not None else default_nproc(config, gpus)
    if gpus and nproc > gpus:
        raise UserError(f"--nproc {nproc}: this machine has {gpus} GPUs, and every process needs one of its own")
    if not gpus:
        _refuse_more_than_fit(nproc, asked is not None)
    with adding_input_problems():
        config = resolve(config, nproc, cuda=gpus > 0)
    check_inputs(config, nproc)
    return nproc, config_path, overrides, config.run.stop_grace_s


def _refuse_more_than_fit(nproc: int, asked: bool) -> None:
    """Raise UserError if the processes need more memory than there is, even without a model: they would hang the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if nproc * _BYTES_OF_A_PROCESS > memory:
        said = f"--nproc {nproc}" if asked else f"the parallel layout asks for {nproc} processes"
        raise UserError(
            f"{said}: they would need {nproc * _BYTES_OF_A_PROCESS / 2**30:.0f} GiB of memory, and this machine without a GPU "
            f"has {memory / 2**30:.0f} GiB; choose fewer"
        )


def default_nproc(config: Config, gpus: int) -> int:
    """The default number of processes. With GPUs, one per GPU that no separate server takes. On CPU, the number of the parallel
    layout; with `parallel.tp: auto` at least two if there are two cores."""
    if gpus:
        alone = starts_servers(config) and config.sglang.placement != "colocated"
        return max(1, gpus - (config.sglang.gpus_of_a_node if alone else 0))
    parallel = config.parallel
    if parallel.tp == "auto":
        return max(parallel.pp * max(parallel.ep, parallel.cp), min(2, os.cpu_count() or 1))
    experts = parallel.ep * (parallel.tp if parallel.etp is None else parallel.etp)
    return parallel.pp * max(parallel.tp * parallel.cp, experts)


def start_ranks(nproc: int, command: list[str], grace_s: float = 25.0) -> int:
    """Run `command` (a script or `-m module`, then its arguments) under torchrun in `nproc` processes; returns the exit code.

    grace_s: seconds that ranks have to exit after SIGTERM; torchrun kills them five seconds later.
    Installs torchrun's signal handlers, so it must be called from the main thread.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Divide the cores among the ranks. (torchrun would set 1, with a long warning.)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # torchrun's log about a failed rank would bury that rank's own message.
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="etr_") as folder:
        status_file = Path(folder) / "status.json"
        os.environ[STATUS_VARIABLE] = str(status_file)
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(round(grace_s) + 5))
        try:
            torchrun.run(torchrun.parse_args(["--standalone", "--nproc-per-node", str(nproc), "--log-dir", folder, *command]))
        except ChildFailedError as failed:
            reported = read_status(status_file)
            if reported is not None:
                return _refuse(*reported)
            return _report_crash(failed)
        except SignalException as received:
            reported = read_status(status_file)
            if reported is not None:
                return _refuse(*reported)
            code = 128 + received.sigval
            lost = "interrupted; progress since the last checkpoint is lost (SIGTERM would have saved it)"
            return _refuse(lost, code) if received.sigval == signal.SIGINT else code
    return 0


def _report_crash(failed: ChildFailedError) -> int:
    rank, failure = failed.get_first_failure()
    if failure.exitcode in (USER_ERROR_EXIT, REQUEUE_EXIT):  # no room for the status file: the rank printed the message itself
        return failure.exitcode
    if failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
        how += " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
    else:
        how = f"ended with exit code {failure.exitcode}; its traceback is above"
    print(f"rank {rank} (pid {failure.pid}) {how}", file=sys.stderr)
    return 1


def _refuse(message: str, exit_code: int = USER_ERROR_EXIT) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code


def _split_nproc(argv: list[str]) -> tuple[int | None, list[str]]:
    """Take `--nproc N` or `--nproc=N` out of the arguments."""
    rest: list[str] = []
    nproc: str | None = None
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--nproc":
            nproc = next(arguments, "")
        elif argument.startswith("--nproc="):
            nproc = argument.removeprefix("--nproc=")
        else:
            rest.append(argument)
    if nproc is None:
        return None, rest
    if not nproc.isdecimal() or len(nproc) > 9 or int(nproc) < 1:
        raise UserError(f"--nproc {nproc}: must be a whole number of processes, from 1 to 999999999")
    return int(nproc), rest


if __name__ == "__main__":
    run_and_exit(lambda: run_cli(main))
