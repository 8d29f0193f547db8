"""Compare the planner with published runs. No assumption in `hardware` was fitted to these rows.

The rows are from NeMo RL (https://github.com/NVIDIA-NeMo/RL), docs/about/performance-summary.md; the recipes are in its
examples/configs/recipes/llm/performance.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from etr_megatron.config import load_config
from etr_megatron.planner.plan import Plan, make_plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

_NEMO = (
    "rollout.prompts_per_step=64",
    "rollout.samples_per_prompt=32",
    "data.max_prompt_tokens=256",
    "rollout.max_response_tokens=3840",
    "train.minibatches=4",
    "train.tokens_per_microbatch=4096",
    "train.recompute=none",
    "train.grads_dtype=bfloat16",
    "objective.kl_coef=0.01",
    "sglang.concurrency=256",
)
"""Common settings of the recipes: 2,048 samples of at most 4,096 tokens, 512 per optimizer step, packed; a reference model."""


@dataclass(frozen=True)
class Published:
    """A row of the table. total, response: mean tokens of a sample and of its response. step: seconds.

    total follows from the row: tokens/s/GPU x seconds x GPUs / samples. response is the table's average; it is unknown for
    v0.5, where v0.4's is used.
    """

    name: str
    config: str
    gpus: int
    response: float
    tokens_per_second_per_gpu: float
    step: float
    overrides: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Mean tokens of a sample."""
        return self.tokens_per_second_per_gpu * self.step * self.gpus / 2048

    def estimate(self) -> Plan:
        """The planner's estimate for this row."""
        config = load_config(CONFIGS / self.config, [*_NEMO, *self.overrides])
        return make_plan(config, self.gpus, prompt=max(1.0, self.total - self.response), response=self.response)


ROWS = (
    Published("v0.5 Qwen3-32B, sync", "qwen3_32b_32gpu.yaml", 32, 3206, 571, 376, ("sglang.mem_fraction=0.6",)),
    Published("v0.5 Qwen3-32B, one step off", "qwen3_32b_64gpu_async.yaml", 64, 3207, 538, 200, ("sglang.mem_fraction=0.8",)),
    Published("v0.4 Qwen3-32B, sync", "qwen3_32b_32gpu.yaml", 32, 3206, 540, 393, ("sglang.mem_fraction=0.6",)),
    Published("v0.4 Qwen3-32B, one step off", "qwen3_32b_64gpu_async.yaml", 64, 3207, 494, 215, ("sglang.mem_fraction=0.8",)),
    Published(
        "v0.4 Qwen3-30B-A3B, sync", "qwen3_30b_a3b_32gpu.yaml", 32, 3154, 925, 225, ("sglang.mem_fraction=0.6", "parallel.pp=1")
    ),
    Published(
        "v0.4 Llama-3.1-8B, sync",
        "llama3.1_8b_8gpu.yaml",
        16,
        1060,
        1562,
        97.7,
        (
            *("parallel.tp=1", "parallel.pp=2", "parallel.sequence_parallel=false"),
            *("sglang.nodes=every", "sglang.mem_fraction=0.6"),
        ),
    ),
)
"""Rows on H100 for models with a shipped config."""

SYNC_32B = 14.2
"""Reported seconds of a weight sync of Qwen2.5-32B; the machines and the transport are unknown."""


def sync_of_32b() -> dict[str, float]:
    """Estimated seconds of a sync of Qwen2.5-32B from 32 ranks to 8 TP4 servers with each transport."""
    found = {}
    for transport in ("sharded", "broadcast", "disk", "tensor"):
        overrides = [f"sglang.sync={transport}", "sglang.placement=dedicated", "sglang.servers=1"]
        config = load_config(CONFIGS / "qwen2.5_32b_32gpu.yaml", overrides)
        found[transport] = make_plan(config, 64).time.sync
    return found


def table() -> str:
    """Published and estimated values as a Markdown table."""
    lines = [
        "| run | tokens/s/GPU | s a step | estimate | s a step | error of the step | generate + log-probs + train + sync, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        time = row.estimate().time
        parts = " + ".join(f"{part:.0f}" for part in (time.generate, time.logprobs, time.train, time.sync))
        lines.append(
            f"| {row.name}, {row.gpus} GPUs | {row.tokens_per_second_per_gpu:,.0f} | {row.step:.0f} | "
            f"{time.tokens_per_second_per_gpu:,.0f} | {time.step:.0f} | {time.step / row.step - 1:+.0%} | {parts} |"
        )
    return "\n".join(lines)
