"""Policies for the GPU tests: small models with distinct sizes that fit FP8's blocks, and an odd vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3ForCausalLM, Glm4MoeForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from etr_megatron import platform
from etr_megatron.config import load_config, resolve
from tests.gpu.conftest import DRY_RUN

_SHRINK = 4 if DRY_RUN else 1
"""Many CPUs have no instructions for bf16 and multiply it thirty times slower than float32."""

FP8_BLOCK = 128 // _SHRINK

VOCAB = 1003 // _SHRINK

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256 // _SHRINK, "norm_topk_prob": True}
_KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, {}),
    "qwen3_moe": (Qwen3MoeForCausalLM, {**_EXPERTS, "num_experts": 5}),
    "glm4_moe": (
        Glm4MoeForCausalLM,
        {**_EXPERTS, "n_routed_experts": 5, "attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 2.5},
    ),
    # Heads as wide as the published model's, on a GPU.
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        {
            **{**_EXPERTS, "num_experts_per_tok": 4, "n_routed_experts": 12, "n_group": 4, "topk_group": 2},
            **{"first_k_dense_replace": 1, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_key_value_heads": 4},
            **{"q_lora_rank": 256 // _SHRINK, "kv_lora_rank": 128 // _SHRINK, "v_head_dim": 128 // _SHRINK},
            **{"qk_nope_head_dim": 128 // _SHRINK, "qk_rope_head_dim": 64 // _SHRINK},
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128},
                **{"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
            },
        },
    ),
}


def write_model(path: Path, family: str = "qwen3", *, tied: bool = False) -> str:
    """A HuggingFace checkpoint whose weights are exact in bf16, but for routers' biases. Mixtures have five experts, two for
    every token, DeepSeek's twelve in groups, four for every token; the first layer of GLM's and DeepSeek's is dense."""
    torch.manual_seed(11)
    kind, more = _KINDS[family]
    sizes = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **({} if "kv_lora_rank" in more else {"head_dim": 128 // _SHRINK}),
    }
    config = kind.config_class(
        vocab_size=VOCAB,
        hidden_size=384 // _SHRINK,
        intermediate_size=640 // _SHRINK,
        num_hidden_layers=3,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        initializer_range=0.05,
        tie_word_embeddings=tied,
        **{**sizes, **more},
    )
    model = kind(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.05 * torch.randn_like(buffer))
    model.save_pretrained(path)
    return str(path)


def sequences(count: int = 9, longest: int = 150 // _SHRINK) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of many lengths, the last with a single response token."""
    generator = torch.Generator().manual_seed(2)

    def tokens(size: int) -> list[int]:
        return torch.randint(0, VOCAB, (size,), generator=generator).tolist()

    sizes = torch.randint(1, longest, (count, 2), generator=generator).tolist()
    return [*((tokens(a), tokens(b)) for a, b in sizes[:-1]), (tokens(sizes[-1][0]), tokens(1))]


def build(model: str, *overrides: str) -> Any:
    """A policy in bf16 on this platform; needs torch.distributed's world."""
    from etr_megatron.policy import Policy, configured_layout
    from etr_megatron.weights import read_architecture

    settings = [f"model.path={model}", "parallel.tp=1", "model.dtype=bfloat16", *overrides]
    config = resolve(load_config(None, settings), 1, cuda=platform.uses_cuda())
    return Policy(read_architecture(model), model, config, configured_layout(config))
