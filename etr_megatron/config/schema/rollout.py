"""Sampling and the servers that do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of responses."""

    backend: Literal["embedded", "sglang"] = "embedded"
    """`embedded`: a transformers replica in every rank. `sglang`: servers, see `sglang.*`."""
    prompts_per_step: int = 16
    """Groups in a step."""
    samples_per_prompt: int = 8
    """Responses per group."""
    max_response_tokens: int = 256
    """Generation stops here with finish reason `length`."""
    temperature: float = 1.0
    """Of the sampling and of the policy's log-probs alike."""
    top_p: float = 1.0
    """Nucleus sampling; log-probs stay those of the full distribution."""
    top_k: int = 0
    """0 is off."""
    batch_samples: int = 64
    """Responses that the embedded engine decodes together; batches are cut before they are spread over ranks, so that
    results do not depend on the layout."""
    max_logprob_gap: float | None = None
    """Gate at the first step: largest mean gap between the engine's and the trainer's log-probs; null is 1e-4 in
    float32 and 5e-2 in bfloat16."""


@dataclass(frozen=True)
class SglangConfig:
    """Servers of `rollout.backend: sglang`."""

    urls: tuple[str, ...] = ()
    """Servers that run already (`http://host:port`) with the policy's model; none: the job starts its own."""
    servers: int = 1
    """Servers that the job starts, on rank 0's machine; they end with it."""
    tp: int = 1
    """Tensor parallel size of each server."""
    devices: tuple[str, ...] = ()
    """GPUs of the servers that the job starts, `tp` each in order, apart from the ranks' own; none on CPU."""
    python: str = ".venv-sglang/bin/python"
    """Interpreter of the environment that has SGLang; `bash tools/setup_env.sh --sglang` makes this one."""
    launch: tuple[str, ...] = ("-m", "sglang.launch_server")
    """What that interpreter runs."""
    arguments: tuple[str, ...] = ()
    """SGLang's own further arguments, such as `--mem-fraction-static,0.8`."""
    host: str = "127.0.0.1"
    """Address of rank 0's machine as the servers see it; weights are sent from there."""
    concurrency: int = 128
    """Requests under way per server."""
    bucket_mib: int = 512
    """Size of the pieces that a weight sync travels in."""
    startup_timeout_s: float = 900.0
    """Deadline for a server to answer after its start."""
    request_timeout_s: float = 1800.0
    """Deadline of one response."""
    update_timeout_s: float = 300.0
    """Deadline of every request and wait of a weight sync."""
