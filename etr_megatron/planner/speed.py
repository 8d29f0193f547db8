"""Seconds of a step: generation, old log-probs, training and weight sync; sequential, or with overlapped generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from etr_megatron.config import LOSSES, Config, sync_of
from etr_megatron.flops import body_flops, head_flops
from etr_megatron.planner.adapters import RankAdapters, base_seconds, merge_seconds, projection_seconds
from etr_megatron.planner.cluster import Cluster, training_layout
from etr_megatron.planner.decode import generation_seconds, response_lengths
from etr_megatron.planner.hardware import Hardware
from etr_megatron.planner.memory import ServerMemory, element_bytes, fp8_bytes
from etr_megatron.planner.parameters import total_matrices, total_parameters
from etr_megatron.planner.recompute import Recomputation
from etr_megatron.planner.workload import Workload

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. logprobs: old and reference log-probs. adapters: the part of `logprobs` and `train` that is due to
    low-rank adapters. tokens: tokens of a step. gpus: all GPUs of the job.

    overlapped: whether generation overlaps with the rest (`rollout.max_staleness` of 1 or more, servers on other GPUs).
    """

    generate: float
    logprobs: float
    train: float
    sync: float
    bubble: float
    adapters: float
    tokens: float
    gpus: int
    overlapped: bool

    @property
    def step(self) -> float:
        """Seconds in total; a sync stops both generation and training."""
        trained = self.logprobs + self.train
        return self.sync + (max(self.generate, trained) if self.overlapped else self.generate + trained)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens trained on (prompts and responses), over the step's time and all GPUs."""
        return self.tokens / self.step / self.gpus


def step_time(
    arch: Architecture,
    config: Config,
    cluster: Cluster,
    work: Workload,
    server: ServerMemory,
    gpu: Hardware,
    moved: int,
    adapters: Sequence[RankAdapters],
) -> StepTime:
    """The estimate for a resolved config. moved: bytes that a rank moves to the CPU for the rollout and back, counted with the
    sync. adapters: one entry per rank. Excludes grading, checkpoints, evaluation and startup."""
    parallel = config.parallel
    bubble = (parallel.pp - 1) / (parallel.vpp * work.microbatches)
    body = work.samples * body_flops(arch, work.prompt + work.response)
    head = work.samples * head_flops(arch, work.response)
    efficiency = gpu.dense_efficiency if arch.experts is None else gpu.expert_efficiency
    rate = cluster.ranks * gpu.matmul * efficiency / (1 + bubble)
    fp8 = gpu.fp8_speedup if config.fp8.recipe != "none" else 1.0
    passes = 3 + Recomputation.of(config.train).share(arch, training_layout(config, cluster.ranks))
    heads = _head_products(config)
    forward = (body / fp8 + head) / rate
    model_bytes = total_parameters(arch) * element_bytes(config)
    sync = sync_seconds(config, cluster, model_bytes, _sent_bytes(arch, config, model_bytes), gpu)
    updating, referring = _adapters_seconds(config, work, gpu, adapters, bubble)
    return StepTime(
        generate=_generate(arch, config, cluster, work, server, gpu),
        logprobs=forward * ((config.objective.old_logp == "trainer") + (config.objective.kl_coef > 0)) + referring,
        train=config.train.epochs * (passes * body / fp8 + heads * head) / rate + updating,
        sync=sync + 2 * moved / gpu.host_rate,
        bubble=bubble,
        adapters=updating + referring,
        tokens=work.tokens,
        gpus=cluster.gpus,
        overlapped=config.rollout.max_staleness > 0 and config.sglang.placement != "colocated",
    )


def _head_products(config: Config) -> int:
    """Products of the head in an update: the logits, the rows' gradient, and the weight's unless it is frozen.

    With a token-local loss, the head computes its gradients in the forward pass; else it computes the logits twice. A custom
    loss counts as not token-local: finding out would need its import, which a plan avoids.
    """
    loss, frozen = config.objective.loss, config.lora.rank > 0
    twice = loss == "gspo" or loss not in LOSSES
    return 2 + (not frozen) + twice


