"""What a GPU and its connections can do, with sources, and which part of it is assumed to be reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Rates in FLOP/s and bytes/s, times in seconds. Fields below the line are assumptions, of which none is fitted to a run.

    matmul, memory, nvlink, network: peaks; nvlink and network in one direction, of a GPU.
    """

    name: str
    matmul: float
    memory: float
    nvlink: float
    network: float
    # ------------------------------------------------------------------
    dense_efficiency: float = 0.41
    expert_efficiency: float = 0.25
    fp8_speedup: float = 1.3
    decode_compute_efficiency: float = 0.6
    decode_memory_efficiency: float = 0.8
    link_efficiency: float = 0.8
    all_reduce_latency: float = 15e-6
    decode_overhead: float = 2e-3
    host_rate: float = 4e9
    http_rate: float = 4e7
    disk_rate: float = 2e9
    pause: float = 1.0


H100 = Hardware(name="H100 SXM", matmul=989.4e12, memory=3.35e12, nvlink=450e9, network=50e9)
"""NVIDIA H100 datasheet, SXM5, dense BF16 and HBM3; NVLink 4 is 900 GB/s in both directions; a DGX H100 has one 400 Gb/s NDR
adapter a GPU."""

ASSUMED = {
    "dense_efficiency": "part of the peak that training reaches, pipeline bubble apart: Megatron-LM's README reports an MFU of "
    "41% to 48% on H100; the lower end, as RL's microbatches are small",
    "expert_efficiency": "the same with experts: MoE Parallel Folding (arXiv 2504.14960) reports 39% for 57B-A14B; "
    "experts of 30B-A3B are finer",
    "fp8_speedup": "of training's matrix products by FP8",
    "decode_compute_efficiency": "of matrix products of a decoding batch",
    "decode_memory_efficiency": "of the memory's rate, for weights and KV cache",
    "link_efficiency": "of NVLink and network",
    "all_reduce_latency": "of a small all-reduce on NVLink; two a layer and decoded token",
    "decode_overhead": "of a decoding step outside of the model: scheduling, sampling",
    "host_rate": "of copies between a GPU and the machine's memory that is not pinned",
    "http_rate": "of weights as base64 in HTTP requests, copies included: 0.57 GB, which are 0.76 GB of text, took an SGLang "
    "0.5.17 beside an H100 19 s, gathering included",
    "disk_rate": "of the shared filesystem, for writing and reading",
    "pause": "of every weight sync: pause, flush, version handshake",
}
"""What the assumptions mean."""
