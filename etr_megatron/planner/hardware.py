"""Peak rates of a GPU and its links, with sources, and the assumed achievable fractions (docs/planner.md)."""

from __future__ import annotations

from dataclasses import dataclass

from etr_megatron.flops import BF16_PEAK


@dataclass(frozen=True)
class Hardware:
    """Rates in FLOP/s and bytes/s, times in seconds.

    gib: size of its memory. matmul, matmul_fp32, memory, nvlink, network: peaks; matmul in BF16, matmul_fp32 without tensor
    cores, nvlink and network in one direction. fp8, mxfp8: whether its tensor cores have FP8, and FP8 with a scale for 32
    values. The fields below are assumptions: the same for every GPU, none of them fitted to a run.
    """

    name: str
    gib: float
    matmul: float
    matmul_fp32: float
    memory: float
    nvlink: float
    network: float
    fp8: bool = True
    mxfp8: bool = False
    dense_efficiency: float = 0.41
    """Fraction of the peak that training reaches without the pipeline bubble: Megatron-LM's README reports an MFU of 41% to 48%
    on H100; this is the lower end, because RL's microbatches are small."""
    expert_efficiency: float = 0.25
    """The same for MoE: MoE Parallel Folding (arXiv 2504.14960) reports 39% for 57B-A14B; 30B-A3B has smaller experts."""
    fp8_speedup: float = 1.3
    """Speedup of training's GEMMs with FP8."""
    decode_compute_efficiency: float = 0.6
    """Achieved fraction of matmul for the GEMMs of a decode batch, and of matmul_fp32 for the products of adapters."""
    decode_memory_efficiency: float = 0.8
    """Achieved fraction of memory bandwidth for weights and KV cache, and for the copies of adapted weights."""
    link_efficiency: float = 0.8
    """Achieved fraction of NVLink and network bandwidth."""
    all_reduce_latency: float = 15e-6
    """Latency of a small all-reduce on NVLink; there are two per layer and decode step."""
    network_all_reduce_latency: float = 40e-6
    """The same across nodes."""
    decode_overhead: float = 2e-3
    """Overhead of a decode step outside the model: scheduling, sampling."""
    host_rate: float = 4e9
    """Rate of copies between a GPU and unpinned host memory."""
    pinned_rate: float = 2e10
    """Rate of copies from pinned host memory while all GPUs of a node copy: below the 32 GB/s of a PCIe 4.0 x16 link."""
    http_rate: float = 4e7
    """Rate of weights as base64 text in HTTP requests, including copies: 0.57 GB (0.76 GB as text) took 19 s, including
    gathering, with SGLang 0.5.17 next to an H100."""
    disk_rate: float = 2e9
    """Rate of the shared file system, for writing and for reading."""
    pause: float = 1.0
    """Fixed cost of a weight sync: pause, flush, version handshake."""


A100 = Hardware(
    name="A100 SXM",
    gib=80,
    matmul=BF16_PEAK["A100"],
    matmul_fp32=19.5e12,
    memory=2.039e12,
    nvlink=300e9,
    network=25e9,
    fp8=False,
)
"""NVIDIA A100 datasheet, SXM4 with 80 GB; NVLink 3 is 600 GB/s for both directions together; a DGX A100 has one 200 Gb/s HDR
adapter per GPU."""
H100 = Hardware(
    name="H100 SXM",
    gib=80,
    matmul=BF16_PEAK["H100"],
    matmul_fp32=67e12,
    memory=3.35e12,
    nvlink=450e9,
    network=50e9,
)
"""NVIDIA H100 datasheet, SXM5, dense BF16 and HBM3; NVLink 4 is 900 GB/s for both directions together; a DGX H100 has one 400
Gb/s NDR adapter per GPU."""
H200 = Hardware(
    name="H200 SXM", gib=141, matmul=BF16_PEAK["H200"], matmul_fp32=67e12, memory=4.8e12, nvlink=450e9, network=50e9
)
"""NVIDIA H200 datasheet, SXM: an H100 with 141 GB of HBM3e."""
B200 = Hardware(
    name="B200",
    gib=180,
    matmul=BF16_PEAK["B200"],
    matmul_fp32=75e12,
    memory=8e12,
    nvlink=900e9,
    network=50e9,
    mxfp8=True,
)
"""NVIDIA DGX B200 datasheet: 180 GB and 64 TB/s of HBM3e for 8 GPUs; NVLink 5 is 1.8 TB/s for both directions together; one 400
Gb/s adapter per GPU. FP32 without tensor cores as NVIDIA states it for HGX B200."""

GPUS = {"a100": A100, "h100": H100, "h200": H200, "b200": B200}
"""GPUs by their name for `--gpu`. `gib` is the datasheet's number of GB; drivers report about this number of GiB, within 2%."""
