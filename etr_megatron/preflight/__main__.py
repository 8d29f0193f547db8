"""`torchrun ... -m etr_megatron.preflight [CONFIG] [key=value ...]`, see the package docstring."""

from __future__ import annotations

import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from etr_megatron import platform
from etr_megatron.checks import dedicated_nodes, nodes_per_server
from etr_megatron.cli import asks_for_help, parse_args, require_torchrun
from etr_megatron.config import Config, load_config, resolve
from etr_megatron.errors import UserError
from etr_megatron.platform.lifetime import die_with_parent
from etr_megatron.platform.world import node_role
from etr_megatron.status import exit_code_of, run_and_exit

TIMEOUT_S = 120.0
"""Deadline of the rendezvous and of every collective."""
PAIR_TIMEOUT_S = 60.0
"""Deadline of measurements between two nodes, while the others wait for them in a collective."""


def main(argv: list[str] | None = None) -> int:
    """Collect facts, measure and print; returns the exit code: 0, or 2 after a failed check or a user error."""
    die_with_parent()
    return exit_code_of(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    if asks_for_help(argv):
        print("usage: torchrun ... -m etr_megatron.preflight [CONFIG] [key=value ...]")
        return
    path, overrides = parse_args(argv)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = load_config(path, overrides)
    require_torchrun("etr_megatron.preflight")
    os.environ["ETR_PLATFORM"] = config.run.platform
    ranks = node_role(dedicated_nodes(config), nodes_per_server(config)).training_ranks
    config = resolve(config, ranks, cuda=platform.uses_cuda())

    import torch.distributed as dist

    from etr_megatron.preflight.findings import findings, table
    from etr_megatron.preflight.network import measure

    _meet()
    token, token_file = _leave_token(config)
    dist.barrier()
    own = _own_facts(config, ranks, time.time(), token_file)
    facts: list[Any] = [None] * world
    dist.all_gather_object(facts, own)
    if dist.get_rank() == 0:
        token_file.unlink(missing_ok=True)
    number = int(os.environ.get("GROUP_RANK", "0"))
    numbers: list[Any] = [None] * world
    dist.all_gather_object(numbers, number)
    size = (256 << 20) if platform.uses_cuda() else (8 << 20)
    network = measure(numbers, device=platform.device(), size=size, timeout_s=PAIR_TIMEOUT_S)
    if dist.get_rank() == 0:
        nodes = sorted((one for one in facts if one is not None), key=lambda node: node.number)
        found = findings(nodes, token=token, needed_bytes=_checkpoint_bytes(config)) + network
        print(table(found), flush=True)
        failed = [one.check for one in found if one.state == "FAILED"]
        if failed:
            raise UserError(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}")


def _meet() -> None:
    from etr_megatron.policy import init_world

    try:
        init_world(TIMEOUT_S)
    except RuntimeError as error:  # raised by torch: some rank is missing or unreachable
        raise UserError(
            f"the ranks did not connect to each other within {TIMEOUT_S:g} s: {str(error).splitlines()[0]}"
        ) from error


def _leave_token(config: Config) -> tuple[str, Path]:
    """Write a new file in `run.dir` on rank 0; returns its content and path on every rank."""
    import torch.distributed as dist

    box = [secrets.token_hex(8)]
    dist.broadcast_object_list(box, src=0)
    file = Path(config.run.dir) / f".preflight_{box[0]}"
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(box[0])
        except OSError as error:
            problem = [
                f"run.dir: {file.parent} cannot be written by rank 0 ({error.strerror}); set run.dir to a writable directory"
            ]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])
    return box[0], file


def _own_facts(config: Config, world: int, clock: float, token_file: Path) -> Any:
    """The node's facts on its first rank, None on the others."""
    from etr_megatron.preflight.facts import collect

    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return None
    return collect(config, world, clock=clock, token_file=token_file)


def _checkpoint_bytes(config: Config) -> int:
    """Bytes of the kept checkpoints plus the one being written, minus the run's existing checkpoints, so that a resumed run is
    not refused."""
    from etr_megatron.observe import RunDirectory
    from etr_megatron.planner.host import checkpoint_bytes
    from etr_megatron.weights import read_architecture

    if config.model.path == "tiny" or not config.checkpoint.every:
        return 0
    try:
        architecture = read_architecture(config.model.path)
    except UserError:
        return 0  # reported by the model's own check
    one = checkpoint_bytes(config, architecture)
    folder = RunDirectory(Path(config.run.dir) / config.run.name).checkpoints
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return max(one, one * (config.checkpoint.keep + config.checkpoint.keep_best + 1) - there)


if __name__ == "__main__":
    run_and_exit(main)
