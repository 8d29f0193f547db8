"""`rollouts/step_000012.jsonl`: a step's rollouts for people to read, one sample per line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from etr_megatron.platform.files import disk_errors, entries, write_atomically
from etr_megatron.types import Group, Sample

_STEP_FILE = re.compile(r"step_(\d+)\.jsonl")


def rollouts_path(directory: Path, step: int) -> Path:
    """The file of a step; names sort in step order."""
    return directory / f"step_{step:06d}.jsonl"


def save_rollouts(directory: Path, step: int, groups: Iterable[Group]) -> Path:
    """Write the samples of `groups` to the step's file, replacing an existing one; raises `UserError` on a full disk."""
    lines = [json.dumps(_readable(step, group, sample), ensure_ascii=False) for group in groups for sample in group.samples]
    path = rollouts_path(directory, step)
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    return path


def remove_rollouts_after(directory: Path, step: int) -> int:
    """Remove the files of steps after `step` and return how many there were."""
    with disk_errors(directory):
        found = entries(directory, "step_*.jsonl")
        later = [path for path in found if (match := _STEP_FILE.fullmatch(path.name)) and int(match[1]) > step]
        for path in later:
            path.unlink()
    return len(later)


def _readable(step: int, group: Group, sample: Sample) -> dict[str, Any]:
    logprobs = sample.select_generated(sample.rollout_logprobs)
    replies = {
        "turns": sample.turns,
        "reply_tokens": len(sample.response_ids) - sample.num_generated,
        "messages": sample.messages,
    }
    status = sample.environment_status
    return {
        "step": step,
        "group": group.id,
        "problem": group.problem.id,
        "sample": sample.index,
        "prompt": group.problem.prompt,
        "response": sample.text,
        "answer": group.problem.answer,
        "reward": sample.reward,
        "status": sample.reward_status,
        **({"parts": sample.reward_parts} if sample.reward_parts else {}),
        **(replies if sample.messages else {}),
        **({"environment": status} if status is not None else {}),
        "finish_reason": sample.finish_reason,
        "weight_version": sample.weight_version,
        "tokens": len(sample.response_ids),
        "mean_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
    }
