"""The device of the GPU benchmarks: timing, memory, peak FLOPS, and which FP8 recipes it supports."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch

from etr_megatron.flops import bf16_peak

RECIPES = ("blockwise", "tensorwise", "delayed", "mxfp8")
"""Values of `fp8.recipe`."""


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory and capability of the device, and versions of the libraries in use; None if not installed."""
    found: dict[str, Any] = {"type": device.type}
    for name in ("triton", "transformer-engine", "flash-attn", "sglang"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "bf16_peak_flops": bf16_peak(properties.name),
        }
    return found


def recipes_left_out(device: torch.device) -> dict[str, str]:
    """FP8 recipes that cannot run on the device, and why; in Transformer Engine's words if it gives the reason."""
    if device.type != "cuda":
        return dict.fromkeys(RECIPES, "FP8 needs a GPU")
    try:
        from transformer_engine.pytorch.quantization import (
            check_fp8_block_scaling_support,
            check_fp8_support,
            check_mxfp8_support,
        )
    except ImportError as error:
        return dict.fromkeys(RECIPES, f"Transformer Engine cannot be imported: {error}")
    checks = {"blockwise": check_fp8_block_scaling_support, "mxfp8": check_mxfp8_support}
    answers = {recipe: checks.get(recipe, check_fp8_support)() for recipe in RECIPES}
    return {recipe: reason for recipe, (supported, reason) in answers.items() if not supported}


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one call on the device, between two CUDA events; on CPU, wall-clock time."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def time_round_robin(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call by name. Calls alternate, each round starts with another one, after `warm_up` calls of each."""
    for run in runs.values():
        for _ in range(warm_up):
            run()
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            seconds[name].append(seconds_of(runs[name], device))
    return seconds


def release_memory() -> None:
    """Return memory that torch's allocator caches to the device, for other processes."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes of torch's allocator during a call beyond what it held before; None on CPU, where it keeps no count."""
    if device.type != "cuda":
        run()
        return None
    release_memory()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
