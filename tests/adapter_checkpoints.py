"""Checkpoints of low-rank adapters as a run leaves them, with random values, and what they stand for, in float64."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from etr_megatron.weights import LowRank, read_architecture


def write_adapters(step: Path, model: str | Path, low_rank: LowRank, dtype: str | None = "float32") -> dict[str, Tensor]:
    """Write a run's step directory and, with a `dtype`, the run's config.yaml; returns A and B by stored name."""
    generator = torch.Generator().manual_seed(7)
    stored = {}
    for _, adapters in low_rank.adapted(read_architecture(model)):
        for adapter in adapters:
            a, b = adapter.stored
            stored[a] = torch.randn(adapter.rank, adapter.columns, generator=generator) / 5
            stored[b] = torch.randn(adapter.rows, adapter.rank, generator=generator) / 5
    step.mkdir(parents=True)
    optimizer = {f"optimizer.state.exp_avg.{name}": torch.ones(3) for name in stored}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({**stored, **optimizer}, checkpoint_id=step, no_dist=True)
    (step / "lora.json").write_text(json.dumps(low_rank.as_json()))
    if dtype is not None:
        (step.parent.parent / "config.yaml").write_text(f"model: {{path: {model}, dtype: {dtype}}}")
    return stored


def merged(base: dict[str, Tensor], stored: dict[str, Tensor], low_rank: LowRank) -> dict[str, Tensor]:
    """float64: every tensor of the base, plus alpha / rank * B A where there is an adapter."""
    found = {name: tensor.double() for name, tensor in base.items()}
    for name, a in stored.items():
        if name.endswith(".A"):
            module = name.removeprefix("lora.").removesuffix(".A")
            b = stored[f"lora.{module}.B"]
            found[f"{module}.weight"] += low_rank.alpha / len(a) * (b.double() @ a.double())
    return found


def rounded(exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `merged` is in bfloat16: each element away from zero if its lower 16 bits exceed the threshold of its place."""
    found = {}
    for name, tensor in exact.items():
        digest = hashlib.sha256(name.removesuffix(".weight").encode()).digest()
        if tensor.dim() == 1:
            found[name] = tensor.bfloat16()
            continue
        rows, columns = (np.arange(count, dtype=np.float64) for count in tensor.shape)
        places = np.float32(rows * 0.7548776662466927 % 1)[:, None] + np.float32(
            (columns * 0.5698402909980532 + int.from_bytes(digest[:4], "big") / 2**32) % 1
        )
        bits = tensor.float().numpy().view(np.int32).astype(np.int64)
        bits += (places % 1 * 65536).astype(np.int64)
        found[name] = torch.from_numpy((bits >> 16).astype(np.int16)).view(torch.bfloat16)
    return found
