"""Memory of every rank: resident, added by training, added by colocated servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from etr_megatron.config import Config, sync_of
from etr_megatron.config.schema.fp8 import FP8_BLOCK
from etr_megatron.planner.activations import Split, head_bytes, stage_activations
from etr_megatron.planner.adapters import RankAdapters
from etr_megatron.planner.cluster import Cluster, server_layout, training_layout
from etr_megatron.planner.cuda_graphs import gathered_bytes, graph_bytes
from etr_megatron.planner.nccl import nccl_bytes
from etr_megatron.planner.parameters import RankParameters, largest_weight, parameters_by_rank
from etr_megatron.planner.recompute import Recomputation
from etr_megatron.planner.workload import Workload

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture, TrainingLayout

GIB = 2**30
PROCESS = 3 * GIB // 2
"""Assumed: CUDA context, workspaces and code of one process, without NCCL."""
SLACK = 0.05
"""Assumed: fraction of a GPU's memory lost to fragmentation."""
SERVER_FRACTION = 0.85
"""Assumed if `sglang.mem_fraction` is null: SGLang chooses about this on 80 GB GPUs."""
CHUNK_ROWS = 1024
"""Rows of a head chunk on CUDA if `train.head_chunk_rows` is null."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank.

    elements, adapters: numbers, not bytes, of elements of the model and of low-rank adapters; parameters has the bytes of both.
    reference: the frozen model for a KL term. base: original values of adapted matrices on the GPU; base_on_host: in pinned CPU
    memory. step: temporary memory in an optimizer step, for an fp32 copy of bfloat16 gradients or for merging adapters.
    offloaded: memory that is moved off the GPU for the rollout. activations, head: during training. projected: gradients of
    adapted weights until they are projected, beside activations. export: full weights and buckets while weights are sent, and a
    bfloat16 copy of weights held in FP8. server: the pool of a server on the same GPU during generation. graphs: its CUDA
    graphs, which stay. embedded, cache: the embedded engine's weights, and keys and values of its largest batch during
    generation. nccl: see `nccl_bytes`.
    """

    rank: int
    stage: int
    elements: int
    adapters: int
    parameters: int
    gradients: int
    optimizer: int
    step: int
    offloaded: int
    reference: int
    base: int
    base_on_host: int
    activations: int
    head: int
    projected: int
    export: int
    server: int
    graphs: int
    embedded: int
    cache: int
    nccl: int

    @property
    def resident(self) -> int:
        """Bytes held in every phase, or with `offloaded` in training."""
        trained = self.parameters + self.gradients + self.optimizer
        return trained + self.reference + self.base + self.embedded + PROCESS + self.nccl

    @property
    def phases(self) -> dict[str, int]:
        """Peak of every phase. A colocated server that has released its memory still has its process and graphs."""
        other = PROCESS + self.graphs if self.server else 0
        return {
            "train": self.resident + max(self.activations + self.head + self.projected, self.step) + other,
            "sync": self.resident - self.offloaded + self.export + self.server + other,
            "generate": self.resident - self.offloaded + self.server + self.cache + other,
        }

    @property
    def peak(self) -> int:
        """Peak of the costliest phase."""
        return max(self.phases.values())


@dataclass(frozen=True)
class ServerMemory:
    """Bytes on one GPU of a server. pool: limit for weights and KV cache. token: keys and values of a token or, with latent
    attention, its latents, which SGLang replicates on every GPU. (The embedded engine, transformers, caches keys and values.)

    parameters: elements, not bytes. experts: the part of `weights` that is in experts, without shared ones. graphs: see
    `graph_bytes`. caches: number of KV caches that hold different requests, the data-parallel size of attention.
    """

    parameters: int
    weights: int
    experts: int
    pool: int
    token: int
    graphs: int
    caches: int = 1

    @property
    def tokens_of_a_cache(self) -> int:
        """Tokens that one of the server's KV caches holds; 0 if its weights do not fit."""
        return max(0, self.pool - self.weights) // self.token

    @property
    def peak(self) -> int:
        """Bytes that the server needs of its GPU, with its process."""
        return self.pool + self.graphs + PROCESS

    @property
    def cache_tokens(self) -> int:
        """Tokens that all of the server's KV caches hold."""
        return self.caches * self.tokens_of_a_cache


def usable(gpu_memory_gib: float) -> int:
    """Bytes of a GPU that a plan may use."""
    return int(gpu_memory_gib * GIB * (1 - SLACK))


