"""The policy as a megatron-core GPTModel that stops at hidden states, and its weights in and out of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from etr_megatron import platform
from etr_megatron.policy.model_config import block_spec, rotary_frequencies, uses_transformer_engine
from etr_megatron.policy.parallel import Layout
from etr_megatron.vocab_parallel import VocabShard
from etr_megatron.weights import (
    Architecture,
    SafetensorsDir,
    Weight,
    join_shards,
    megatron_shard,
    padded_vocab_size,
    read_shard,
    weights_of,
)


class PolicyModel(GPTModel):
    """A pipeline stage of the policy. `forward` of the last stage returns hidden states [T (/ TP), 1, H], not logits.

    The LM head belongs to the loss: it is applied to the loss rows alone, a chunk at a time (`vocab_parallel`).
    """

    def __init__(self, arch: Architecture, config: TransformerConfig, layout: Layout) -> None:
        padded = padded_vocab_size(arch.vocab_size, layout.tp)
        super().__init__(
            config,
            block_spec(config),
            vocab_size=padded,
            max_sequence_length=arch.max_positions,
            pre_process=layout.stage == 0,
            post_process=layout.is_last_stage,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
        )
        self.rotary_pos_emb.inv_freq = rotary_frequencies(arch).to(platform.device())
        self.arch, self.layout = arch, layout
        self.vocab_shard = VocabShard(
            padded // layout.tp,
            arch.vocab_size,
            mpu.get_tensor_model_parallel_group() if layout.tp > 1 else None,
        )

    def _postprocess(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """[Vp / TP, H] shard of the LM head, the embedding's where they are tied; last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build_model(arch: Architecture, config: TransformerConfig, layout: Layout) -> PolicyModel:
    """This rank's stage on its device, weights not loaded yet."""
    return PolicyModel(arch, config, layout).to(platform.device())


def _stage_of(weight: Weight, arch: Architecture, pp: int) -> int:
    """Pipeline stage that owns a weight; layers are spread evenly."""
    if weight.layer is not None:
        return weight.layer // (arch.layers // pp)
    return 0 if weight.megatron.startswith("embedding.") else pp - 1


def _parameter_names(model: PolicyModel) -> dict[str, torch.nn.Parameter]:
    """Parameters of this stage by their name in the weight map: layers counted over all stages, local-spec names."""
    first_layer = model.layout.stage * (model.arch.layers // model.layout.pp)
    parameters = {}
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, number, rest = name.split(".", 3)
            name = f"decoder.layers.{int(number) + first_layer}.{rest}"
        parameters[name] = parameter
    return parameters


def own_parameters(model: PolicyModel) -> dict[str, tuple[Weight, torch.nn.Parameter]]:
    """Megatron name -> (weight, this rank's parameter). The copy of a tied embedding on the last stage counts as the head."""
    named = _parameter_names(model)
    pairs = {}
    for weight in weights_of(model.arch):
        name = weight.te if uses_transformer_engine() else weight.megatron
        if name in named:
            pairs[name] = (weight, named.pop(name))
    if named.keys() - {"output_layer.weight"}:
        raise RuntimeError(f"parameters without a row in the weight map: {sorted(named)}")
    if "output_layer.weight" in named:
        embedding = next(weights_of(model.arch))
        pairs["output_layer.weight"] = (embedding, named["output_layer.weight"])
    return pairs


@torch.no_grad()
def load_hf_weights(model: PolicyModel, checkpoint: SafetensorsDir) -> None:
    """Copy this rank's shards of a HuggingFace checkpoint into the model's parameters (in place; the model owns them).

    Only the byte ranges that the rank needs are read. Raises ValueError when a parameter's shape is not the map's.
    """
    layout, arch = model.layout, model.arch
    for name, (weight, parameter) in own_parameters(model).items():
        shard = megatron_shard(weight, arch, layout.tp, layout.tp_rank)
        if tuple(parameter.shape) != shard.shape:
            raise ValueError(f"{name} is {tuple(parameter.shape)}, the map says {shard.shape}")
        parameter.copy_(read_shard(weight, shard, checkpoint.read))


@torch.no_grad()
def export_hf_weights(model: PolicyModel) -> Iterator[tuple[str, Tensor]]:
    """Full HF tensors by name, on every rank and in the same order, from shards spread over TP and PP.

    A collective: every rank of the model-parallel group must iterate to the end. Tensors are fresh copies on the rank's device,
    owned by the caller; one weight exists in full at a time.
    """
    layout, arch = model.layout, model.arch
    own = {weight.megatron: parameter for weight, parameter in own_parameters(model).values()}
    tp_group = mpu.get_tensor_model_parallel_group()
    pp_group = mpu.get_pipeline_model_parallel_group()
    dtype, device = model.config.params_dtype, platform.device()
    for weight in weights_of(arch):
        stage = _stage_of(weight, arch, layout.pp)
        if layout.stage == stage:
            shard = own[weight.megatron].detach().contiguous()
            shards = [torch.empty_like(shard) for _ in range(layout.tp)]
            dist.all_gather(shards, shard, group=tp_group)
            parts = [(megatron_shard(weight, arch, layout.tp, rank), part) for rank, part in enumerate(shards)]
            full = join_shards(weight, parts)
        else:
            full = {n: torch.empty(s, dtype=dtype, device=device) for n, s in zip(weight.hf, weight.shapes, strict=True)}
        if layout.pp > 1:
            for tensor in full.values():
                dist.broadcast(tensor, src=dist.get_global_rank(pp_group, stage), group=pp_group)
        yield from full.items()
