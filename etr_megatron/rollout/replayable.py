"""Checks, before the first step, that a recorded run can be replayed; a damaged step would otherwise surface hours later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etr_megatron.config import Config
from etr_megatron.errors import UserError
from etr_megatron.rollout.record import glance_at_record, read_record, record_path, recorded_steps, what_there_is

READ_BYTES = 128 * 2**20
"""So many bytes of a record, from its first step on, are read in full, which takes two seconds. Of later files only the
beginning and the end are checked; they are read in full when the run reaches them. With long responses a step has 100 MB."""

TOLD = 3
"""Number of damaged steps that are reported individually."""


def survey(folder: Path, steps: int, config: Config) -> list[str]:
    """Reasons why steps 1 to `steps` of `folder` cannot be replayed under `config`, one sentence each."""
    there = recorded_steps(folder)
    if not there:
        return [what_there_is(folder, 1)]
    found, damaged, left, misfit = [], [], READ_BYTES, None
    if missing := sorted(set(range(1, steps + 1)) - set(there)):
        found.append(
            f"{folder} has {len(there)} recorded steps, but not step {missing[0]}; lower run.steps, or give a run that "
            "recorded all of them (with rollout.record=true)"
        )
    for step in (step for step in there if 1 <= step <= steps):
        try:
            if left <= 0:
                glance_at_record(folder, step)
                continue
            left -= record_path(folder, step).stat().st_size
            groups, _ = read_record(folder, step)
            misfit = misfit or misfit_of(folder, step, groups, config)
        except UserError as error:
            damaged.append(str(error))
    more = [f"{folder} has {len(damaged) - TOLD} more damaged steps"] if len(damaged) > TOLD else []
    return [*found, *([misfit] if misfit else []), *damaged[:TOLD], *more]


def misfit_of(folder: Path, step: int, groups: Sequence[dict[str, Any]], config: Config) -> str | None:
    """A sentence that says how a step's groups do not match `config`; None if they match. Compares the number of groups, the
    samples per group, the range of rewards and the presence of chosen experts."""
    prompts, samples = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
    odd = next((size for group in groups if (size := len(group["samples"])) != samples), None)
    has, settings = [], []
    if len(groups) != prompts:
        has.append(f"{len(groups)} groups")
        settings.append(f"rollout.prompts_per_step={len(groups)}")
    if odd is not None:
        has.append(f"of {odd} samples" if has else f"groups of {odd} samples")
        settings.append(f"rollout.samples_per_prompt={odd}")
    if settings:
        return f"step {step} in {folder} has {' '.join(has)}; set {' and '.join(settings)} to replay it"
    low, high = config.reward.range_min, config.reward.range_max
    rewards = (sample["reward"] for group in groups for sample in group["samples"])
    outside = next((reward for reward in rewards if not low <= reward <= high), None)
    if outside is not None:
        return (
            f"step {step} in {folder} has a reward of {outside}, outside of reward.range_min = {low} to reward.range_max = "
            f"{high}; set both to the values of the recorded run"
        )
    if config.train.routing_replay and not any(sample.get("routing") for group in groups for sample in group["samples"]):
        return f"step {step} in {folder} does not say which experts were chosen; set train.routing_replay=false to replay it"
    return None
