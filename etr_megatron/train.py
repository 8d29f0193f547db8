"""The entry point of a rank: `torchrun -m etr_megatron.train [--config CONFIG] [key=value ...]`."""

from __future__ import annotations

import gc
import os
import sys

from etr_megatron import platform
from etr_megatron.checks import (
    check_inputs,
    check_server_node,
    dedicated_nodes,
    nodes_per_server,
    syncs_over_process_groups,
)
from etr_megatron.cli import USAGE, asks_for_help, last_of_each, parse_args, require_torchrun
from etr_megatron.config import Config, load_config, resolve
from etr_megatron.platform.lifetime import die_with_parent
from etr_megatron.platform.nccl import prepare_for_groups_with_servers
from etr_megatron.platform.world import NodeRole, node_role
from etr_megatron.quick_checks import adding_input_problems
from etr_megatron.status import exit_code_of, run_and_exit


def main(argv: list[str] | None = None) -> int:
    """Run one rank to the end. Returns its exit code: 2 after a user error, 75 if the run should be restarted, each with one
    message."""
    die_with_parent()
    return exit_code_of(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    if asks_for_help(argv):
        print(f"usage: torchrun ... -m etr_megatron.train {USAGE}")
        return 0
    if "--dry-run" in argv:
        from etr_megatron.planner.dry_run import dry_run

        return dry_run([argument for argument in argv if argument != "--dry-run"])
    # Megatron relies on this: with one connection, kernels start in launch order, so communication starts before the GEMMs that
    # overlap with it. CUDA reads the variable at initialization.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        # Packed microbatches differ in length, and their tensors leave gaps that fixed segments cannot merge. Torch reads the
        # variable at its first allocation. Servers do not inherit it.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    path, overrides = parse_args(argv)
    if os.environ.get("RANK", "0") == "0":  # one note is enough
        last_of_each(overrides)
    with adding_input_problems():
        config = load_config(path, overrides)
    os.environ["ETR_PLATFORM"] = config.run.platform
    if syncs_over_process_groups(config):
        prepare_for_groups_with_servers()
    dedicated = dedicated_nodes(config)
    role = node_role(dedicated, nodes_per_server(config))
    if dedicated:  # the training world excludes these nodes
        os.environ["WORLD_SIZE"] = str(role.training_ranks)
    with adding_input_problems():
        config = resolve(config, role.training_ranks, cuda=platform.uses_cuda())
    if role.server_node is not None:
        return _serve(config, role)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        check_inputs(config, role.training_ranks)
    require_torchrun("etr_megatron.train")
    # Garbage collection while 4,000 modules load would take a fifth of the time to the first step.
    gc.disable()
    from etr_megatron.job import run_rank

    run_rank(config)
    return 0


def _serve(config: Config, role: NodeRole) -> int:
    """Run a dedicated server node: local rank 0 runs the servers; the other processes return at once."""
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return 0
    from etr_megatron.rollout.sglang import ServerNode

    assert role.server_node is not None
    node = ServerNode(role.server_node, config.sglang, config.run.stop_grace_s, patience_s=config.run.phase_timeout_s)
    return node.serve(lambda: check_server_node(config, role.training_ranks))


if __name__ == "__main__":
    run_and_exit(main)
