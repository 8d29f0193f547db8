"""Architectures that divide by TP 8 and PP 4, tensors with all elements distinct, and independent rules of the layouts.

The rules here use names and torch's own chunk, cat and view, and nothing of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etr_megatron.weights import Architecture, Experts, LatentAttention, Weight, weights_of

_SIZES = dict(
    layers=4,
    hidden_size=24,
    intermediate_size=40,
    heads=16,
    kv_heads=8,
    head_dim=3,
    vocab_size=301,
    norm_eps=1e-6,
    max_positions=64,
)
_EXPERTS = dict(count=6, per_token=3, intermediate_size=56)


def _arch(family: str, *, tied: bool = False, experts: Experts | None = None, **sizes: int) -> Architecture:
    return Architecture(family=family, tied_embeddings=tied, experts=experts, **{**_SIZES, **sizes})


def _latent(family: str, *, q_rank: int | None, groups: int = 1, shared_size: int) -> Architecture:
    latent = LatentAttention(kv_rank=14, q_rank=q_rank, nope_dim=5, rope_dim=4, value_dim=6)
    experts = Experts(
        **_EXPERTS,
        normalized=True,
        dense_layers=frozenset({0}),
        shared_size=shared_size,
        score_function="sigmoid",
        expert_bias=True,
        groups=groups,
    )
    sizes = {**_SIZES, "kv_heads": _SIZES["heads"], "head_dim": latent.head_dim}
    return Architecture(family=family, tied_embeddings=False, experts=experts, latent=latent, **sizes)


ARCHITECTURES = {
    "llama": _arch("llama"),
    "llama_tied": _arch("llama", tied=True),
    "qwen2": _arch("qwen2"),
    "qwen2_tied": _arch("qwen2", tied=True),
    # At TP4 and TP8 ranks share a key/value head; at TP8 their rows begin and end inside heads.
    "qwen2_few_heads": _arch("qwen2", kv_heads=2, head_dim=12),
    "qwen3": _arch("qwen3"),
    "qwen3_tied": _arch("qwen3", tied=True),
    "qwen3_moe": _arch("qwen3_moe", experts=Experts(**_EXPERTS, normalized=True)),
    "qwen3_moe_dense": _arch(
        "qwen3_moe", tied=True, experts=Experts(**_EXPERTS, normalized=False, dense_layers=frozenset({0, 2}))
    ),
    "glm4_moe": _arch(
        "glm4_moe",
        experts=Experts(**_EXPERTS, normalized=True, dense_layers=frozenset({0}), shared_size=72, expert_bias=True),
    ),
    "glm4_moe_lite": _latent("glm4_moe_lite", q_rank=None, shared_size=56),
    "deepseek_v3": _latent("deepseek_v3", q_rank=10, groups=3, shared_size=72),
}


def tensors_of(arch: Architecture) -> dict[str, Tensor]:
    """HF tensors, int32, in which no two elements are equal."""
    found, start = {}, 1
    for weight in weights_of(arch):
        for name, shape in zip(weight.hf, weight.shapes, strict=True):
            size = torch.Size(shape).numel()
            assert name not in found
            found[name] = torch.arange(start, start + size, dtype=torch.int32).view(shape)
            start += size
    return found


def read_from(tensors: dict[str, Tensor]):
    """A `Read` over tensors in memory."""
    return lambda name, begin, size: tensors[name][tuple(slice(b, b + s) for b, s in zip(begin, size, strict=True))]


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    missing = -len(tensor) % multiple
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def megatron_parameter(weight: Weight, arch: Architecture, tensors: list[Tensor], tp: int, rank: int) -> Tensor:
    """Megatron's parameter on tensor-parallel rank `rank` of `tp`, by the parameter's name. tensors: the HF ones."""
    module, kind = weight.megatron.rsplit(".", 2)[-2:]
    if module in ("word_embeddings", "output_layer"):
        return _padded(tensors[0], 128 * tp).chunk(tp)[rank]
    if module == "linear_qkv":
        groups = [tensor.view(arch.kv_heads, -1, *tensor.shape[1:]) for tensor in tensors]
        mixed = torch.cat(groups, dim=1).flatten(0, 1)
        assert kind in ("weight", "bias")
        return mixed.chunk(tp)[rank]
    if module == "linear_fc1":
        return torch.cat([tensor.chunk(tp)[rank] for tensor in tensors])
    if module in ("linear_proj", "linear_fc2"):
        return tensors[0].chunk(tp, dim=1)[rank]
    if module in ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj"):  # whole heads
        return tensors[0].view(arch.heads, -1, *tensors[0].shape[1:]).chunk(tp)[rank].flatten(0, 1)
    whole = ("router", "linear_q_down_proj", "linear_kv_down_proj")  # of latents, every rank has all
    assert module.endswith("layernorm") or module in whole, weight.megatron
    return tensors[0]


def server_parameter(weight: Weight, arch: Architecture, tensors: list[Tensor], tp: int, rank: int) -> Tensor:
    """SGLang's parameter on rank `rank` of `tp`, by the parameter's name.

    QKVParallelLinear: the rank's query heads, key heads, value heads; with fewer key/value heads than ranks, each head is on
    tp / kv_heads neighbours. MergedColumnParallelLinear and w13: gate above up. VocabParallelEmbedding: padded to 64 rows.
    ColumnParallelLinear: rows of a projection up from a latent. ReplicatedLinear: that down to it, whole.
    """
    module = (
        weight.server.rsplit(".", 2)[-2] if not weight.server.endswith(("w13_weight", "w2_weight")) else weight.server[-10:]
    )
    if module in ("embed_tokens", "lm_head"):
        return _padded(tensors[0], 64).chunk(tp)[rank]
    if module == "qkv_proj":
        q, *kv = tensors
        ways = min(tp, arch.kv_heads)
        return torch.cat([q.chunk(tp)[rank], *(tensor.chunk(ways)[rank * ways // tp] for tensor in kv)])
    if module in ("gate_up_proj", "w13_weight"):
        return torch.cat([tensor.chunk(tp)[rank] for tensor in tensors])
    if module in ("o_proj", "down_proj", ".w2_weight"):
        return tensors[0].chunk(tp, dim=1)[rank]
    if module in ("q_proj", "q_b_proj", "kv_b_proj"):
        return tensors[0].chunk(tp)[rank]
    whole = ("gate", "q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj_with_mqa")
    assert module.endswith("norm") or module in whole or "layernorm" in module, weight.server
    return tensors[0]