def _adapters_seconds(
    config: Config, work: Workload, gpu: Hardware, adapters: Sequence[RankAdapters], bubble: float
) -> tuple[float, float]:
    """(seconds in updates, seconds in reference log-probs) of a step that the rank with the most adapters spends on them.

    In updates, every microbatch's gradients are projected, and every optimizer step merges the weights. For the reference, the
    model's original values are restored and afterwards merged again.
    """
    most, element = max(adapters, key=lambda rank: rank.base), element_bytes(config)
    offloaded, updates = config.lora.offload_base, config.train.epochs * config.train.minibatches
    merge = merge_seconds(most, element, gpu, offloaded=offloaded)
    project = projection_seconds(most, element, gpu) * work.microbatches * (1 + bubble)
    refer = base_seconds(most, element, gpu, offloaded=offloaded) + merge if config.objective.kl_coef > 0 else 0.0
    return updates * (project + merge), refer


def sync_seconds(config: Config, cluster: Cluster, model_bytes: int, sent_bytes: int, gpu: Hardware) -> float:
    """Seconds from the last update until servers have the new weights.

    model_bytes: as trained. sent_bytes: as sent to servers, after quantization.
    Full tensors are first gathered over tensor-parallel ranks and broadcast to all stages; then `broadcast` sends them from one
    adapter, `disk` uses a file system, and `tensor` works as in `_by_memory`. `sharded` sends every server GPU its part, from
    all ranks.
    """
    network, nvlink = gpu.network * gpu.link_efficiency, gpu.nvlink * gpu.link_efficiency
    parallel, sglang = config.parallel, config.sglang
    gather = (model_bytes / nvlink if parallel.tp != 1 else 0.0) + (model_bytes / network if parallel.pp > 1 else 0.0)
    if config.rollout.backend == "embedded":
        return gather
    transport = sync_of(sglang)
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
    """Seconds of `sglang.sync: tensor`: one rank per node receives the weights and copies them to host memory, from which
    servers read them. Servers outside the job get them as text."""
    if cluster.outside:
        return 4 / 3 * cluster.server_tp * model_bytes / gpu.http_rate
    to_nodes = model_bytes / (gpu.network * gpu.link_efficiency) if nodes > 1 else 0.0
    return to_nodes + 2 * model_bytes / gpu.host_rate


def _sent_bytes(arch: Architecture, config: Config, whole: int) -> int:
    """Bytes sent in a sync: `whole` as trained, or for FP8 servers with quantized matrices and their scales."""
    if config.rollout.backend != "sglang" or not config.sglang.fp8:
        return whole
    matrices = total_matrices(arch)
    return whole - matrices * element_bytes(config) + fp8_bytes(matrices)


def _generate(
    arch: Architecture, config: Config, cluster: Cluster, work: Workload, server: ServerMemory, gpu: Hardware
) -> float:
    """Seconds of the server with the most samples; all have the same mixture of lengths."""
    samples = -(-work.samples // cluster.servers)
    embedded = config.rollout.backend == "embedded"
    return _generation_seconds(
        arch,
        samples,
        work.response,
        config.rollout.max_response_tokens,
        prompt=work.prompt,
        concurrency=config.rollout.batch_samples if embedded else config.sglang.concurrency,
        cache_tokens=None if embedded else max(1, server.tokens_of_a_cache),
        tp=cluster.server_tp,
        attention_dp=server.caches,
        weight_bytes=server.weights,
        expert_bytes=server.experts,
        token_bytes=server.token,
        gpu=gpu,
        nodes=cluster.nodes_per_server,
    )


@lru_cache(maxsize=16)  # most settings that advice tries do not change it
def _generation_seconds(arch: Architecture, samples: int, response: float, longest: int, **numbers: Any) -> float:
    """`generation_seconds` of `response_lengths`."""
    return generation_seconds(arch, lengths=response_lengths(samples, response, longest), **numbers)
