"""The policy as a megatron-core GPTModel that stops at hidden states, and loading and export of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from etr_megatron import platform
from etr_megatron.policy.model_config import block_spec, rotary_frequencies, uses_transformer_engine
from etr_megatron.policy.parallel import Layout
from etr_megatron.policy.replicas import read_once
from etr_megatron.vocab_parallel import VocabShard
from etr_megatron.weights import (
    Architecture,
    SafetensorsDir,
    Weight,
    join_shards,
    megatron_shard,
    padded_vocab_size,
    read_shard,
    shards_of,
    weights_of,
)
from etr_megatron.weights.boxes import ByName
from etr_megatron.weights.listing import listed
from etr_megatron.weights.map import HEAD

ADAPTERS = "adapters"
"""Name of a chunk's submodule with its low-rank adapters, which do not count as weights of the model."""

_BUCKET_BYTES = 64 * 2**20
"""Bytes of weights per broadcast: small weights, of which experts have many, are sent together."""


class PolicyModel(GPTModel):
    """One of the `layout.vpp` model chunks of a pipeline stage.

    `forward` of the last stage's last chunk returns hidden states [T (/ TP), 1, H], not logits.

    The LM head belongs to the loss, which applies it to the loss rows only, in chunks (`vocab_parallel`).
    """

    def __init__(self, arch: Architecture, config: TransformerConfig, layout: Layout, chunk: int = 0) -> None:
        padded = padded_vocab_size(arch.vocab_size, layout.tp)
        vp_stage = chunk if layout.vpp > 1 else None
        super().__init__(
            config,
            block_spec(config, vp_stage),  # type: ignore[arg-type]  # Megatron takes a block's, too
            vocab_size=padded,
            max_sequence_length=arch.max_positions,
            pre_process=layout.stage == 0 and chunk == 0,
            post_process=layout.is_last_stage and chunk == layout.vpp - 1,
            vp_stage=vp_stage,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_percent=arch.rotary_fraction,
        )
        frequencies = rotary_frequencies(arch).to(platform.device())
        for module in self.modules():  # latent attention has one in every layer
            if isinstance(module, RotaryEmbedding):
                module.inv_freq = frequencies
        self.arch, self.layout = arch, layout
        self.vocab_shard = VocabShard(
            padded // layout.tp,
            arch.vocab_size,
            mpu.get_tensor_model_parallel_group() if layout.tp > 1 else None,
        )

    def _postprocess(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """[Vp / TP, H] shard of the LM head, or of the embedding if they are tied; last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def forget_routing(model: torch.nn.Module) -> None:
    """Drop the tensors that MoE token dispatchers keep from their last forward pass (in place; call it between passes).

    These tensors keep their autograd graph alive. The graph holds activations until the next forward pass. Through the hooks on
    its leaves it also leaks the whole model, with process groups and threads, in a cycle that Python's collector cannot see.
    """
    for module in model.modules():
        dispatcher = getattr(module, "token_dispatcher", None)
        for keeper in (dispatcher, getattr(dispatcher, "_comm_manager", None)):  # the latter: of the flex dispatcher
            for name, value in vars(keeper).items() if keeper is not None else ():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    setattr(keeper, name, None)


def build_chunks(arch: Architecture, config: TransformerConfig, layout: Layout) -> list[PolicyModel]:
    """This rank's model chunks on its device, without weights loaded."""
    chunks = [PolicyModel(arch, config, layout, chunk).to(platform.device()) for chunk in range(layout.vpp)]
    for weight, parameter in own_parameters(chunks).values():
        # Megatron sets it only for EP > 1. Setting it always reduces experts over their own data-parallel group, which differs
        # from the dense one if ETP is not TP, and gives them a separate optimizer in every layout, so checkpoints look alike.
        if weight.expert is not None:
            parameter.allreduce = False  # type: ignore[attr-defined]  # Megatron's mark
        # Transformer Engine marks every matrix as split over TP. But latent attention's down-projections are replicated, and
        # with the mark Megatron would count them in the gradient norm once per tensor-parallel rank.
        if weight.split == "replicated":
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]  # Megatron's mark
    return chunks


