"""The entry point of a rank: `torchrun -m etr_megatron.train [--config CONFIG] [key=value ...]`."""

from __future__ import annotations

import gc
import os
import sys

from etr_megatron import platform
from etr_megatron.checks import beside_inputs, check_inputs, check_server_node, meets_servers_in_nccl, nodes_apart
from etr_megatron.cli import USAGE, asks_for_help, parse_args, require_torchrun
from etr_megatron.config import Config, load_config, resolve
from etr_megatron.platform.lifetime import die_with_parent
from etr_megatron.platform.nccl import prepare_for_groups_with_servers
from etr_megatron.platform.world import Place, place_of
from etr_megatron.status import exit_code_of


def main(argv: list[str] | None = None) -> None:
    """Run one rank to the end; exits with 2 after a user error and 75 to be restarted, each with one message."""
    die_with_parent()
    code = exit_code_of(lambda: _run(sys.argv[1:] if argv is None else argv))
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: torch.distributed's cleanup would wait for ranks that are in a collective.
        os._exit(code)


def _run(argv: list[str]) -> None:
    if asks_for_help(argv):
        print(f"usage: torchrun ... -m etr_megatron.train {USAGE}")
        return
    if "--dry-run" in argv:
        from etr_megatron.planner.dry_run import dry_run

        if code := dry_run([argument for argument in argv if argument != "--dry-run"]):
            os._exit(code)
        return
    # Megatron relies on it: kernels start in launch order, so communication starts before the GEMMs that overlap with it. CUDA
    # reads it at initialization.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    path, overrides = parse_args(argv)
    with beside_inputs():
        config = load_config(path, overrides)
    os.environ["ETR_PLATFORM"] = config.run.platform
    if meets_servers_in_nccl(config):
        prepare_for_groups_with_servers()
    apart = nodes_apart(config)
    place = place_of(apart)
    if apart:  # the training world excludes these nodes
        os.environ["WORLD_SIZE"] = str(place.ranks)
    with beside_inputs():
        config = resolve(config, place.ranks, cuda=platform.uses_cuda())
    if place.apart is not None:
        _serve(config, place)
        return
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        check_inputs(config, place.ranks)
    require_torchrun("etr_megatron.train")
    # Garbage collection while 4,000 modules load would take a fifth of the time to the first step.
    gc.disable()
    from etr_megatron.job import run_rank

    run_rank(config)


def _serve(config: Config, place: Place) -> None:
    """Run a dedicated server node: local rank 0 keeps the servers, the other processes return."""
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return
    from etr_megatron.rollout.sglang import ServerNode

    assert place.apart is not None
    node = ServerNode(place.apart, config.sglang, config.run.stop_grace_s, patience_s=config.run.phase_timeout_s)
    if code := node.serve(lambda: check_server_node(config, place.ranks)):
        os._exit(code)


if __name__ == "__main__":
    main()
