"""Part `step` of the GPU benchmark: whole ETR steps, with an SGLang server that shares the GPU with the policy.

It runs etr_megatron (`python -m etr_megatron.launch`) on generated arithmetic with a random Qwen3 of 0.3B parameters:
`sglang.placement=colocated`, other settings from `SETTINGS` and `--set`. It measures where a step's time goes; the policy
learns nothing. The first step compiles and captures, and is left out of the medians.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from etr_megatron.config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/cpu_tiny.yaml"

SETTINGS = [
    "run.steps=4",
    "eval.every=0",
    "checkpoint.every=0",
    "rollout.backend=sglang",
    "rollout.prompts_per_step=16",
    "rollout.samples_per_prompt=16",
    "rollout.max_response_tokens=256",
    "sglang.placement=colocated",
    "sglang.mem_fraction=0.3",
    "sglang.startup_timeout_s=300",  # it takes one; the GPU may be lent for minutes
    "sglang.update_timeout_s=120",
    "parallel.tp=1",
    "train.epochs=1",
    "train.lr_warmup_updates=0",
    "train.minibatches=4",
    "train.tokens_per_microbatch=8192",
    "tiny.hidden_size=1024",
    "tiny.layers=16",
    "tiny.heads=16",
    "tiny.head_dim=128",
    "tiny.intermediate_size=3072",
    "tiny.warm_start_steps=1",
    "tiny.warm_start_batch=2",
]
"""Overrides of `configs/cpu_tiny.yaml` for the job."""

QUICK = ["run.steps=2", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=3", "rollout.max_response_tokens=9"]
QUICK += ["tiny.hidden_size=32", "tiny.layers=2", "tiny.heads=2", "tiny.head_dim=24", "tiny.intermediate_size=80"]

SHOWN = ("time_step", "time_rollout", "time_reward", "time_train", "time_sync", "tokens_per_s", "logprob_gap_mean")


def measure(options: Any, work: Path) -> dict[str, Any]:
    """The steps' times, or why they were left out. options: command line. work: an empty directory."""
    folders = [f"run.dir={work}", "run.name=step", f"tiny.cache_dir={work / 'cache'}", f"run.platform={options.device}"]
    chosen = [*SETTINGS, *(QUICK if options.quick else []), f"sglang.python={options.sglang_python}", *options.set]
    config = load_config(ROOT / CONFIG, [*chosen, *folders])
    found: dict[str, Any] = {"config": CONFIG, "settings": chosen, "left_out": None}
    if config.rollout.backend == "sglang" and not imports_sglang(config.sglang.python):
        return {**found, "left_out": f"{config.sglang.python} cannot import sglang"}
    command = [sys.executable, "-m", "etr_megatron.launch", "--nproc", "1", CONFIG, *chosen, *folders]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        return {**found, "failed": f"the run ended with exit code {done.returncode}"}
    rows = [json.loads(line) for line in (work / "step" / "metrics.jsonl").read_text().splitlines()]
    steps = [{key: row[key] for key in ("step", *SHOWN)} for row in rows]
    found["median"] = {key: statistics.median(step[key] for step in steps[1:]) for key in SHOWN}
    return {**found, "steps": steps}


def imports_sglang(python: str) -> bool:
    """Whether an interpreter can import SGLang."""
    try:
        return not subprocess.run([python, "-c", "import sglang"], cwd=ROOT, capture_output=True, timeout=300).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def text(found: dict[str, Any]) -> str:
    """The measurements as one line."""
    if found["left_out"] or "failed" in found:
        return f"step: left out, {found['left_out']}" if found["left_out"] else f"step: failed, {found['failed']}"
    return "step, medians: " + ", ".join(f"{key} {value:.4g}" for key, value in found["median"].items())