def element_bytes(config: Config) -> int:
    """Bytes of an element of the model's dtype."""
    return 4 if config.model.dtype == "float32" else 2


def fp8_bytes(matrices: int) -> int:
    """Bytes of FP8 matrices on servers, from their elements: one byte each, and an fp32 scale per block."""
    return matrices + 4 * matrices // FP8_BLOCK**2


def server_memory(arch: Architecture, config: Config, cluster: Cluster, gpu_memory_gib: float) -> ServerMemory:
    """Memory of the server GPU with the most parameters. The embedded engine has no pool (0 here), see `RankMemory.cache`."""
    layout = server_layout(config, cluster)
    held = max(parameters_by_rank(arch, layout), key=lambda rank: rank.total)
    element = element_bytes(config)
    weights, experts = held.total * element, held.expert * element
    if config.rollout.backend == "sglang" and config.sglang.fp8:
        weights = (held.total - held.matrices) * element + fp8_bytes(held.matrices)
        experts = fp8_bytes(held.expert)
    fraction = SERVER_FRACTION if config.sglang.mem_fraction is None else config.sglang.mem_fraction
    is_embedded = config.rollout.backend == "embedded"
    token = arch.layers * arch.kv_heads_of_a_rank(layout.attention_tp) * (arch.head_dim + arch.value_dim) * element
    if is_embedded:
        return ServerMemory(held.total, weights, experts, 0, token, 0)
    if arch.latent is not None:
        weights += _absorbed(arch, layout.attention_tp) * element
        token = arch.layers * arch.latent.cached_dim * element
    graphs = graph_bytes(config.sglang, gpu_memory_gib, latent=arch.latent is not None)
    # SGLang leaves room for these when it chooses the fraction. The fraction assumed here is that of other servers.
    left_out = gathered_bytes(config.sglang, gpu_memory_gib) if config.sglang.mem_fraction is None else 0
    pool = max(0, int(fraction * gpu_memory_gib * GIB) - left_out)
    return ServerMemory(held.total, weights, experts, pool, token, graphs, layout.attention_dp)


