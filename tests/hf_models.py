"""Small random HuggingFace checkpoints of every family; hidden, intermediate, heads x head_dim and vocab are all distinct."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3ForCausalLM,
    Glm4MoeForCausalLM,
    Glm4MoeLiteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

VOCAB = 301
_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    initializer_range=0.1,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
_YARN_ROPE = dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=32)
_MIXTURE = dict(**_COMMON, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=28)
_GLM = dict(
    **_COMMON,
    attention_bias=True,
    n_routed_experts=6,
    num_experts_per_tok=3,
    moe_intermediate_size=28,
    n_shared_experts=2,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    partial_rotary_factor=0.5,
    tie_word_embeddings=False,
)
_LATENT = dict(
    **{**_COMMON, "num_key_value_heads": 4},
    q_lora_rank=22,
    kv_lora_rank=26,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=14,
    rope_interleave=True,
    moe_intermediate_size=28,
    tie_word_embeddings=False,
)
_LATENT.pop("head_dim")
_DEEPSEEK_YARN = dict(**_YARN_ROPE, mscale=0.7, mscale_all_dim=0.7, beta_fast=16, beta_slow=1)
FAMILIES = {
    "llama": (LlamaForCausalLM, dict(**_COMMON, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=False)),
    "qwen2": (Qwen2ForCausalLM, dict(**_COMMON, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, dict(**_COMMON, tie_word_embeddings=False)),
    "qwen3_tied": (Qwen3ForCausalLM, dict(**_COMMON, tie_word_embeddings=True)),
    "qwen3_yarn": (Qwen3ForCausalLM, dict(**_COMMON, rope_parameters=_YARN_ROPE, tie_word_embeddings=False)),
    "qwen3_moe": (Qwen3MoeForCausalLM, dict(**_MIXTURE, norm_topk_prob=True, tie_word_embeddings=False)),
    # Layers 1 and 3 would have experts; listing layer 1 as dense leaves the first half without any.
    "qwen3_moe_dense": (
        Qwen3MoeForCausalLM,
        dict(**_MIXTURE, norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[1], tie_word_embeddings=True),
    ),
    "glm4_moe": (Glm4MoeForCausalLM, dict(**_GLM, use_qk_norm=True)),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        dict(
            **_LATENT,
            rope_parameters=_DEEPSEEK_YARN,
            n_routed_experts=12,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            n_shared_experts=2,
            routed_scaling_factor=2.5,
            first_k_dense_replace=1,
        ),
    ),
}
ALIKE = {
    "glm4_moe_lite": (
        Glm4MoeLiteForCausalLM,
        dict(
            **{**_LATENT, "q_lora_rank": None},
            n_routed_experts=6,
            num_experts_per_tok=3,
            n_shared_experts=1,
            routed_scaling_factor=1.8,
        ),
    ),
    "glm4_moe_air": (Glm4MoeForCausalLM, dict(**_GLM, use_qk_norm=False)),
    "mistral": (MistralForCausalLM, dict(**_COMMON, sliding_window=None, tie_word_embeddings=False)),
}
"""Families whose table in the weight map is another's, or a part of it, so that few tests need them."""

WITH_EXPERTS = ("qwen3_moe", "qwen3_moe_dense", "glm4_moe", "deepseek_v3")
"""Those of `FAMILIES` with experts."""


def write_model(name: str, path: Path, layers: int = 4, **changes: Any) -> str:
    """Write the family's model, with norms away from 1 and biases away from 0. layers: number of layers. changes: of its
    settings."""
    torch.manual_seed(sum(map(ord, name)))
    kind, settings = (FAMILIES | ALIKE)[name]
    model = kind(kind.config_class(num_hidden_layers=layers, **{**settings, **changes})).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.add_(0.05 * torch.randn_like(buffer))
    model.save_pretrained(path)
    return str(path)


def by_published_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' parameters under the names of published checkpoints, which store experts one by one."""
    found = {}
    for name, tensor in tensors.items():
        before, experts, kind = name.rpartition(".experts.")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind) if experts else None
        if parts is None:
            found[name] = tensor
            continue
        for expert, whole in enumerate(tensor):
            for part, one in zip(parts, whole.chunk(len(parts)), strict=True):
                found[f"{before}.experts.{expert}.{part}.weight"] = one
    return found


def rewrite_config_as_published(path: str | Path) -> None:
    """Replace what only transformers 5 writes by what published checkpoints say: `rope_parameters` by `rope_theta` and
    `rope_scaling`, and for latent attention the kinds of MLPs and sizes of heads by what DeepSeek's own code reads."""
    file = Path(path) / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if "kv_lora_rank" in config:
        for name in ("head_dim", "qk_head_dim", "rope_interleave"):
            config.pop(name, None)
        if kinds := config.pop("mlp_layer_types", None):
            config["first_k_dense_replace"] = kinds.count("dense")
        config |= {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    file.write_text(json.dumps(config))


def random_sequences(count: int = 7, seed: int = 0, vocab: int = VOCAB) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) pairs of various lengths, some of one token."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, vocab, (size,), generator=generator).tolist()

    pairs = [(tokens(1, 19), tokens(1, 31)) for _ in range(count - 1)]
    return [*pairs, (tokens(40, 60), tokens(1, 2))]


def in_turn(families: Sequence[str], layouts: Iterable[str]) -> list[tuple[str, str]]:
    """(family, layout): the first family in every layout, the others one after the other, a layout each."""
    first, *others = families
    return [(family, layout) for number, layout in enumerate(layouts) for family in (first, others[number % len(others)])]
