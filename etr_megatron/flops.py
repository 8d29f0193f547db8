"""Floating-point operations of a model (two per multiply-add) and the peak rates of devices. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture

BF16_PEAK = {
    "A100": 312e12,
    "A800": 312e12,
    "H20": 148e12,
    "H100": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756.5e12,
    "H200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H800": 989.4e12,
    "H800 PCIe": 756.5e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "B300": 2250e12,
}
"""Peak dense bf16 FLOP/s by GPU, from NVIDIA's datasheets, which state twice as much for products with 2:4 sparsity. A name
without a suffix is the SXM module."""


def bf16_peak(device: str) -> float | None:
    """The peak of a device by CUDA's name of it, such as `NVIDIA H100 80GB HBM3`; None if unknown, and for a part of a GPU."""
    name = device.removeprefix("NVIDIA ").replace("-", " ") + " "
    known = [gpu for gpu in BF16_PEAK if name.startswith(gpu + " ")]
    return BF16_PEAK[max(known, key=len)] if known and " MIG " not in name else None


def active_parameters(arch: Architecture) -> int:
    """Number of weight elements that take part in the matrix products of one token, between the embedding and the head."""
    total = arch.layers * _attention_parameters(arch)
    for layer in range(arch.layers):
        if arch.experts is not None and arch.has_experts(layer):
            experts = arch.experts
            width = experts.intermediate_size * experts.per_token + experts.shared_size
            total += arch.hidden_size * (3 * width + experts.count)
        else:
            total += 3 * arch.hidden_size * arch.intermediate_size
    return total


def _attention_parameters(arch: Architecture) -> int:
    """Elements of the projections of a layer's attention."""
    q, output = arch.heads * arch.head_dim, arch.heads * arch.value_dim
    latent = arch.latent
    if latent is None:
        return arch.hidden_size * (q + 2 * arch.kv_heads * arch.head_dim + output)
    queries = arch.hidden_size * q if latent.q_rank is None else latent.q_rank * (arch.hidden_size + q)
    keys_and_values = arch.hidden_size * latent.cached_dim + latent.kv_rank * arch.heads * latent.up_dim
    return queries + keys_and_values + arch.hidden_size * output


def body_flops(arch: Architecture, tokens: float) -> float:
    """FLOPs of a forward pass over one sequence, without the head; an integer if `tokens` is. Causal attention sees half of the
    sequence on average."""
    attention = arch.layers * arch.heads * (arch.head_dim + arch.value_dim) * tokens * (tokens + 1)
    return 2 * active_parameters(arch) * tokens + attention


def head_flops(arch: Architecture, rows: float) -> float:
    """FLOPs of a forward pass of the head over the rows that predict a response token."""
    return 2 * arch.vocab_size * arch.hidden_size * rows


def sequence_flops(arch: Architecture, tokens: float, rows: float) -> float:
    """FLOPs of a forward pass over one sequence with `rows` rows of logits; a backward pass takes twice as many."""
    return body_flops(arch, tokens) + head_flops(arch, rows)