def _absorbed(arch: Architecture, tp: int) -> int:
    """Elements of a server's copies of the up-projections of keys and values, whose heads are split over `tp` ranks. The server
    multiplies queries and the output of attention by them, so that attention works on the cached latents. SGLang makes the
    copies in the model's dtype, even from FP8 (`post_load_weights` of models/deepseek_common/deepseek_weight_loader.py)."""
    assert arch.latent is not None
    return arch.layers * (arch.heads // tp) * arch.latent.up_dim * arch.latent.kv_rank


def rank_memory(
    arch: Architecture, config: Config, cluster: Cluster, work: Workload, server: ServerMemory, adapters: Sequence[RankAdapters]
) -> list[RankMemory]:
    """Memory of every rank. adapters: one entry per rank. Raises ValueError if the layout does not fit the architecture."""
    layout = training_layout(config, cluster.ranks)
    split = _split(config, layout, work)
    head = head_bytes(arch, split, config.train.head_chunk_rows or CHUNK_ROWS, own_sum=config.train.grads_dtype == "bfloat16")
    element = element_bytes(config)
    is_embedded = config.rollout.backend == "embedded"
    batch = min(config.rollout.batch_samples, work.samples) * work.longest
    export = 2 * largest_weight(arch) * element + 2 * config.sglang.bucket_mib * 2**20
    in_bf16 = (0, arch.layers - 1) if config.fp8.first_last_layers_bf16 else ()
    stages, offloaded = _activations_of_stages(arch, layout, config, split, work), config.lora.offload_base
    found = []
    for rank, held in enumerate(parameters_by_rank(arch, layout, unquantised=in_bf16)):
        stage, own = rank // layout.stage_ranks, adapters[rank]
        trained = own.trained if config.lora.rank else held
        gradients = trained.total * (2 if config.train.grads_dtype == "bfloat16" else 4)
        optimizer = _optimizer_bytes(trained, config, layout)
        found.append(
            RankMemory(
                rank=rank,
                stage=stage,
                elements=held.total,
                adapters=own.trained.total,
                parameters=_parameter_bytes(held, config, element) + 4 * own.trained.total,
                gradients=gradients,
                optimizer=optimizer,
                step=_step_bytes(trained, own, config, layout),
                offloaded=gradients + optimizer + _fp8_copies(held, config) if config.train.offload_for_rollout else 0,
                reference=_reference_bytes(held, config, element),
                base=0 if offloaded else element * own.base,
                base_on_host=element * own.pinned if offloaded else 0,
                activations=stages[stage],
                head=head if stage == layout.pp - 1 else 0,
                projected=own.gradient_bytes(element),
                export=export + (2 * held.matrices if config.fp8.param else 0),
                server=server.pool if cluster.shares_gpu(rank) else 0,
                graphs=server.graphs if cluster.shares_gpu(rank) else 0,
                embedded=server.weights if is_embedded else 0,
                cache=batch * server.token if is_embedded else 0,
                nccl=nccl_bytes(
                    rank,
                    layout,
                    cp=config.parallel.cp,
                    cp_comm=config.parallel.cp_comm,
                    experts=arch.experts is not None,
                    node=cluster.ranks_per_node,
                    sync=None if is_embedded else sync_of(config.sglang),
                ),
            )
        )
    return found


def _activations_of_stages(
    arch: Architecture, layout: TrainingLayout, config: Config, split: Split, work: Workload
) -> list[int]:
    return [
        stage_activations(
            arch,
            layout,
            stage,
            split,
            work.most_microbatches,
            Recomputation.of(config.train),
            ends_in_bf16=config.fp8.first_last_layers_bf16,
            outputs_freed=config.train.megatron.get("deallocate_pipeline_outputs") is True,
        )
        for stage in range(layout.pp)
    ]


def _split(config: Config, layout: TrainingLayout, work: Workload) -> Split:
    return Split(
        tokens=-(-work.microbatch_tokens // config.parallel.cp),
        tp=layout.tp,
        sequence_parallel=config.parallel.sequence_parallel,
        element=element_bytes(config),
        fp8=config.fp8.recipe,
        router_fp32=config.train.moe_router_fp32,
    )


def _parameter_bytes(held: RankParameters, config: Config, element: int) -> int:
    """Bytes of parameters. Training in FP8 adds two FP8 copies of every matrix, row-wise and column-wise; with `fp8.param` it
    keeps only these copies."""
    if config.fp8.recipe == "none":
        return held.total * element
    other = held.total - held.matrices
    return other * element + held.matrices * (2 if config.fp8.param else element + 2)


def _has_reference(config: Config) -> bool:
    """Whether there is a second model. With adapters, the model itself with its original values is the reference."""
    return config.objective.kl_coef > 0 and not config.lora.rank


def _reference_bytes(held: RankParameters, config: Config, element: int) -> int:
    """Bytes of the reference model, a second set of weights without gradients. A forward pass in FP8 only needs the row-wise
    copies of matrices."""
    if not _has_reference(config):
        return 0
    copies = held.matrices if config.fp8.recipe != "none" and not config.fp8.param else 0
    return held.total * element + copies


def _fp8_copies(held: RankParameters, config: Config) -> int:
    """Bytes of the FP8 copies that a rollout does not need: of the matrices of the model, and of the reference."""
    if config.fp8.recipe == "none" or config.fp8.param:
        return 0
    return held.matrices * (3 if _has_reference(config) else 2)


def _optimizer_bytes(trained: RankParameters, config: Config, layout: TrainingLayout) -> int:
    """Bytes of Adam's two fp32 moments and, for bfloat16 weights or with `train.offload_for_rollout`, its fp32 copy of the
    weights. Adapters are fp32."""
    is_plain = (config.model.dtype == "float32" or config.lora.rank > 0) and not config.train.offload_for_rollout
    return (8 if is_plain else 12) * _updated(trained, config, layout)


def _step_bytes(trained: RankParameters, adapters: RankAdapters, config: Config, layout: TrainingLayout) -> int:
    """Temporary bytes in an optimizer step: Megatron's fp32 copies of bfloat16 gradients, or merging the largest weight."""
    copies = 4 * _updated(trained, config, layout) if config.train.grads_dtype == "bfloat16" else 0
    return max(copies, adapters.merge_bytes(element_bytes(config), offloaded=config.lora.offload_base))


def _updated(trained: RankParameters, config: Config, layout: TrainingLayout) -> int:
    """Elements that a rank updates on its GPU. The distributed optimizer shards them over data-parallel ranks, and those of
    experts over the experts' own group."""
    if config.train.optimizer_offload:
        return 0
    if not config.train.distributed_optimizer:
        return trained.total
    expert_replicas = layout.stage_ranks // (layout.expert_tp * layout.ep)
    return -(-trained.dense // layout.dp) - (-trained.expert // expert_replicas)
