"""Every field of megatron-core 0.16.1's TransformerConfig (with latent attention's), DistributedDataParallelConfig and
OptimizerConfig: whether `train.megatron` may set it, or why not.

A list of what is allowed, not of what is forbidden: with a field that nobody has looked at, a run might train another model
than the servers and the planner have, and no check would notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

KEY = "train.megatron"

Owner = Literal["model", "ddp", "optimizer"]
"""Which of Megatron's three configs has the field."""


@dataclass(frozen=True)
class MegatronField:
    """A field that `train.megatron` may set.

    hint: its type: bool, int, a Literal of texts, or a tuple of one. text: what it does, in markdown. gpu: whether it needs
    Transformer Engine's layers, unless it is false (see `needs_gpu`). with_field: another field, and its value without which
    Megatron ignores this one. void_at: a key of the config, and its value with which this field has no effect. experts: whether
    only models with experts have a use for it. of: see `Owner`.
    """

    hint: Any
    text: str
    gpu: bool = False
    with_field: tuple[str, str | bool] | None = None
    void_at: tuple[str, str | int | bool] | None = None
    experts: bool = False
    of: Owner = "model"

    @property
    def condition(self) -> str:
        """`with_field` as an override writes it, such as `cpu_offloading=true`; "" if there is none."""
        return "=".join(str(part) for part in self.with_field or ()).replace("True", "true")


RecomputedModule = Literal["core_attn", "mlp", "moe", "moe_act", "shared_experts", "layernorm", "mla_up_proj"]

