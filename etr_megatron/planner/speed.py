"""Seconds of a step: generation, old log-probs, training, weight sync; one after the other, or generation beside training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from etr_megatron.config import LOSSES, Config
from etr_megatron.flops import body_flops, head_flops
from etr_megatron.planner.cluster import Cluster
from etr_megatron.planner.decode import generation_seconds, response_lengths
from etr_megatron.planner.hardware import Hardware
from etr_megatron.planner.memory import ServerMemory, fp8_bytes
from etr_megatron.planner.workload import Workload

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. logprobs: the old log-probs, and the reference's. tokens: of a step. gpus: all of the job's.

    overlapped: whether generation runs beside the rest (`rollout.max_staleness` of 1 or more).
    """

    generate: float
    logprobs: float
    train: float
    sync: float
    bubble: float
    tokens: float
    gpus: int
    overlapped: bool

    @property
    def step(self) -> float:
        """A sync stops both."""
        trained = self.logprobs + self.train
        return self.sync + (max(self.generate, trained) if self.overlapped else self.generate + trained)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Prompts and responses trained on, over the step's time and all GPUs."""
        return self.tokens / self.step / self.gpus


def step_time(
    arch: Architecture, config: Config, cluster: Cluster, work: Workload, server: ServerMemory, gpu: Hardware
) -> StepTime:
    """The estimate for a resolved config. Not counted: grading, checkpoints, evaluation, start-up."""
    parallel = config.parallel
    bubble = (parallel.pp - 1) / (parallel.vpp * work.microbatches)
    body = work.samples * body_flops(arch, work.prompt + work.response)
    head = work.samples * head_flops(arch, work.response)
    efficiency = gpu.dense_efficiency if arch.experts is None else gpu.expert_efficiency
    rate = cluster.ranks * gpu.matmul * efficiency / (1 + bubble)
    fp8 = gpu.fp8_speedup if config.fp8.recipe != "none" else 1.0
    passes = 4 if config.train.recompute == "full" else 3
    # The head forms its gradients in its forward pass where the loss is token-local and their buffer fp32; else it makes its
    # logits twice. Only its own module says whether a user's loss is, and a plan imports none.
    loss = config.objective.loss
    heads = 4 if loss == "gspo" or loss not in LOSSES or config.train.grads_dtype == "bfloat16" else 3
    forward = (body / fp8 + head) / rate
    model_bytes = _model_bytes(arch, config)
    return StepTime(
        generate=_generate(arch, config, cluster, work, server, gpu),
        logprobs=forward * (2 if config.objective.kl_coef > 0 else 1),
        train=config.train.epochs * (passes * body / fp8 + heads * head) / rate,
        sync=sync_seconds(config, cluster, model_bytes, gpu, sent_bytes=_sent_bytes(arch, config, model_bytes)),
        bubble=bubble,
        tokens=work.tokens,
        gpus=cluster.gpus,
        overlapped=config.rollout.max_staleness > 0,
    )


def sync_seconds(config: Config, cluster: Cluster, model_bytes: int, gpu: Hardware, *, sent_bytes: int | None = None) -> float:
    """Seconds from the last update to servers with the new weights.

    model_bytes: as they are trained. sent_bytes: as servers get them, quantised before they are sent; None is the same.
    Whole tensors are gathered over tensor-parallel ranks and passed to all stages first; `broadcast` then sends them from one
    adapter, `disk` goes by a filesystem, `tensor` as `_by_memory` says. `sharded` sends every server GPU its part, from all
    ranks.
    """
    network, nvlink = gpu.network * gpu.link_efficiency, gpu.nvlink * gpu.link_efficiency
    parallel, sglang = config.parallel, config.sglang
    gather = (model_bytes / nvlink if parallel.tp != 1 else 0.0) + (model_bytes / network if parallel.pp > 1 else 0.0)
    if config.rollout.backend == "embedded":
        return gather
    transport = sglang.sync or ("tensor" if sglang.placement == "colocated" else "broadcast")
    sent_bytes = model_bytes if sent_bytes is None else sent_bytes
    if transport == "sharded":
        received = sent_bytes / cluster.server_tp
        sent = sent_bytes * cluster.servers / cluster.ranks
        return gpu.pause + max(received, sent) / network
    sent = {
        "broadcast": sent_bytes / network,
        "tensor": _by_memory(cluster, sent_bytes, gpu, nodes=1 if sglang.nodes == "first" else cluster.nodes),
        "disk": 2 * sent_bytes / gpu.disk_rate,
    }[transport]
    return gpu.pause + gather + sent


def _by_memory(cluster: Cluster, model_bytes: int, gpu: Hardware, *, nodes: int) -> float:
    """To one rank of every node, which copies it into the machine's memory, where servers read it; text for those outside."""
    if cluster.outside:
        return 4 / 3 * cluster.server_tp * model_bytes / gpu.http_rate
    to_nodes = model_bytes / (gpu.network * gpu.link_efficiency) if nodes > 1 else 0.0
    return to_nodes + 2 * model_bytes / gpu.host_rate


def _model_bytes(arch: Architecture, config: Config) -> int:
    from etr_megatron.planner.parameters import total_parameters

    return total_parameters(arch) * (4 if config.model.dtype == "float32" else 2)


def _sent_bytes(arch: Architecture, config: Config, whole: int) -> int:
    """Of a sync, `whole` as trained: matrices for servers in FP8 are blocks with their scales."""
    from etr_megatron.planner.parameters import total_matrices

    if config.rollout.backend != "sglang" or not config.sglang.fp8:
        return whole
    matrices = total_matrices(arch)
    return whole - matrices * (4 if config.model.dtype == "float32" else 2) + fp8_bytes(matrices)


def _generate(
    arch: Architecture, config: Config, cluster: Cluster, work: Workload, server: ServerMemory, gpu: Hardware
) -> float:
    """The slowest server: all have the same mixture of lengths."""
    samples = -(-work.samples // cluster.servers)
    embedded = config.rollout.backend == "embedded"
    return generation_seconds(
        arch,
        lengths=response_lengths(samples, work.response, config.rollout.max_response_tokens),
        prompt=work.prompt,
        concurrency=config.rollout.batch_samples if embedded else config.sglang.concurrency,
        cache_tokens=None if embedded else max(1, server.cache_tokens),
        tp=cluster.server_tp,
        weight_bytes=server.weights,
        token_bytes=server.token,
        gpu=gpu,
    )
