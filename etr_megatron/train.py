"""The entry point of a rank: `torchrun -m etr_megatron.train [--config CONFIG] [key=value ...]`."""

from __future__ import annotations

import gc
import os
import sys

from etr_megatron import platform
from etr_megatron.checks import check_inputs
from etr_megatron.cli import USAGE, asks_for_help, parse_args, require_torchrun
from etr_megatron.config import load_config, resolve
from etr_megatron.platform.lifetime import die_with_parent
from etr_megatron.status import exit_code_of


def main(argv: list[str] | None = None) -> None:
    """Run one rank to the end; exits with 2 after a user's mistake and 75 to be started again, each with one sentence."""
    die_with_parent()
    code = exit_code_of(lambda: _run(sys.argv[1:] if argv is None else argv))
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: leaving through torch.distributed's clean-up would wait for ranks that are in a collective.
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
    # Megatron counts on it: kernels start in the order of their launches, messages before the products that hide them. CUDA
    # reads it when it starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    path, overrides = parse_args(argv)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = load_config(path, overrides)
    os.environ["ETR_PLATFORM"] = config.run.platform
    config = resolve(config, world, cuda=platform.uses_cuda())
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        check_inputs(config, world)
    require_torchrun("etr_megatron.train")
    # Collections in the middle of loading 4,000 modules would take a fifth of the time to the first step.
    gc.disable()
    from etr_megatron.job import run_rank

    run_rank(config)


if __name__ == "__main__":
    main()