FIELDS: dict[str, MegatronField] = {
    "recompute_granularity": MegatronField(
        Literal["full", "selective"], "recompute whole layers, or the parts in `recompute_modules`"
    ),
    "recompute_method": MegatronField(
        Literal["block", "uniform"],
        "`block`: the first `recompute_num_layers` layers of every model chunk; `uniform`: all layers, in units of that many, "
        "of which only the input is kept",
        with_field=("recompute_granularity", "full"),
    ),
    "recompute_num_layers": MegatronField(int, "see `recompute_method`", with_field=("recompute_granularity", "full")),
    "recompute_modules": MegatronField(
        tuple[RecomputedModule, ...],
        "of `core_attn` (the default), `mlp` (of dense layers), `moe`, `moe_act`, `shared_experts`, "
        "`layernorm` and `mla_up_proj`; `moe_act` needs a GPU",
        with_field=("recompute_granularity", "selective"),
    ),
    "distribute_saved_activations": MegatronField(
        bool,
        "spread kept inputs over tensor-parallel ranks (sequence parallelism does so by itself)",
        with_field=("recompute_granularity", "full"),
        void_at=("parallel.tp", 1),
    ),
    "cpu_offloading": MegatronField(
        bool,
        "move activations of `cpu_offloading_num_layers` layers, which must be given, to CPU memory (one pipeline stage only)",
        gpu=True,
    ),
    "cpu_offloading_num_layers": MegatronField(int, "fewer than all", gpu=True, with_field=("cpu_offloading", True)),
    "cpu_offloading_double_buffering": MegatronField(
        bool, "two buffers for what comes back", gpu=True, with_field=("cpu_offloading", True)
    ),
    "attention_backend": MegatronField(
        Literal["auto", "flash", "fused", "unfused"], "Transformer Engine's kernel for attention", gpu=True
    ),
    "apply_rope_fusion": MegatronField(bool, "one kernel for the rotary embedding (on, but for latent attention)", gpu=True),
    "bias_activation_fusion": MegatronField(bool, "one kernel for the gate of an MLP (on with Transformer Engine)"),
    "bias_dropout_fusion": MegatronField(bool, "one kernel for the residual sum (on with Transformer Engine)"),
    "clone_scatter_output_in_embedding": MegatronField(
        bool,
        "copy this rank's part of the embedding's output, so that the whole one can be freed (on)",
        void_at=("parallel.sequence_parallel", False),
    ),
    "deterministic_mode": MegatronField(
        bool,
        "a deterministic backward pass of the embedding and, by the environment variable NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 "
        "that it needs on a GPU, of attention; outputs of experts are still added up in any order",
    ),
    "disable_bf16_reduced_precision_matmul": MegatronField(
        bool, "sum products of bfloat16 in float32 only", gpu=True, void_at=("model.dtype", "float32")
    ),
    "disable_parameter_transpose_cache": MegatronField(
        bool, "transpose weights anew in every pass", gpu=True, void_at=("fp8.recipe", "none")
    ),
    "deallocate_pipeline_outputs": MegatronField(
        bool, "free a stage's output once it has been sent (not with `parallel.vpp`)", void_at=("parallel.pp", 1)
    ),
    "overlap_p2p_comm_warmup_flush": MegatronField(
        bool, "overlap messages with computation in warm-up and flush, too", void_at=("parallel.vpp", 1)
    ),
    "moe_permute_fusion": MegatronField(bool, "one kernel to sort tokens by expert", gpu=True, experts=True),
    "moe_router_fusion": MegatronField(
        bool, "one kernel for the router's choice; it cannot replay one (`train.routing_replay`)", gpu=True, experts=True
    ),
    "moe_shared_expert_overlap": MegatronField(
        bool, "compute shared experts while tokens travel to the others (not with `flex`)", gpu=True, experts=True
    ),
    "moe_token_dispatcher_type": MegatronField(
        Literal["alltoall", "flex"], "how tokens travel to experts; `flex` needs DeepEP and a GPU", experts=True
    ),
    "moe_flex_dispatcher_backend": MegatronField(
        Literal["deepep", "hybridep"], "of `flex`", gpu=True, with_field=("moe_token_dispatcher_type", "flex"), experts=True
    ),
    "moe_deepep_num_sms": MegatronField(
        int, "multiprocessors for DeepEP (20)", gpu=True, with_field=("moe_token_dispatcher_type", "flex"), experts=True
    ),
    "moe_hybridep_num_sms": MegatronField(
        int,
        "multiprocessors for HybridEP (16)",
        gpu=True,
        with_field=("moe_flex_dispatcher_backend", "hybridep"),
        experts=True,
    ),
    "bucket_size": MegatronField(
        int,
        "weights per reduction of gradients (40,000,000; a million per rank, if that is more)",
        void_at=("train.overlap_grad_reduce", False),
        of="ddp",
    ),
    "pad_buckets_for_high_nccl_busbw": MegatronField(
        bool, "pad reductions to multiples of 65,536 weights", void_at=("train.distributed_optimizer", False), of="ddp"
    ),
    "reduce_scatter_with_fp32_accumulation": MegatronField(
        bool,
        "send gradients in `train.grads_dtype` and sum them in float32",
        void_at=("train.distributed_optimizer", False),
        of="ddp",
    ),
    "pin_cpu_grads": MegatronField(
        bool, "pinned memory for gradients (on)", gpu=True, void_at=("train.optimizer_offload", False), of="optimizer"
    ),
    "pin_cpu_params": MegatronField(
        bool, "pinned memory for weights (on)", gpu=True, void_at=("train.optimizer_offload", False), of="optimizer"
    ),
}
"""The fields that `train.megatron` may set: they change the speed and the memory of training, and its numbers by rounding."""

RECOMPUTATION = tuple(name for name in FIELDS if "recompute" in name or name == "distribute_saved_activations")


def needs_gpu(name: str, value: Any) -> bool:
    """Whether a field with this value needs a GPU with Transformer Engine."""
    if name == "recompute_modules":
        return "moe_act" in value
    if name == "moe_token_dispatcher_type":
        return value == "flex"
    return FIELDS[name].gpu and value is not False


