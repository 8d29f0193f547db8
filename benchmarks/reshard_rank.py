"""One rank of the resharding benchmark: `python -m benchmarks.reshard_rank JOB`, started by `benchmarks.reshard`; JOB is JSON.

A job has case (its number), quick, dtype, rounds, rank, world, store (rendezvous file) and result (file to write).
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

from etr_megatron.platform.lifetime import die_with_parent

die_with_parent()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.reshard_contestants import OURS_AND_PLAIN, MegatronCore  # noqa: E402
from benchmarks.reshard_problem import CASES, Case, own_shards  # noqa: E402
from etr_megatron.status import run_and_exit  # noqa: E402
from etr_megatron.weights import Architecture  # noqa: E402

Shards = dict[str, Tensor]


class WrongResultError(RuntimeError):
    """A contestant's output differs from the destination's shards, so its time would mean nothing."""


def problem(case: Case, arch: Architecture, dtype: torch.dtype) -> tuple[Shards, Shards, Shards, list[Any]]:
    """(source shards, destination shards to fill, their expected values, models) of this rank, empty if it has no such role.

    If both layouts are in the same processes, shards are model parameters, as megatron-core's resharding requires.
    """
    rank, place = dist.get_rank(), dist.get_rank() - case.start
    sources = own_shards(case.source, arch, rank, dtype) if rank < case.source.world else {}
    wanted = own_shards(case.destination, arch, place, dtype) if 0 <= place < case.destination.world else {}
    blank = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    if not case.together:
        return sources, blank, wanted, []
    from benchmarks import reshard_megatron as megatron

    if case.experts:
        models = [megatron.BareModel(case.source, arch, sources), megatron.BareModel(case.destination, arch, blank)]
        return sources, blank, wanted, models
    megatron.global_groups(case.source)
    models, found = [], []
    for placement, groups in ((case.source, None), (case.destination, megatron.groups_of(case.destination))):
        layout = megatron.layout_of(placement, rank)
        models.append(megatron.build(arch, layout, dtype, groups))
        found.append(megatron.parameters(models[-1], arch, layout))
    for name, tensor in sources.items():
        found[0][name].copy_(tensor)
    return found[0], found[1], wanted, models


def check(name: str, found: Shards, wanted: Shards) -> None:
    """Raises `WrongResultError` if a destination shard is not bit for bit as expected."""
    for key, tensor in wanted.items():
        if not torch.equal(found[key], tensor):
            raise WrongResultError(f"{name}: {key} is not the destination's shard")


def measure(contestants: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run on the slowest rank; round robin, each round starts with another contestant."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            dist.barrier()
            start = time.perf_counter()
            contestants[name].run()
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            seconds[name].append(took.item())
    return seconds


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job; returns the content of the result file."""
    case, dtype = CASES[job["case"]], getattr(torch, job["dtype"])
    arch = case.architecture(job["quick"])
    sources, destinations, wanted, models = problem(case, arch, dtype)
    contestants = {name: kind(case, arch, sources, destinations, dtype) for name, kind in OURS_AND_PLAIN.items()}
    if models:
        contestants["megatron_core"] = MegatronCore(*models)
    first, sent = {}, {}
    for name, contestant in contestants.items():
        for tensor in destinations.values():
            tensor.fill_(77)
        dist.barrier()
        start = time.perf_counter()
        contestant.run()
        first[name] = time.perf_counter() - start
        sent[name] = contestant.bytes_sent
        if name != "bare_copy":
            check(name, destinations, wanted)
    return {"seconds": measure(contestants, job["rounds"]), "first_s": first, "bytes": sent}


def main() -> int:
    """Run the job of the command line and write its result."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job['store']}",
        rank=job["rank"],
        world_size=job["world"],
        timeout=datetime.timedelta(minutes=10),
    )
    Path(job["result"]).write_text(json.dumps(run_job(job)))
    dist.barrier()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
