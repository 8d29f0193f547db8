"""CUDA or CPU: the device, the collective backend, and setup that megatron.core needs before it is imported.

torch is imported on first use: the processes of `workers` import this package and do not need torch.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def uses_cuda() -> bool:
    """Whether this process trains on a GPU; `ETR_PLATFORM=cpu|cuda` (set from `run.platform`) overrides detection."""
    import torch

    wanted = os.environ.get("ETR_PLATFORM", "auto")
    return torch.cuda.is_available() if wanted == "auto" else wanted == "cuda"


def device() -> torch.device:
    """The device of this rank."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")


def to_device(values: torch.Tensor) -> torch.Tensor:
    """The CPU tensor `values` on the device of this rank. The host does not wait for the GPU, as it would for a copy from
    memory that is not pinned."""
    return values.pin_memory().to(device(), non_blocking=True) if uses_cuda() else values


def backend() -> str:
    """The torch.distributed backend of the policy's groups."""
    return "nccl" if uses_cuda() else "gloo"


def release_cached_memory() -> None:
    """Release the GPU memory in torch's cache, so that other processes can allocate it."""
    import torch

    if uses_cuda():
        torch.cuda.empty_cache()


def take_memory_peaks() -> dict[str, float]:
    """Peak GPU memory since the last call, in GiB: `memory_allocated_gib` is that of tensors, `memory_reserved_gib` includes
    torch's cache. Empty on CPU."""
    import torch

    if not uses_cuda():
        return {}
    found = {
        "memory_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "memory_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }
    torch.cuda.reset_peak_memory_stats()
    return found


def _is_blackwell_or_later() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0)


_prepared = False


def prepare_megatron() -> None:
    """Make `import megatron.core` safe on this platform. Idempotent; must come before the first such import.

    Raises RuntimeError if megatron.core was already imported on a machine without CUDA.
    """
    global _prepared
    if _prepared:
        return
    # Transformer Engine reads this variable when megatron.core imports TE. Without it, scales of FP8 blocks are powers of two,
    # unlike those of the rollout servers. From Blackwell on, TE computes with MXFP8, whose scales are always powers of two.
    os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0" if _is_blackwell_or_later() else "1")
    # megatron-core 0.16.1 uses names that torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
    if not uses_cuda():
        from etr_megatron.platform import cpu_shim

        # megatron-core warns in many modules about missing TE, apex and CUDA settings.
        warnings.filterwarnings("ignore", module=r"megatron\.core")
        # It imports torch's builder of extensions. With a CUDA build of torch, each process would report a CUDA toolkit that is
        # installed without a GPU, as on a login node.
        logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.getMessage())
        cpu_shim.install()
    from etr_megatron.platform import megatron_fixes

    megatron_fixes.apply()
    _prepared = True


__all__ = ["backend", "device", "prepare_megatron", "release_cached_memory", "take_memory_peaks", "to_device", "uses_cuda"]