GOVERNED: dict[str, str] = {
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "microbatch_group_size_per_vp_stage": "parallel.vpp",
    "overlap_p2p_comm": "parallel.vpp",
    "batch_p2p_comm": "parallel.vpp",
    "num_layers_in_first_pipeline_stage": "parallel.first_stage_layers",
    "num_layers_in_last_pipeline_stage": "parallel.last_stage_layers",
    "account_for_embedding_in_pipeline_split": "parallel.first_stage_layers",
    "account_for_loss_in_pipeline_split": "parallel.last_stage_layers",
    "pipeline_model_parallel_layout": "parallel.first_stage_layers",
    "sequence_parallel": "parallel.sequence_parallel",
    "context_parallel_size": "parallel.cp",
    "hierarchical_context_parallel_sizes": "parallel.cp",
    "hybrid_context_parallel": "parallel.cp",
    "max_seqlen_per_dp_cp_rank": "parallel.cp",
    "cp_comm_type": "parallel.cp_comm",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "params_dtype": "model.dtype",
    "pipeline_dtype": "model.dtype",
    "transformer_impl": "run.platform",
    "use_cpu_initialization": "run.platform",
    "fp8": "fp8.recipe",
    "fp8_recipe": "fp8.recipe",
    "fp8_amax_history_len": "fp8.recipe",
    "fp8_amax_compute_algo": "fp8.recipe",
    "moe_router_padding_for_quantization": "fp8.recipe",
    "moe_router_padding_for_fp8": "fp8.recipe",
    "fp8_param": "fp8.param",
    "fp8_param_gather": "fp8.param",
    "first_last_layers_bf16": "fp8.first_last_layers_bf16",
    "num_layers_at_start_in_bf16": "fp8.first_last_layers_bf16",
    "num_layers_at_end_in_bf16": "fp8.first_last_layers_bf16",
    "moe_aux_loss_coeff": "train.moe_aux_loss_coef",
    "moe_router_load_balancing_type": "train.moe_aux_loss_coef",
    "moe_router_dtype": "train.moe_router_fp32",
    "moe_enable_routing_replay": "train.routing_replay",
    "grad_reduce_in_fp32": "train.grads_dtype",
    "main_grads_dtype": "train.grads_dtype",
    "overlap_grad_reduce": "train.overlap_grad_reduce",
    "overlap_param_gather": "train.overlap_param_gather",
    "use_distributed_optimizer": "train.distributed_optimizer",
    "optimizer_cpu_offload": "train.optimizer_offload",
    "optimizer_offload_fraction": "train.optimizer_offload",
    "use_precision_aware_optimizer": "train.optimizer_offload",
    "lr": "train.lr",
    "min_lr": "train.min_lr",
    "weight_decay": "train.weight_decay",
    "adam_beta1": "train.adam_beta1",
    "adam_beta2": "train.adam_beta2",
    "adam_eps": "train.adam_eps",
    "clip_grad": "train.clip_grad",
    "moe_layer_recompute": "train.megatron.recompute_modules",
    "moe_enable_deepep": "train.megatron.moe_token_dispatcher_type",
}
"""Fields that a key of the config sets. Which one."""

