"""Policies for the GPU tests: small models with distinct sizes that fit FP8's blocks, and an odd vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Glm4MoeForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from etr_megatron import platform
from etr_megatron.config import load_config, resolve

VOCAB = 1003

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
_KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, {}),
    "qwen3_moe": (Qwen3MoeForCausalLM, {**_EXPERTS, "num_experts": 5}),
    "glm4_moe": (
        Glm4MoeForCausalLM,
        {**_EXPERTS, "n_routed_experts": 5, "attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 2.5},
    ),
}


def write_model(path: Path, family: str = "qwen3", *, tied: bool = False) -> str:
    """A HuggingFace checkpoint whose weights are exact in bf16, but for routers' biases. Mixtures have five experts, two for
    every token; GLM's first layer is dense."""
    torch.manual_seed(11)
    kind, more = _KINDS[family]
    config = kind.config_class(
        vocab_size=VOCAB,
        hidden_size=384,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        initializer_range=0.05,
        tie_word_embeddings=tied,
        **more,
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


def sequences(count: int = 9, longest: int = 150) -> list[tuple[list[int], list[int]]]:
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
