"""`--dry-run`: check a job's config, layout, weight map and memory in one process, without allocating a model.

The world is torch's fake process group, whose collectives do nothing; a rank's model is built on the meta device by the same
code as in a job.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from etr_megatron.cli import last_of_each, parse_args
from etr_megatron.config import ARITHMETIC, Config, Fp8Config, load_config, sources_of
from etr_megatron.errors import UserError
from etr_megatron.planner.advice import suggestions
from etr_megatron.planner.architecture import architecture_of
from etr_megatron.planner.hardware import GPUS
from etr_megatron.planner.plan import Plan, check_options, make_plan
from etr_megatron.planner.report import misfit, render
from etr_megatron.platform.files import refuse_all
from etr_megatron.status import run_cli

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture

_MAX_GPUS = 1024


def dry_run(argv: Sequence[str]) -> int:
    """Run `check_and_print`; returns the exit code, which is 0 except as described in `run_cli`."""

    def main() -> int:
        check_and_print(argv)
        return 0

    return run_cli(main)


def check_and_print(argv: Sequence[str]) -> None:
    """Check and print for `[--config] CONFIG [--gpus N] [--gpu NAME] [--gpu-memory GIB] [--gpus-per-node N] [key=value ...]`.

    Without --gpus, plans for the fewest GPUs that the config fits on. Raises UserError for everything that would keep the job
    from starting, including memory.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--gpu", type=str.lower, choices=GPUS, default="h100")
    parser.add_argument("--gpu-memory", type=float)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    try:
        args, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"--dry-run: {error}") from None
    if any(argument.partition("=")[0] == "--nproc" for argument in rest):
        raise UserError("--dry-run starts no processes: give --gpus instead of --nproc")
    options = dict(gpu=GPUS[args.gpu], gpu_memory=args.gpu_memory, gpus_per_node=args.gpus_per_node)
    path, overrides = parse_args(rest)
    config = load_config(path, last_of_each(overrides))
    plan = fewest_gpus(config, **options) if args.gpus is None else make_plan(config, args.gpus, **options)
    looked_at = [check_weights(plan.config), check_problems(plan.config)]
    built = distinct_ranks(plan)
    check_ranks(plan, built)
    print(render(plan))
    print("", *looked_at, sep="\n")
    print(f"ranks {', '.join(map(str, built))} built without memory: their parameters are those of the weight map and the plan")
    if args.gpus is None:
        print(f"--gpus is not given: {plan.cluster.gpus} is the first of 1, 2, 4, 8 ... that the config fits on")
    if not plan.fits:
        fitting = [s.setting for s in suggestions(config, plan, **options) if s.fits]
        hint = f"; one of these makes it fit: {', '.join(fitting)}" if fitting else ""
        raise UserError(f"{path} does not fit on GPUs of {plan.gpu_memory:g} GiB: {misfit(plan)}{hint}")


def fewest_gpus(config: Config, **options: Any) -> Plan:
    """The plan for the fewest GPUs, a power of 2, on which an unresolved config is valid and fits. options: see `make_plan`.

    Raises UserError if there is none, and for problems that no number of GPUs would fix.
    """
    from etr_megatron.weights import LowRank

    check_options(config, 1, **options)
    arch = architecture_of(config)
    if low_rank := LowRank.of(config.lora):
        low_rank.refuse_missing_targets(arch)
    reason = ""
    for gpus in (2**power for power in range(_MAX_GPUS.bit_length())):
        try:
            plan = make_plan(config, gpus, **options)
        except UserError as error:
            reason = str(error)
            continue
        if plan.fits:
            return plan
        reason = misfit(plan)
    raise UserError(
        f"the config fits on no power of 2 up to {_MAX_GPUS} GPUs; give a number with --gpus; on {_MAX_GPUS}: {reason}"
    )


def check_weights(config: Config) -> str:
    """A sentence on the checkpoint. Raises UserError if its tensors do not match its config.json."""
    from etr_megatron.weights import check_checkpoint

    if config.model.path == "tiny":
        return "the tiny model is created when the job starts: there are no weights to check yet"
    if not Path(config.model.path).is_dir():
        return f"{config.model.path} is not here: its weights were not checked"
    arch = check_checkpoint(config.model.path)
    others = ", and layers for multi-token prediction, which are left out" if arch.mtp_layers else ", and no other"
    return f"{config.model.path} has every tensor of the weight map{others}"


