"""Bytes of a colocated server's CUDA graphs, by SGLang's own estimate.

Follows `handle_gpu_memory_settings` and `reserve_for_graph_mb` of SGLang 0.5.21 (srt/arg_groups/memory_hook.py), which choose
the number of graphs and reserve memory for them: 2 MiB per sequence of the largest captured decode batch, and 8 MiB per
captured prefill size or, with latent attention, 1.5 GiB for all of them. This memory is outside the pool of `mem_fraction`, and
stays allocated while the policy trains: only SGLANG_MEMORY_SAVER_CUDA_GRAPH would release it, but prefill graphs cannot be
captured with that (srt/model_executor/runner_backend/breakable_cuda_graph_backend.py).
"""

from __future__ import annotations

from itertools import chain, pairwise

from etr_megatron.config import SglangConfig

_MIB = 2**20
_DECODE, _PREFILL, _LATENT_PREFILL = 2 * _MIB, 8 * _MIB, 1536 * _MIB

_TIERS = ((20, 8, 8, 2048), (35, 48, 160, 4096), (60, 32, 160, 4096), (160, 256, 512, 8192))
"""For GPUs with less than the given GiB: sequences of the largest decode batch, the same from TP 4 on, and tokens of the
largest prefill."""
_LARGEST = (512, 512, 16384)

_MAX_BATCH = ("--cuda-graph-max-bs", "--cuda-graph-max-bs-decode")


def graph_bytes(sglang: SglangConfig, gpu_memory_gib: float, *, latent: bool = False) -> int:
    """Bytes on each of a server's GPUs. `sglang.arguments` may set smaller batches, or disable graphs. latent: whether the
    model has latent attention."""
    words = [word for argument in sglang.arguments for word in argument.split("=", 1)]
    named = dict(pairwise([*words, ""]))
    if "--disable-cuda-graph" in named:
        return 0
    tier = next((tier[1:] for tier in _TIERS if gpu_memory_gib < tier[0]), _LARGEST)
    batch = tier[0] if sglang.tp < 4 else tier[1]
    asked = [int(number) for option in _MAX_BATCH if (number := named.get(option, "")).isdigit()]
    prefill = _LATENT_PREFILL if latent else _PREFILL * len(_prefill_sizes(tier[2]))
    return _DECODE * (asked[-1] if asked else batch) + prefill


def _prefill_sizes(most: int) -> list[int]:
    """The token counts for which prefill is captured (`generate_prefill_cuda_graph_batch_sizes`)."""
    steps = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256), (4608, most + 1, 512))
    return [size for size in chain.from_iterable(range(*step) for step in steps) if size <= most]
