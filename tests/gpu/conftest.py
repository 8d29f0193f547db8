"""Tests on one GPU: `python -m pytest tests/gpu`. Without a CUDA device they are skipped.

ETR_GPU_TESTS_DRY_RUN=1 runs them on CPU instead, without FP8, Transformer Engine and compiled Triton kernels: it shows that the
tests themselves work.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

DRY_RUN = os.environ.get("ETR_GPU_TESTS_DRY_RUN") == "1"
DEVICE = torch.device("cpu" if DRY_RUN or not torch.cuda.is_available() else "cuda")


def pytest_collection_modifyitems(items):
    if DRY_RUN or torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """torch.distributed's world of this one process, over NCCL on a GPU."""
    os.environ["ETR_PLATFORM"] = DEVICE.type
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from etr_megatron import platform

    if not torch.distributed.is_initialized():
        if DEVICE.type == "cuda":
            torch.cuda.set_device(0)
        store = f"file://{tmp_path_factory.mktemp('world') / 'store'}"
        torch.distributed.init_process_group(platform.backend(), init_method=store, rank=0, world_size=1)
    return platform.backend()