def check_problems(config: Config) -> str:
    """Sentences on the problems. Raises UserError for a file or a function of the user's that cannot be used."""
    from etr_megatron import checks
    from etr_megatron.check_functions import check_functions

    sources = sources_of(config.data)
    # A hub dataset may be a directory here, which is read without fetching anything.
    known = [source for source in sources if source.location == ARITHMETIC or os.path.exists(source.location)]
    refuse_all(lambda: checks.check_problems(known, config), lambda: check_functions(config))
    rest = [source for source in sources if source not in known]
    found = {
        "has rows that can be used": [source for source in known if source.location != ARITHMETIC],
        "is not here: its rows were not checked": [source for source in rest if source.is_file],
        "was not fetched: its rows were not checked": [source for source in rest if not source.is_file],
    }
    lines = [f"{source.location} {what}" for what, which in found.items() for source in which]
    return "\n".join(lines) or "the problems are generated"


def distinct_ranks(plan: Plan) -> list[int]:
    """The first and the last rank of every pipeline stage: all others hold shards of the same shapes as one of them."""
    size = plan.cluster.ranks // plan.config.parallel.pp
    return sorted({rank for first in range(0, plan.cluster.ranks, size) for rank in (first, first + size - 1)})


def check_ranks(plan: Plan, ranks: Sequence[int]) -> None:
    """Build the model of each of `ranks` and compare.

    Raises RuntimeError for a parameter missing from the weight map, a row of the map without a parameter, and a rank whose
    number of parameters, or of its adapters, differs from the plan's. The process must not be in a torch.distributed world.
    """
    for rank in ranks:
        planned = plan.ranks[rank]
        elements, adapters = elements_built(plan.arch, plan.config, plan.cluster.ranks, rank)
        if elements != planned.elements:
            raise RuntimeError(f"rank {rank} has {elements} parameters, the plan says {planned.elements}")
        if adapters != planned.adapters:
            raise RuntimeError(f"rank {rank} has adapters of {adapters} elements, the plan says {planned.adapters}")


def elements_built(arch: Architecture, config: Config, world: int, rank: int) -> tuple[int, int]:
    """Numbers of elements in a rank's model chunks, built on the meta device in a fake world: (parameters of the model, of its
    low-rank adapters)."""
    import torch

    with _fake_rank(rank, world):
        from etr_megatron.policy import configured_layout, model
        from etr_megatron.policy.adapters import PolicyAdapters
        from etr_megatron.policy.megatron_fields import without_gpu
        from etr_megatron.policy.model_config import configured_transformer

        layout = configured_layout(config)
        # Without FP8 and other options of Transformer Engine: they change no parameter.
        megatron = configured_transformer(arch, layout, without_gpu(replace(config, fp8=Fp8Config())))
        megatron.perform_initialization = False
        with torch.device("cpu"):
            frequencies = model.rotary_frequencies(arch)  # transformers computes Llama's on an explicit device
        # Megatron would move a tied embedding, and the head that repeats it in the last stage, to the CPU to add them up.
        no_sum = mock.patch.object(model.GPTModel, "_is_in_embd_group", lambda _: False)
        with torch.device("meta"), mock.patch.object(model, "rotary_frequencies", lambda _: frequencies), no_sum:
            chunks = model.build_chunks(arch, megatron, layout)  # compares their names with the weight map
            elements = sum(tensor.numel() for chunk in chunks for tensor in model.weights_in(chunk).values())
            # Meta tensors have no values, so the base cannot be copied to the CPU.
            lora = replace(config, lora=replace(config.lora, offload_base=False))
            adapters = PolicyAdapters(arch, chunks, layout, lora).named()
        return elements, sum(factor.numel() for factor in adapters.values())


@contextmanager
def _fake_rank(rank: int, world: int) -> Iterator[None]:
    """Make this process a rank of a fake world without devices, with Megatron's own layers on any machine."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from etr_megatron import platform

    with (
        mock.patch.dict(os.environ, {"ETR_PLATFORM": "cpu"}),
        mock.patch.object(platform, "device", lambda: torch.device("meta")),
    ):
        from etr_megatron.policy import parallel

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            yield
        finally:
            parallel.mpu.destroy_model_parallel()
            dist.destroy_process_group()
