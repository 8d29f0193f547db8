"""Estimate a server's generation time: a roofline of every decode step, with continuous batching."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etr_megatron.flops import active_parameters, head_flops
from etr_megatron.planner.hardware import Hardware

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture

_STRIDE = 16
"""Decode steps simulated at once."""


def response_lengths(samples: int, mean: float, longest: int) -> np.ndarray:
    """Assumed lengths [samples]: evenly spread and symmetric around the mean, as widely as 0 and `longest` allow."""
    half = min(mean, longest - mean)
    return np.linspace(mean - half, mean + half, samples) if samples > 1 else np.full(1, mean)


def generation_seconds(
    arch: Architecture,
    *,
    lengths: np.ndarray,
    prompt: float,
    concurrency: int,
    cache_tokens: int | None,
    tp: int,
    weight_bytes: int,
    token_bytes: int,
    gpu: Hardware,
    expert_bytes: int = 0,
    nodes: int = 1,
    attention_dp: int = 1,
) -> float:
    """Seconds that one server takes for responses of `lengths` [samples], started in a fixed random order.

    concurrency: maximum number of responses at once. cache_tokens: capacity of a KV cache, None is unlimited. weight_bytes,
    token_bytes: bytes of the weights, and of a token's keys and values, on one GPU of the server. expert_bytes: the part of
    weight_bytes in experts, without shared ones. nodes: number of nodes over which the tp GPUs are spread evenly.
    attention_dp: number of groups of these GPUs, each with a cache and an even share of the samples. The first group is
    simulated, as if the others had samples of the same lengths.

    A decode step takes the longer of reading and computing. It reads the weights (of experts only those that the batch chooses)
    and the batch's cache; it computes the products, including the head. Prompts take the time of their products. For both, the
    server's GPUs also sum hidden states (all-reduce). A sample that no longer fits in the cache is preempted, and its tokens
    are recomputed, like a prompt's, when it resumes. The products of attention itself count only with latent attention, where
    all heads share the cache: with separate keys and values they always take less time than reading these.
    """
    order = np.random.default_rng(0).permutation(len(lengths))[::attention_dp]
    concurrency = -(-concurrency // attention_dp)
    waiting = [(prompt, float(length)) for length in np.asarray(lengths)[order]]
    running = np.empty((0, 2))  # tokens in the cache, tokens left
    products = tp * gpu.matmul * gpu.decode_compute_efficiency
    compute, head = 2 * active_parameters(arch) / products, head_flops(arch, 1) / products
    attend = _latent_products(arch) / products
    rate = gpu.memory * gpu.decode_memory_efficiency
    links, sending = _sums_of_a_pass(arch, tp, nodes, gpu, attention_dp)
    limit = np.inf if cache_tokens is None else cache_tokens
    seconds = 0.0
    while waiting or len(running):
        started = _admitted(waiting, concurrency - len(running), limit - running[:, 0].sum(), alone=not len(running))
        # All in one pass, so the latency of its all-reduces counts once.
        prefilled = attention_dp * sum(context for context, _ in started)
        seconds += (links if prefilled else 0.0) + prefilled * (compute + sending)
        running = np.concatenate([running, np.array(started).reshape(-1, 2)])
        fits = max(1, int(np.searchsorted(np.cumsum(running[:, 0]), limit, side="right")))
        waiting[:0] = [(context, left) for context, left in running[fits:]]
        running = running[:fits]
        batch, cached = attention_dp * len(running), running[:, 0].sum()
        reading = (weight_bytes - expert_bytes * _left_unread(arch, batch) + token_bytes * cached) / rate
        computing = (compute + head) * batch + attend * attention_dp * cached
        seconds += _STRIDE * (max(reading, computing) + links + batch * sending + gpu.decode_overhead)
        running = running + np.array([_STRIDE, -_STRIDE])
        running = running[running[:, 1] > 0]
    return seconds


def _sums_of_a_pass(arch: Architecture, tp: int, nodes: int, gpu: Hardware, attention_dp: int) -> tuple[float, float]:
    """(latency, seconds per token of the server's batch) of the exchanges between its GPUs in all layers.

    Attention and MLP each end with a sum over all GPUs. With data-parallel attention the tokens are instead gathered for the
    MLP and its sums scattered again, which together send as much as one sum; attention ends with a sum over the GPUs of a
    group, of the group's tokens only.
    """
    latency, sending = _all_reduce(2 * arch.hidden_size, tp, nodes, gpu)
    if attention_dp == 1:
        return 2 * arch.layers * latency, 2 * arch.layers * sending
    group = tp // attention_dp
    own_latency, own = _all_reduce(2 * arch.hidden_size, group, -(-nodes // attention_dp), gpu)
    return arch.layers * (2 * latency + own_latency), arch.layers * (sending + own / attention_dp)


def _all_reduce(size: int, tp: int, nodes: int, gpu: Hardware) -> tuple[float, float]:
    """(latency, seconds of `size` bytes) of adding up over the tp GPUs of a server.

    Over NVLink a GPU sends the bytes once, since the switches add, if there are other GPUs on its node. Over the network, each
    GPU of a node sends its share in a ring of all nodes, nearly twice.
    """
    if tp == 1:
        return 0.0, 0.0
    within = 0.0 if tp == nodes else size / (gpu.nvlink * gpu.link_efficiency)
    share = size * nodes / tp
    across = share * 2 * (nodes - 1) / nodes / (gpu.network * gpu.link_efficiency)
    return gpu.all_reduce_latency if nodes == 1 else gpu.network_all_reduce_latency, within + across


def _latent_products(arch: Architecture) -> int:
    """FLOPs of a decoded token per cached token, in all layers and heads: a score from the latent and the rotated key, and a
    weighted sum of latents."""
    latent = arch.latent
    return 0 if latent is None else 2 * arch.layers * arch.heads * (latent.cached_dim + latent.kv_rank)


def _admitted(waiting: list[tuple[float, float]], places: int, room: float, *, alone: bool) -> list[tuple[float, float]]:
    """Pop from `waiting` the samples that fit at their current length; an idle server takes one of any length."""
    taken = 0
    while taken < min(places, len(waiting)) and (room >= waiting[taken][0] + _STRIDE or (alone and taken == 0)):
        room -= waiting[taken][0] + _STRIDE
        taken += 1
    started = waiting[:taken]
    del waiting[:taken]
    return started


def _left_unread(arch: Architecture, batch: int) -> float:
    """Expected share of the experts that no token of a step of `batch` tokens has chosen; 0 for a dense model."""
    return 0.0 if arch.experts is None else (1.0 - arch.experts.per_token / arch.experts.count) ** batch
