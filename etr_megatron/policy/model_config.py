"""Build Megatron's TransformerConfig, layer spec and rotary frequencies from a HuggingFace architecture and a layout."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from etr_megatron import platform
from etr_megatron.config import Config, Fp8Config
from etr_megatron.policy.fp8 import fp8_options
from etr_megatron.policy.local_layers import LocalRMSNorm, PackedAttention
from etr_megatron.policy.megatron_fields import complaints_about, fields_of
from etr_megatron.policy.parallel import Layout
from etr_megatron.weights import Architecture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def uses_transformer_engine() -> bool:
    """Whether TE layers are used (on CUDA with the package installed) instead of megatron-core's local ones."""
    return platform.uses_cuda() and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(
    arch: Architecture,
    layout: Layout,
    *,
    sequence_parallel: bool,
    dtype: torch.dtype,
    recompute: str = "none",
    cp_comm: str = "p2p",
    aux_loss_coef: float = 0.0,
    router_fp32: bool = False,
    fp8: Fp8Config | None = None,
    fields: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """Megatron's config for the policy. fields: `train.megatron`.

    `calculate_per_token_loss` is on, so that Megatron does not divide the loss: our own denominator already does.
    `variable_seq_lengths` is on for pipelines, because packed microbatches differ in length. Raises UserError if Megatron
    refuses the fields.
    """
    fused = uses_transformer_engine()
    options = dict[str, Any](
        num_layers=arch.layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.intermediate_size,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        **_attention_options(arch),
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        cp_comm_type=cp_comm,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are loaded from a checkpoint right after, so initialization may differ between layouts.
        use_cpu_initialization=not platform.uses_cuda(),
        calculate_per_token_loss=True,
        # megatron-core requires it with variable_seq_lengths, even for dense models
        moe_token_dispatcher_type="alltoall",
        **_fusions(fused, latent=arch.latent is not None),
        **_pipeline_options(layout, dtype),
        **_expert_options(arch, grouped=fused, aux_loss_coef=aux_loss_coef, router_fp32=router_fp32),
        **_recompute_options(recompute),
        **fp8_options(fp8 or Fp8Config(), experts=arch.experts is not None),
    )
    with complaints_about(fields or {}):
        return (MLATransformerConfig if arch.latent else TransformerConfig)(**{**options, **fields_of("model", fields or {})})


def configured_transformer(arch: Architecture, layout: Layout, config: Config) -> TransformerConfig:
    """`transformer_config` of a resolved config."""
    return transformer_config(
        arch,
        layout,
        sequence_parallel=config.parallel.sequence_parallel,
        dtype=DTYPES[config.model.dtype],
        recompute=config.train.recompute,
        cp_comm=config.parallel.cp_comm,
        aux_loss_coef=config.train.moe_aux_loss_coef,
        router_fp32=config.train.moe_router_fp32,
        fp8=config.fp8,
        fields=config.train.megatron,
    )


def _attention_options(arch: Architecture) -> dict[str, Any]:
    """Norms and the attention scale, and the sizes of latent attention.

    Megatron's rotary embedding is configured without scaling, because it gets the frequencies of `rotary_frequencies`. For
    YaRN, Megatron computes only the attention scale.
    """
    latent = arch.latent
    if latent is None:
        return dict(qk_layernorm=arch.qk_norm, softmax_scale=softmax_scale(arch))
    return dict(
        qk_layernorm=True,
        q_lora_rank=latent.q_rank,
        kv_lora_rank=latent.kv_rank,
        qk_head_dim=latent.nope_dim,
        qk_pos_emb_head_dim=latent.rope_dim,
        v_head_dim=latent.value_dim,
        rope_type="rope",
        rotary_scaling_factor=arch.rope.get("factor", 1.0),
        mscale_all_dim=arch.rope.get("mscale_all_dim", 0.0),
    )


def _pipeline_options(layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    """Pipeline stages and chunks. With several chunks and two stages, each stage is both predecessor and successor of the
    other, and batched p2p would silently mix up their messages."""
    return dict(
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers if layout.pp > 1 else None,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers if layout.pp > 1 else None,
        pipeline_dtype=dtype,
        variable_seq_lengths=layout.pp > 1,
        batch_p2p_comm=layout.vpp == 1,
        batch_p2p_sync=False,  # the host would wait after every message, which only versions of torch before 2 need
        overlap_p2p_comm=layout.vpp > 1,
    )


def _recompute_options(recompute: str) -> dict[str, Any]:
    """`train.recompute` as Megatron's fields."""
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
        "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    }
    return options[recompute]


def _fusions(fused: bool, *, latent: bool) -> dict[str, Any]:
    """Which of Megatron's fused kernels are used. fused: whether Transformer Engine's layers are used. latent: whether the
    model has latent attention, for which Megatron's fused rotary embedding computes frequencies of its own."""
    return dict(
        persist_layer_norm=fused,
        bias_dropout_fusion=fused,
        bias_activation_fusion=fused,
        masked_softmax_fusion=False,
        apply_rope_fusion=fused and not latent,
        gradient_accumulation_fusion=fused,
    )


def _expert_options(arch: Architecture, *, grouped: bool, aux_loss_coef: float, router_fp32: bool) -> dict[str, Any]:
    """MoE settings, empty for a dense model. grouped: use TE's grouped GEMM for all experts of a rank.

    The router matches transformers: GEMM in the model's dtype (fp32 with router_fp32, and always for sigmoids), scores in fp32.
    A softmax over only the chosen experts' logits equals the full softmax divided by the sum over the chosen ones
    (`norm_topk_prob`). Sigmoids of the chosen experts are always divided by their sum.
    """
    experts = arch.experts
    if experts is None:
        return {}
    return dict(
        num_moe_experts=experts.count,
        moe_ffn_hidden_size=experts.intermediate_size,
        # Given a list, Megatron puts layer numbers into checkpoint keys, as does the weight map if there are dense layers.
        moe_layer_freq=[int(arch.has_experts(layer)) for layer in range(arch.layers)] if experts.dense_layers else 1,
        moe_router_topk=experts.per_token,
        moe_router_pre_softmax=not experts.normalized,
        moe_router_load_balancing_type="aux_loss" if aux_loss_coef else "none",
        moe_aux_loss_coeff=aux_loss_coef,
        moe_router_score_function=experts.score_function,
        moe_router_dtype="fp32" if router_fp32 or experts.score_function == "sigmoid" else None,
        moe_router_enable_expert_bias=experts.expert_bias,
        moe_router_bias_update_rate=0.0,  # keep the bias from pretraining, as servers and checkpoints do
        moe_router_num_groups=experts.groups if experts.groups > 1 else None,
        moe_router_group_topk=experts.groups_per_token if experts.groups > 1 else None,
        moe_router_topk_scaling_factor=experts.scaling_factor if experts.scaling_factor != 1.0 else None,
        moe_shared_expert_intermediate_size=experts.shared_size or None,
        moe_grouped_gemm=grouped,
    )


def block_spec(config: TransformerConfig, chunk: int | None = None) -> TransformerBlockSubmodules:
    """Layer spec of a chunk of this rank's pipeline stage: TE's if it is used, else the local one with packed attention and our
    RMSNorm."""
    if uses_transformer_engine():
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, normalization="RMSNorm", vp_stage=chunk)
    first, count = get_transformer_layer_offset(config, chunk), get_num_layers_to_build(config, chunk)
    layers = [_local_layer(config, experts=_has_experts(config, number)) for number in range(first, first + count)]
    norm: Any = LocalRMSNorm  # Megatron takes a class, too
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _has_experts(config: TransformerConfig, layer: int) -> bool:
    pattern = config.moe_layer_freq
    return config.num_moe_experts is not None and (bool(pattern[layer]) if isinstance(pattern, list) else True)


def _local_layer(config: TransformerConfig, *, experts: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if experts else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    parts: Any = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = LocalRMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    # Checkpoints name a norm after the linear layer that TE fuses it with.
    fused = parts.sharded_state_dict_keys_map
    if config.multi_latent_attention:
        # Replicate them over TP, as TE's spec does. The local spec would split them, and checkpoints would differ.
        attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
        attention.q_layernorm = attention.kv_layernorm = LocalRMSNorm
        fused["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        for latent in ("q", "kv"):
            fused[f"self_attention.{latent}_layernorm."] = f"self_attention.linear_{latent}_up_proj.layer_norm_"
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
    if experts:  # MoE layers do not fuse this norm
        del fused["pre_mlp_layernorm."]
    return layer


def rotary_frequencies(arch: Architecture) -> torch.Tensor:
    """Inverse frequencies, fp32 [turned dimensions / 2], as transformers computes them (scaled for Llama 3.1 and YaRN)."""
    return _rotary(arch)[0]


def softmax_scale(arch: Architecture) -> float | None:
    """The attention scale; None for the usual head_dim ** -0.5.

    YaRN (arXiv 2309.00071) scales queries and keys. transformers and inference servers scale cosines and sines instead; here
    the factor enters the attention scale squared, which is equivalent.
    """
    factor = _rotary(arch)[1]
    return None if factor == 1.0 else factor**2 * arch.head_dim**-0.5


def _rotary(arch: Architecture) -> tuple[torch.Tensor, float]:
    """(inverse frequencies, scale of queries and keys)."""
    head_dim = arch.latent.rope_dim if arch.latent else arch.head_dim
    if arch.rope["rope_type"] == "default":
        turned = int(head_dim * arch.rotary_fraction)
        exponent = torch.arange(0, turned, 2, dtype=torch.int64).float() / turned
        return 1.0 / (arch.rope["rope_theta"] ** exponent), 1.0
    from transformers.configuration_utils import PreTrainedConfig  # takes a second to import, and few models need it
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = PreTrainedConfig(
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.heads,
        head_dim=head_dim,
        max_position_embeddings=arch.max_positions,
        rope_parameters=dict(arch.rope),
    )
    return ROPE_INIT_FUNCTIONS[arch.rope["rope_type"]](config, torch.device("cpu"))