_REFUSED_FOR: dict[str, str] = {
    "follows from the model's config.json": """
        num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels softmax_scale softmax_type
        layernorm_epsilon layernorm_zero_centered_gamma apply_residual_connection_post_layernorm add_bias_linear add_qkv_bias
        gated_linear_unit activation_func glu_linear_offset activation_func_clamp_value normalization qk_layernorm qk_l2_norm
        attention_output_gate rotary_interleaved window_size window_attn_skip_freq no_rope_freq num_moe_experts moe_layer_freq
        moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_topk moe_router_num_groups
        moe_router_topk_limited_devices moe_router_group_topk moe_router_pre_softmax moe_router_topk_scaling_factor
        moe_router_score_function moe_router_enable_expert_bias moe_latent_size mtp_num_layers mtp_standalone
        multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type rotary_base
        rotary_percent rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim""",
    "belongs to models that this project does not train": """
        mtp_loss_scaling_factor experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
        dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss linear_attention_freq linear_conv_kernel_dim linear_key_head_dim
        linear_value_head_dim linear_num_key_heads linear_num_value_heads mrope_section is_hybrid_model mamba_state_dim
        mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path heterogeneous_block_specs
        hetereogenous_dist_checkpoint use_fused_weighted_squared_relu""",
    "would change what is computed, so that the trainer and the servers had different models, or the loss another gradient": """
        hidden_dropout attention_dropout fp32_residual_connection enable_autocast autocast_dtype qk_clip qk_clip_alpha
        qk_clip_threshold activation_func_fp8_input_store apply_query_key_layer_scaling fp4 fp4_recipe fp4_param
        fp4_quantizer_factory quant_recipe use_kitchen use_kitchen_attention kitchen_attention_backend moe_z_loss_coeff
        moe_router_bias_update_rate moe_router_force_load_balancing moe_input_jitter_eps moe_token_dropping
        moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy moe_apply_probs_on_input""",
    "would make another optimizer than Adam with one learning rate, whose state the checkpoints do not have": """
        optimizer decoupled_lr decoupled_min_lr apply_wd_to_qk_layernorm decoupled_weight_decay sgd_momentum muon_momentum
        muon_split_qkv muon_use_nesterov muon_scale_mode muon_fp32_matmul_prec muon_num_ns_steps muon_tp_mode
        muon_extra_scale_factor""",
    "would store Adam's state in types that checkpoints have not been shown to keep": """
        main_params_dtype exp_avg_dtype exp_avg_sq_dtype store_param_remainders""",
    "is a detail of FP8, which the section fp8 configures as a whole": """
        fp8_quantizer_factory fp8_margin fp8_interval fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention
        tp_only_amax_red reuse_grad_buf_for_mxfp8_param_ag keep_fp8_transpose_cache""",
    "is set by this project, which relies on its value": """
        perform_initialization timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func
        calculate_per_token_loss variable_seq_lengths gradient_accumulation_fusion masked_softmax_fusion persist_layer_norm
        moe_grouped_gemm moe_use_legacy_grouped_gemm _cpu_offloading_context average_in_collective check_for_nan_in_grad""",
    "needs microbatches of one size, and packed ones have many": """
        tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
        tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv
        tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend enable_cuda_graph external_cuda_graph cuda_graph_impl
        cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps""",
    "needs a schedule, or process groups, that this project does not make": """
        overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release use_ring_exchange_p2p
        num_microbatches_with_partial_activation_checkpoints num_distributed_optimizer_instances align_param_gather
        overlap_param_gather_with_optimizer_step pipeline_model_parallel_comm_backend batch_p2p_sync""",
    "belongs to Megatron's FSDP, which this project does not use": """
        use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy suggested_communication_unit_size
        preserve_fp32_weights fsdp_double_buffer outer_dp_sharding_strategy fsdp_manual_registration
        gradient_reduce_div_fusion init_model_with_meta_device""",
    "does not work with passes without gradients between updates, in which log-probs are computed": """
        fine_grained_activation_offloading offload_modules min_offloaded_tensor_size""",
    "has no effect here": """
        moe_extended_tp async_tensor_model_parallel_allreduce use_te_rng_tracker cross_entropy_loss_fusion
        cross_entropy_fusion_impl defer_embedding_wgrad_compute wgrad_deferral_limit barrier_with_L1_time
        init_method output_layer_init_method init_method_std embedding_init_method embedding_init_method_std
        attention_softmax_in_fp32 memory_efficient_layer_norm moe_per_layer_logging config_logger_dir flash_decode
        inference_rng_tracker inference_sampling_seed use_inference_optimized_layers inference_fuse_tp_communication
        mlp_chunks_for_prefill cache_mla_latents log_max_attention_logit test_mode loss_scale initial_loss_scale
        min_loss_scale loss_scale_window hysteresis log_num_zeros_in_grad""",
    "has not been checked with this project": """
        fused_single_qkv_rope use_te_activation_func batch_invariant_mode symmetric_ar_type cpu_offloading_activations
        cpu_offloading_weights check_for_large_grads nccl_ub disable_symmetric_registration
        use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d""",
}
REFUSED: dict[str, str] = {name: reason for reason, names in _REFUSED_FOR.items() for name in names.split()}
"""All other fields: why `train.megatron` cannot set them."""
