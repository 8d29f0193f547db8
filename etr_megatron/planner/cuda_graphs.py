"""Bytes of a colocated server's CUDA graphs, by SGLang's own estimate.

Follows `handle_gpu_memory_settings` and `reserve_for_graph_mb` of SGLang 0.5.21 (srt/arg_groups/memory_hook.py), which choose
the number of graphs and reserve memory for them: 2 MiB per sequence of the largest captured decode batch, and 8 MiB per
captured prefill size or, with latent attention, 1.5 GiB for all of them. Data-parallel attention adds, for each of its ranks,
3 MiB per sequence, and 1.5 MiB more for batches of over 300. This memory is outside the pool of `mem_fraction`, and
stays allocated while the policy trains: only SGLANG_MEMORY_SAVER_CUDA_GRAPH would release it, but prefill graphs cannot be
captured with that (srt/model_executor/runner_backend/breakable_cuda_graph_backend.py).
"""

from __future__ import annotations

from itertools import chain, pairwise

from etr_megatron.config import SglangConfig

_MIB = 2**20
_DECODE, _PREFILL, _LATENT_PREFILL = 2 * _MIB, 8 * _MIB, 1536 * _MIB
_GATHERED, _GATHERED_LARGE, _LARGE_BATCH = 3 * _MIB, 9 * _MIB // 2, 300

_TIERS = ((20, 8, 8, 2048), (35, 48, 160, 4096), (60, 32, 160, 4096), (160, 256, 512, 8192))
"""For GPUs with less than the given GiB: sequences of the largest decode batch, the same from TP 4 on, and tokens of the
largest prefill."""
_LARGEST = (512, 512, 16384)

_MAX_BATCH = ("--cuda-graph-max-bs", "--cuda-graph-max-bs-decode")


def graph_bytes(sglang: SglangConfig, gpu_memory_gib: float, *, latent: bool = False) -> int:
    """Bytes on each of a server's GPUs. `sglang.arguments` may set smaller batches, or disable graphs. latent: whether the
    model has latent attention."""
    if "--disable-cuda-graph" in _named(sglang):
        return 0
    batch, prefill_tokens = _largest(sglang, gpu_memory_gib)
    prefill = _LATENT_PREFILL if latent else _PREFILL * len(_prefill_sizes(prefill_tokens))
    return _DECODE * batch + prefill + gathered_bytes(sglang, gpu_memory_gib)


def gathered_bytes(sglang: SglangConfig, gpu_memory_gib: float) -> int:
    """The part of `graph_bytes` that is due to data-parallel attention: a GPU has the tokens of all its ranks, padded."""
    if sglang.dp_attention == 1:
        return 0
    batch, _ = _largest(sglang, gpu_memory_gib)
    return sglang.dp_attention * batch * (_GATHERED if batch <= _LARGE_BATCH else _GATHERED_LARGE)


def _named(sglang: SglangConfig) -> dict[str, str]:
    """Every word of `sglang.arguments` -> the word after it."""
    words = [word for argument in sglang.arguments for word in argument.split("=", 1)]
    return dict(pairwise([*words, ""]))


def _largest(sglang: SglangConfig, gpu_memory_gib: float) -> tuple[int, int]:
    """Sequences of the largest decode batch, and tokens of the largest prefill, that are captured."""
    tier = next((tier[1:] for tier in _TIERS if gpu_memory_gib < tier[0]), _LARGEST)
    named, batch = _named(sglang), tier[0] if sglang.tp < 4 else tier[1]
    asked = [int(number) for option in _MAX_BATCH if (number := named.get(option, "")).isdigit()]
    return asked[-1] if asked else batch, tier[2]


def _prefill_sizes(most: int) -> list[int]:
    """The token counts for which prefill is captured (`generate_prefill_cuda_graph_batch_sizes`)."""
    steps = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256), (4608, most + 1, 512))
    return [size for size in chain.from_iterable(range(*step) for step in steps) if size <= most]
