"""How long a server takes for its samples: a roofline of every decoding step, with continuous batching."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etr_megatron.flops import active_parameters, head_flops
from etr_megatron.planner.hardware import Hardware

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture

_STRIDE = 16
"""Decoding steps that are taken at once."""


def response_lengths(samples: int, mean: float, longest: int) -> np.ndarray:
    """Lengths [samples] that are assumed: evenly spread, symmetric around the mean, as widely as 0 and `longest` let them."""
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
) -> float:
    """Seconds of one server for responses of `lengths` [samples], started in an order that mixes long and short ones.

    concurrency: most at once. cache_tokens: what the KV cache holds, None is enough. weight_bytes, token_bytes: weights and
    a token's keys and values on one of its GPUs. A step reads all weights (of experts those that the batch chooses) and the
    batch's cache, or computes, head included, whichever takes longer. What the cache has no room for any more is taken back,
    and its tokens are computed anew when it goes on.
    """
    order = np.random.default_rng(0).permutation(len(lengths))
    waiting = [(prompt, float(length)) for length in np.asarray(lengths)[order]]
    running = np.empty((0, 2))  # tokens in the cache, tokens to come
    products = tp * gpu.matmul * gpu.decode_compute_efficiency
    compute, head = 2 * active_parameters(arch) / products, head_flops(arch, 1) / products
    in_experts = expert_share(arch)
    rate = gpu.memory * gpu.decode_memory_efficiency
    links = 2 * arch.layers * gpu.all_reduce_latency if tp > 1 else 0.0
    limit = np.inf if cache_tokens is None else cache_tokens
    seconds = 0.0
    while waiting or len(running):
        started = _admitted(waiting, concurrency - len(running), limit - running[:, 0].sum(), alone=not len(running))
        seconds += compute * sum(context for context, _ in started)
        running = np.concatenate([running, np.array(started).reshape(-1, 2)])
        fits = max(1, int(np.searchsorted(np.cumsum(running[:, 0]), limit, side="right")))
        waiting[:0] = [(context, left) for context, left in running[fits:]]
        running = running[:fits]
        batch = len(running)
        reading = (weight_bytes * _read(arch, in_experts, batch) + token_bytes * running[:, 0].sum()) / rate
        sending = batch * arch.hidden_size * 4 * arch.layers / (gpu.nvlink * gpu.link_efficiency) if tp > 1 else 0.0
        seconds += _STRIDE * (max(reading, (compute + head) * batch) + links + sending + gpu.decode_overhead)
        running = running + np.array([_STRIDE, -_STRIDE])
        running = running[running[:, 1] > 0]
    return seconds


def _admitted(waiting: list[tuple[float, float]], places: int, room: float, *, alone: bool) -> list[tuple[float, float]]:
    """Take from `waiting` what fits at its present length; a server that has nothing to do takes one whatever its length."""
    taken = 0
    while taken < min(places, len(waiting)) and (room >= waiting[taken][0] + _STRIDE or (alone and taken == 0)):
        room -= waiting[taken][0] + _STRIDE
        taken += 1
    started = waiting[:taken]
    del waiting[:taken]
    return started


def expert_share(arch: Architecture) -> float:
    """Part of a model's elements that experts hold; norms and biases are left out."""
    experts = arch.experts
    if experts is None:
        return 0.0
    of_all = len(arch.expert_layers) * 3 * arch.hidden_size * experts.intermediate_size
    others = active_parameters(arch) - experts.per_token * of_all
    embeddings = (1 if arch.tied_embeddings else 2) * arch.vocab_size * arch.hidden_size
    return experts.count * of_all / (experts.count * of_all + others + embeddings)


def _read(arch: Architecture, in_experts: float, batch: int) -> float:
    """Part of the weights that a step of `batch` tokens reads: all outside of experts, of experts those that at least one token
    has chosen. in_experts: `expert_share`."""
    if arch.experts is None:
        return 1.0
    return 1.0 - in_experts * (1.0 - arch.experts.per_token / arch.experts.count) ** batch
