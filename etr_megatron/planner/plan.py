"""A plan: the memory and time of a config on a number of GPUs, without any GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, Any

from etr_megatron.config import Config, InvalidConfigError, resolve
from etr_megatron.errors import UserError
from etr_megatron.planner.adapters import RankAdapters, adapters_by_rank, total_adapters
from etr_megatron.planner.architecture import architecture_of
from etr_megatron.planner.cluster import Cluster, divide, gpu_problems, training_layout
from etr_megatron.planner.hardware import H100, Hardware
from etr_megatron.planner.host import snapshot_bytes
from etr_megatron.planner.memory import RankMemory, ServerMemory, rank_memory, server_memory, usable
from etr_megatron.planner.parameters import total_parameters
from etr_megatron.planner.recompute import uncounted
from etr_megatron.planner.speed import StepTime, step_time
from etr_megatron.planner.workload import Workload, workload_of
from etr_megatron.sglang_support import check_sglang_support

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture


@dataclass(frozen=True)
class Plan:
    """gpu_memory: GiB per GPU. parameters: exact number in the checkpoint. adapters: elements of low-rank adapters, which do
    not count as parameters of the model. held_adapters: the adapters on every rank. ranks: training ranks, in order."""

    config: Config
    arch: Architecture
    cluster: Cluster
    work: Workload
    gpu: Hardware
    gpu_memory: float
    parameters: int
    adapters: int
    held_adapters: Sequence[RankAdapters]
    ranks: list[RankMemory]
    server: ServerMemory

    @cached_property
    def time(self) -> StepTime:
        """Time of a step, as if ranks and servers fit. Meaningless if servers hold no sample: then there is no
        generation to estimate. Computed by a simulation on first use, which may take seconds."""
        # Moved to the CPU and back in every step.
        moved = max(rank.optimizer for rank in self.ranks) if self.config.train.offload_for_rollout else 0
        return step_time(self.arch, self.config, self.cluster, self.work, self.server, self.gpu, moved, self.held_adapters)

    @property
    def tightest(self) -> RankMemory:
        """The rank with the highest peak; the first one on a tie."""
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def base_on_host(self) -> int:
        """Bytes of adapted matrices' original values in the pinned CPU memory of the node with the most of them."""
        nodes = [0] * self.cluster.nodes
        for rank in self.ranks:
            nodes[self.cluster.node_of(rank.rank)] += rank.base_on_host
        return max(nodes)

    @property
    def snapshot_on_host(self) -> int:
        """Bytes of the copy that `checkpoint.asynchronous` makes on the node with the most ranks; 0 without it."""
        ranks = self.cluster.ranks
        return snapshot_bytes(self.config, self.arch, min(self.cluster.ranks_per_node, ranks), ranks)

    @property
    def cache_samples(self) -> int:
        """Number of samples of maximum length that a server's KV caches hold."""
        return self.server.caches * (self.server.tokens_of_a_cache // self.work.longest)

    @property
    def server_holds_sample(self) -> bool:
        """Whether a server's weights leave room for one sample of maximum length. GPUs outside the job are not checked."""
        return self.config.rollout.backend == "embedded" or self.cluster.outside or self.cache_samples >= 1

    @property
    def server_fits(self) -> bool:
        """Whether servers hold a sample and, on GPUs of their own, need no more memory than there is. (That of servers on the
        ranks' GPUs is in the peaks of the ranks. SGLang itself chooses a fraction that fits.)"""
        is_counted = self.cluster.colocated or self.cluster.outside or self.config.sglang.mem_fraction is None
        return self.server_holds_sample and (is_counted or self.server.peak <= usable(self.gpu_memory))

    @property
    def ranks_fit(self) -> bool:
        """Whether all ranks fit."""
        return self.tightest.peak <= usable(self.gpu_memory)

    @property
    def fits(self) -> bool:
        """Whether all ranks and servers fit."""
        return self.ranks_fit and self.server_fits

    def as_dict(self) -> dict[str, Any]:
        """The plan for `--json`: bytes, seconds and counts; `time` is None if servers hold no sample, see `time`.
        uncounted: keys that the plan ignores."""
        ranks = [{**asdict(rank), "phases": rank.phases, "peak": rank.peak} for rank in self.ranks]
        return {
            "gpu": self.gpu.name,
            "parameters": self.parameters,
            "adapters": self.adapters,
            "base_bytes_on_host": self.base_on_host,
            "snapshot_bytes_on_host": self.snapshot_on_host,
            "fits": self.fits,
            "usable_bytes": usable(self.gpu_memory),
            "tightest_rank": self.tightest.rank,
            "uncounted": [f"train.megatron.{name}" for name in uncounted(self.config.train)],
            "cluster": asdict(self.cluster),
            "workload": {**asdict(self.work), "tokens": self.work.tokens},
            "server": {**asdict(self.server), "cache_tokens": self.server.cache_tokens},
            "time": self._time_as_dict() if self.server_holds_sample else None,
            "ranks": ranks,
        }

    def _time_as_dict(self) -> dict[str, Any]:
        time = self.time
        return {**asdict(time), "step": time.step, "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu}


def make_plan(
    config: Config,
    gpus: int,
    *,
    gpu: Hardware = H100,
    gpu_memory: float | None = None,
    gpus_per_node: int = 8,
    prompt: float | None = None,
    response: float | None = None,
) -> Plan:
    """Plan a loaded, unresolved config for machines with CUDA.

    gpu_memory: GiB; None is that of `gpu`. prompt, response: mean tokens, see `workload_of`. Raises UserError for a config that
    is not valid on that number of GPUs or whose layout does not fit the model, and when `check_options` does.
    """
    gpu_memory = gpu.gib if gpu_memory is None else gpu_memory
    check_options(config, gpus, gpu=gpu, gpu_memory=gpu_memory, gpus_per_node=gpus_per_node, prompt=prompt, response=response)
    from etr_megatron.weights import LowRank

    cluster = divide(config, gpus, gpus_per_node)
    try:
        config = resolve(config, cluster.ranks, cuda=True)
    except InvalidConfigError as error:
        raise error.with_head(f"invalid configuration on {cluster.ranks} ranks ({cluster.origin_of_ranks})") from None
    arch = architecture_of(config)
    check_model_fits_layout(arch, config)
    work = workload_of(config, cluster, prompt, response)
    try:
        if config.rollout.backend == "sglang":
            check_sglang_support(config.model.path, arch, config.sglang)
        server = server_memory(arch, config, cluster, gpu_memory)
        low_rank = LowRank.of(config.lora)
        adapters = adapters_by_rank(arch, training_layout(config, cluster.ranks), low_rank)
        ranks = rank_memory(arch, config, cluster, work, server, adapters)
    except ValueError as error:
        raise UserError(f"{config.model.path} cannot be split as configured: {error}") from None
    return Plan(
        config=config,
        arch=arch,
        cluster=cluster,
        work=work,
        gpu=gpu,
        gpu_memory=gpu_memory,
        parameters=total_parameters(arch),
        adapters=total_adapters(arch, low_rank),
        held_adapters=adapters,
        ranks=ranks,
        server=server,
    )


def check_options(
    config: Config,
    gpus: int,
    *,
    gpu: Hardware = H100,
    gpu_memory: float | None = None,
    gpus_per_node: int = 8,
    prompt: float | None = None,
    response: float | None = None,
) -> None:
    """Check the options of `make_plan`. Raises one UserError for all invalid numbers, and for FP8 on a GPU without it."""
    problems = gpu_problems(gpus, gpus_per_node)
    if config.fp8.recipe == "mxfp8" and gpu.fp8 and not gpu.mxfp8:
        problems.append(f"fp8.recipe=mxfp8: an {gpu.name} has no MXFP8; set fp8.recipe=blockwise, or name another --gpu")
    for key in () if gpu.fp8 else fp8_keys(config):
        problems.append(f"{key}: an {gpu.name} has no FP8; remove the setting, or choose another --gpu")
    if gpu_memory is not None and not 0 < gpu_memory < inf:
        problems.append(f"--gpu-memory {gpu_memory:g}: must be a number of GiB greater than 0")
    longest = {"data.max_prompt_tokens": config.data.max_prompt_tokens}
    longest |= {"rollout.max_response_tokens": config.rollout.max_response_tokens}
    for option, mean, (key, most) in zip(("prompt", "response"), (prompt, response), longest.items(), strict=True):
        if mean is not None and not 0 < mean <= most:
            problems.append(f"--mean-{option} {mean:g}: must be greater than 0 and at most {key} = {most}")
    if problems:
        raise UserError("\n".join(problems))


def fp8_keys(config: Config) -> list[str]:
    """The settings of a config that need FP8 on the GPU."""
    found = [f"fp8.recipe={config.fp8.recipe}"] if config.fp8.recipe != "none" else []
    return [*found, "sglang.fp8=true"] if config.rollout.backend == "sglang" and config.sglang.fp8 else found


def check_model_fits_layout(arch: Architecture, config: Config) -> None:
    """Run a job's checks of its model, except those of weights and tokenizer. Raises UserError."""
    from etr_megatron.checks import check_architecture, check_context

    assert config.parallel.tp != "auto"
    check_architecture(config.model.path, arch, config, config.parallel.tp)
    check_context(arch, config)