_EXPERT = re.compile(r"(.*\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)(.*)")
"""Matches a rank-local expert index: inside a local-spec name, at the end of a Transformer Engine name."""


def global_name(name: str, first_layer: int, first_expert: int) -> str:
    """A parameter's name with layer and expert indices of the whole model instead of this rank's."""
    if name.startswith("decoder.layers."):
        _, _, number, rest = name.split(".", 3)
        name = f"decoder.layers.{int(number) + first_layer}.{rest}"
    expert = _EXPERT.fullmatch(name)
    return f"{expert[1]}{int(expert[2]) + first_expert}{expert[3]}" if expert else name


def weights_in(chunk: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of a chunk that a checkpoint of the model must have, by their name in the chunk: the parameters without
    adapters, and the routers' biases, which Megatron keeps as buffers."""
    parameters = {name: tensor for name, tensor in chunk.named_parameters() if not name.startswith(ADAPTERS + ".")}
    biases = {name: buffer for name, buffer in chunk.named_buffers() if name.endswith(".router.expert_bias")}
    return {**parameters, **biases}


def _weights_by_global_name(chunk: PolicyModel) -> dict[str, Tensor]:
    """`weights_in` a chunk by their name in the weight map; layer numbers come from Megatron."""
    layout, arch = chunk.layout, chunk.arch
    first: Any = chunk.decoder.layers[0]
    first_layer = first.layer_number - 1
    first_expert = layout.ep_rank * (arch.experts.count // layout.ep) if arch.experts else 0
    return {global_name(name, first_layer, first_expert): tensor for name, tensor in weights_in(chunk).items()}


def own_parameters(chunks: Sequence[PolicyModel]) -> dict[str, tuple[Weight, Tensor]]:
    """Megatron name -> (weight, this rank's parameter or buffer). The last stage's copy of a tied embedding is the head.

    Raises RuntimeError naming parameters missing from the map, and rows of the map missing from this rank.
    """
    named = {name: tensor for chunk in chunks for name, tensor in _weights_by_global_name(chunk).items()}
    layout, arch = chunks[0].layout, chunks[0].arch
    pairs, missing = {}, []
    for weight, _ in shards_of(layout.training, arch, layout.rank):
        name = weight.te if uses_transformer_engine() else weight.megatron
        if weight.split == "vocab" and name not in named:
            name = HEAD
        if name in named:
            pairs[name] = (weight, named.pop(name))
        else:
            missing.append(name)
    kinds = ("parameters without a row in the weight map", sorted(named)), ("rows without a parameter on this rank", missing)
    problems = [f"{what}: {listed(names)}" for what, names in kinds if names]
    if problems:
        raise RuntimeError("; ".join(problems))
    return pairs


@torch.no_grad()
def load_hf_weights(models: Sequence[Sequence[PolicyModel]], checkpoint: SafetensorsDir | ByName) -> None:
    """Copy this rank's shards of a HuggingFace checkpoint into the parameters of every model (in place; each model is its list
    of chunks). A collective.

    Only the byte ranges that a rank needs are read, by one of the ranks that need them. Raises ValueError naming parameters
    whose shapes differ from the map's.
    """
    layout, arch = models[0][0].layout, models[0][0].arch
    own, *others = (own_parameters(chunks) for chunks in models)
    shards = {name: megatron_shard(weight, arch, *layout.cut(weight)) for name, (weight, _) in own.items()}
    differing = [
        f"{name} has shape {tuple(parameter.shape)}, but {shards[name].shape} in the weight map"
        for name, (_, parameter) in own.items()
        if tuple(parameter.shape) != shards[name].shape
    ]
    if differing:
        raise ValueError(listed(differing, "; "))
    for name, values in read_once(own, lambda name: read_shard(own[name][0], shards[name], checkpoint.read)):
        for parameters in (own, *others):
            parameters[name][1].copy_(values)


@torch.no_grad()
def export_hf_weights(chunks: Sequence[PolicyModel]) -> Iterator[tuple[str, Tensor]]:
    """Gather full HF tensors by name from the TP, EP and PP shards, on every rank in the same order.

    A collective: every rank of the model-parallel group must iterate to the end. Tensors are views of fresh copies on this
    rank's device, owned by the caller; at most `_BUCKET_BYTES`, or one larger weight, exists in full at a time.
    """
    layout, arch = chunks[0].layout, chunks[0].arch
    own = {weight.megatron: parameter for weight, parameter in own_parameters(chunks).values()}
    pp_group, ep_group = mpu.get_pipeline_model_parallel_group(), mpu.get_expert_model_parallel_group()
    dtype, device = chunks[0].config.params_dtype, platform.device()
    for (stage, owner, _), weights in _buckets(arch, layout, dtype):
        shapes = [(name, shape) for weight in weights for name, shape in zip(weight.hf, weight.shapes, strict=True)]
        total, kept = sum(torch.Size(shape).numel() for _, shape in shapes), weights[0].type_in(dtype)
        flat = torch.empty(total, dtype=kept, device=device)
        parts = flat.split([torch.Size(shape).numel() for _, shape in shapes])
        full = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        for weight in weights:
            parameter = own.get(weight.megatron) if layout.stage == stage else None
            if parameter is not None:
                for name, tensor in _gather(weight, arch, parameter, layout.cut(weight)[0]).items():
                    full[name].copy_(tensor)
        if owner is not None and layout.ep > 1 and layout.stage == stage:
            dist.broadcast(flat, src=dist.get_global_rank(ep_group, owner), group=ep_group)
        if layout.pp > 1:
            dist.broadcast(flat, src=dist.get_global_rank(pp_group, stage), group=pp_group)
        yield from full.items()


def _buckets(
    arch: Architecture, layout: Layout, dtype: torch.dtype
) -> Iterator[tuple[tuple[int, int | None, bool], list[Weight]]]:
    """Group consecutive weights with the same source and dtype into buckets of at most `_BUCKET_BYTES` (or one larger weight).
    Yields ((stage, expert-parallel rank that holds them or None, whether they are fp32 in any model), weights)."""

    def holder(weight: Weight) -> tuple[int, int | None, bool]:
        owner = None
        if weight.expert is not None and arch.experts is not None:
            owner = weight.expert // (arch.experts.count // layout.ep)
        return layout.training.stages_of(weight, arch)[0], owner, weight.fp32

    for key, run in groupby(weights_of(arch), holder):
        bucket: list[Weight] = []
        space = _BUCKET_BYTES
        for weight in run:
            size = weight.type_in(dtype).itemsize * sum(torch.Size(shape).numel() for shape in weight.shapes)
            if bucket and size > space:
                yield key, bucket
                bucket, space = [], _BUCKET_BYTES
            bucket.append(weight)
            space -= size
        yield key, bucket


def plain_values(parameter: Tensor) -> Tensor:
    """A parameter's values without gradient, dequantized if it is held in FP8."""
    values = parameter.detach()
    return dequantize_fp8_tensor(values) if is_float8tensor(values) else values


def _gather(weight: Weight, arch: Architecture, parameter: Tensor, ranks: int) -> dict[str, Tensor]:
    """The full HF tensors of a weight sharded over (expert-)tensor-parallel ranks. A collective among them."""
    dense = weight.expert is None
    group = mpu.get_tensor_model_parallel_group() if dense else mpu.get_expert_tensor_parallel_group()
    shard = plain_values(parameter).contiguous()
    shards = [torch.empty_like(shard) for _ in range(ranks)]
    dist.all_gather(shards, shard, group=group)
    return join_shards(weight, [(megatron_shard(weight, arch, ranks, rank), part) for rank, part in enumerate(shards)])
