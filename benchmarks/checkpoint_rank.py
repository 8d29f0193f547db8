"""One rank of the checkpoint benchmark: `python -m benchmarks.checkpoint_rank JOB`, started by `benchmarks.checkpoint`.

JOB is JSON: contestant, model, folder (for the checkpoint), rank, world, store (rendezvous file) and result (file to write).
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etr_megatron.platform.lifetime import die_with_parent

die_with_parent()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

import etr_megatron.checkpoint.checkpoint as implementation  # noqa: E402
from benchmarks.resident import peak_beyond  # noqa: E402
from etr_megatron import checkpoint  # noqa: E402
from etr_megatron.checkpoint.optimizer_shards import optimizers_of  # noqa: E402
from etr_megatron.config import load_config, resolve  # noqa: E402
from etr_megatron.platform.phases import PhaseBarriers  # noqa: E402
from etr_megatron.policy import Policy, configured_layout  # noqa: E402
from etr_megatron.status import run_and_exit  # noqa: E402
from etr_megatron.weights import read_architecture  # noqa: E402


def choose(contestant: str, policy: Policy) -> None:
    """Make checkpoint.save and load of `policy` in this process use the contestant's format."""
    if contestant.startswith("megatron"):
        implementation.store_by_rank = lambda optimizer: None
    if contestant == "megatron_mem_efficient":
        implementation._OPTIMIZER_METADATA["distrib_optim_fully_reshardable_mem_efficient"] = True
        for optimizer in optimizers_of(policy.optimizer):
            # It sends through gloo groups, which the product does not create. All ranks are data-parallel here.
            optimizer.data_parallel_group_gloo = dist.group.WORLD


def states(policy: Policy) -> list[Tensor]:
    """Adam's moments and fp32 weights of this rank, not copied."""
    optimizers = [one.optimizer for one in optimizers_of(policy.optimizer)]
    return [
        tensor
        for one in optimizers
        for parameter, state in one.state.items()
        for tensor in (parameter.data, state["exp_avg"], state["exp_avg_sq"])
    ]


def fill(policy: Policy, seed: int) -> None:
    """Fill all states, weights and moments, with new values."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    for tensor in states(policy):
        tensor.uniform_(generator=generator)


def read_bytes() -> int:
    """Bytes that this process has requested from the kernel."""
    return int(re.search(r"^rchar: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


def timed(run: Callable[[], Any]) -> tuple[float, int]:
    """(seconds, bytes of peak resident memory beyond what was resident before)."""
    dist.barrier()
    start = time.perf_counter()
    peak = peak_beyond(run)
    return time.perf_counter() - start, peak


def run_job(job: dict[str, Any]) -> dict[str, float]:
    """Run the job; returns the content of the result file."""
    layout = ["parallel.tp=1", "train.distributed_optimizer=true"]
    if job["contestant"] == "asynchronous":
        layout.append("checkpoint.asynchronous=true")
    config = resolve(load_config(None, [f"model.path={job['model']}", *layout]), job["world"], cuda=False)
    policy = Policy(read_architecture(job["model"]), job["model"], config, configured_layout(config))
    implementation._create_adam_state(policy.optimizer)  # as after an update
    choose(job["contestant"], policy)
    folder = Path(job["folder"]) / "checkpoints"
    fill(policy, 1)
    wanted = [tensor.clone() for tensor in states(policy)]
    saver, stopped = checkpoint.Saver(config, PhaseBarriers(config.run.phase_timeout_s)), []

    def save() -> None:
        start = time.perf_counter()
        saver.save(folder, 1, policy, {}, ())
        stopped.append(time.perf_counter() - start)
        fill(policy, 2)  # what is being written must not change
        saver.finish()

    save_s, save_peak = timed(save)
    before = read_bytes()
    load_s, load_peak = timed(lambda: checkpoint.load(folder, 1, policy))
    read = read_bytes() - before
    if not all(torch.equal(*pair) for pair in zip(states(policy), wanted, strict=True)):
        raise RuntimeError(f"{job['contestant']}: a load did not put back what was saved; its time would mean nothing")
    return {
        "stop_s": stopped[0],
        "save_s": save_s,
        "save_peak_bytes": save_peak,
        "load_s": load_s,
        "load_peak_bytes": load_peak,
        "load_read_bytes": read,
    }


def main() -> int:
    """Run the job of the command line and write its result."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{job['store']}", world_size=job["world"], rank=job["rank"])
    Path(job["result"]).write_text(json.dumps(run_job(job)))
    dist.barrier()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
