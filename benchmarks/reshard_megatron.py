"""Two models in one set of processes, for megatron-core's resharding: GPTModels or, with experts, a minimal stand-in."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from etr_megatron import platform

platform.prepare_megatron()

# Importing it requires CUDA streams. It is only needed for the transport of that name.
_nvshmem = types.ModuleType("megatron.core.resharding.copy_services.nvshmem_copy_service")
_nvshmem.NVSHMEMCopyService = None
sys.modules[_nvshmem.__name__] = _nvshmem

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402

from etr_megatron.policy.model import global_name  # noqa: E402
from etr_megatron.policy.model_config import block_spec, transformer_config  # noqa: E402
from etr_megatron.policy.parallel import Layout, init_layout  # noqa: E402
from etr_megatron.weights import Architecture, TrainingLayout, padded_vocab_size, weights_of  # noqa: E402


def layout_of(placement: TrainingLayout, rank: int) -> Layout:
    """This rank's place in a layout, which may differ from Megatron's global groups."""
    local, stage = rank % placement.stage_ranks, rank // placement.stage_ranks
    return Layout(
        rank=rank,
        world=placement.world,
        tp=placement.tp,
        tp_rank=local % placement.tp,
        pp=placement.pp,
        stage=stage,
        dp=placement.dp,
        dp_rank=local // placement.tp,
        ep=placement.ep,
        ep_rank=local // placement.expert_tp % placement.ep,
        etp=placement.expert_tp,
        etp_rank=local % placement.expert_tp,
    )


def global_groups(placement: TrainingLayout) -> None:
    """Set Megatron's global groups to those of the source."""
    init_layout(placement.tp, placement.pp, seed=1, ep=placement.ep, etp=placement.expert_tp)


def groups_of(placement: TrainingLayout) -> ProcessGroupCollection:
    """Groups of a layout, separate from Megatron's global ones; experts are spread over all data-parallel ranks or none."""
    ranks = torch.arange(placement.world).view(placement.pp, placement.dp, placement.tp)

    def cut(*dims: int) -> dist.ProcessGroup:
        """This rank's group along these dimensions."""
        kept = [dim for dim in range(3) if dim not in dims]
        rows = ranks.permute(*kept, *dims).reshape(-1, prod(ranks.shape[dim] for dim in dims))
        return dist.new_subgroups_by_enumeration(rows.tolist())[0]

    groups = ProcessGroupCollection()
    groups.pp, groups.dp, groups.tp, groups.mp = cut(0), cut(1), cut(2), cut(0, 2)
    groups.cp, groups.ep = cut(), groups.dp if placement.ep > 1 else cut()
    groups.tp_cp = groups.expt_tp = groups.tp_ep = groups.tp
    groups.dp_cp = groups.expt_dp = groups.dp
    groups.tp_ep_pp = groups.mp
    groups.embd = groups.pos_embd = None
    return groups


def build(arch: Architecture, layout: Layout, dtype: torch.dtype, groups: ProcessGroupCollection | None) -> GPTModel:
    """One pipeline stage of a dense model. groups: used instead of Megatron's global ones."""
    config = transformer_config(arch, layout, sequence_parallel=False, dtype=dtype)
    spec = block_spec(config)
    if groups is not None:
        layers = [spec.layer_specs[0]] * (arch.layers // layout.pp)
        spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=spec.layer_norm)
    return GPTModel(
        config,
        spec,
        vocab_size=padded_vocab_size(arch.vocab_size, layout.tp),
        max_sequence_length=arch.max_positions,
        pre_process=layout.stage == 0,
        post_process=layout.is_last_stage,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        **({} if groups is None else {"pg_collection": groups}),
    ).to(dtype)


def parameters(model: Any, arch: Architecture, layout: Layout) -> dict[str, Tensor]:
    """Parameters by their names in the weight map."""
    first = layout.stage * (arch.layers // layout.pp)
    return {global_name(name, first, 0): parameter.data for name, parameter in model.named_parameters()}


class BareModel(torch.nn.Module):
    """Shards of one pipeline stage as parameters of a model, with all attributes that resharding reads.

    Resharding recognises experts only by Transformer Engine's names (`weight3`): from a model built on CPU it would send local
    expert 0 of any rank as expert 0. Megatron's Transformer Engine experts lack two attributes: the dimension along which they
    are split, and that gate and up are split separately. These parameters have both.
    """

    def __init__(self, placement: TrainingLayout, arch: Architecture, shards: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_moe_experts=arch.experts.count)
        self.pg_collection = groups_of(placement)
        self._named: dict[str, torch.nn.Parameter] = {}
        mine = [weight for weight in weights_of(arch) if weight.megatron in shards]
        first = min(weight.expert for weight in mine if weight.expert is not None)
        for weight in mine:
            name, parameter = weight.megatron, torch.nn.Parameter(shards[weight.megatron], requires_grad=False)
            if weight.expert is not None:
                name = weight.te.removesuffix(str(weight.expert)) + str(weight.expert - first)
            parameter.tensor_model_parallel = weight.split != "replicated"
            parameter.partition_dim, parameter.partition_stride = int(weight.split == "row"), 1 + (weight.split == "gate_up")
            parameter.allreduce = weight.expert is None or placement.ep == 1
            self._named[name] = parameter

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self._named.items()
