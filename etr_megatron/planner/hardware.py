"""What a GPU and its connections can do, with sources, and which part of it is assumed to be reached (docs/planner.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Rates in FLOP/s and bytes/s, times in seconds.

    matmul, memory, nvlink, network: peaks; nvlink and network in one direction, of a GPU. The fields below are assumptions, of
    which none is fitted to a run.
    """

    name: str
    matmul: float
    memory: float
    nvlink: float
    network: float
    dense_efficiency: float = 0.41
    """Part of the peak that training reaches, pipeline bubble apart: Megatron-LM's README reports an MFU of 41% to 48% on H100;
    the lower end, as RL's microbatches are small."""
    expert_efficiency: float = 0.25
    """The same with experts: MoE Parallel Folding (arXiv 2504.14960) reports 39% for 57B-A14B; experts of 30B-A3B are finer."""
    fp8_speedup: float = 1.3
    """Of training's matrix products by FP8."""
    decode_compute_efficiency: float = 0.6
    """Of matrix products of a decoding batch."""
    decode_memory_efficiency: float = 0.8
    """Of the memory's rate, for weights and KV cache."""
    link_efficiency: float = 0.8
    """Of NVLink and network."""
    all_reduce_latency: float = 15e-6
    """Of a small all-reduce on NVLink; two a layer and decoded token."""
    decode_overhead: float = 2e-3
    """Of a decoding step outside of the model: scheduling, sampling."""
    host_rate: float = 4e9
    """Of copies between a GPU and the machine's memory that is not pinned."""
    http_rate: float = 4e7
    """Of the text, base64, that weights are in HTTP requests, copies included: 0.57 GB, which are 0.76 GB of text, took an
    SGLang 0.5.17 beside an H100 19 s, gathering included."""
    disk_rate: float = 2e9
    """Of the shared filesystem, for writing and reading."""
    pause: float = 1.0
    """Of every weight sync: pause, flush, version handshake."""


H100 = Hardware(name="H100 SXM", matmul=989.4e12, memory=3.35e12, nvlink=450e9, network=50e9)
"""NVIDIA H100 datasheet, SXM5, dense BF16 and HBM3; NVLink 4 is 900 GB/s in both directions; a DGX H100 has one 400 Gb/s NDR
adapter a GPU."""
