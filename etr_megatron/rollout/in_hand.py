"""A group while its responses are being drawn, and what may happen to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from etr_megatron.rollout.engine import Drawn
from etr_megatron.rollout.record import group_from_json, group_to_json
from etr_megatron.types import Group, Problem, Sample


@dataclass
class InHand:
    """step: for which it was asked; it seeds the sampling. Samples whose finish reason is "abort" are not finished.

    is_left_out: its rewards are all equal, and that rules it out. is_redone: some of its tokens had become too old.
    """

    group: Group
    step: int
    is_left_out: bool = False
    is_redone: bool = False

    @classmethod
    def new(cls, problem: Problem, *, step: int, samples: int, weight_version: int) -> InHand:
        """Nothing drawn yet."""
        empty = [Sample(index, [], [], "abort", weight_version) for index in range(samples)]
        return cls(Group(f"{problem.id}@{step}", problem, empty), step)

    @property
    def missing(self) -> list[Sample]:
        """Samples that are not finished."""
        return [sample for sample in self.group.samples if sample.finish_reason == "abort"]

    @property
    def is_ready(self) -> bool:
        """Whether it can be trained on: complete, rewarded, not left out."""
        return not self.is_left_out and all(sample.reward is not None for sample in self.group.samples)

    @property
    def oldest_version(self) -> int:
        """Of all its tokens."""
        return min(oldest_version(sample) for sample in self.group.samples)

    def redo_older_than(self, version: int) -> bool:
        """Empty the samples that have a token of weights before `version`; whether there were any."""
        old = [sample for sample in self.group.samples if sample.response_ids and oldest_version(sample) < version]
        for sample in old:
            self.group.samples[sample.index] = Sample(sample.index, [], [], "abort", version)
        if old:
            self.is_redone, self.is_left_out = True, False
        return bool(old)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        flags = {"step": self.step, "is_left_out": self.is_left_out, "is_redone": self.is_redone}
        return {"group": group_to_json(self.group), **flags}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> InHand:
        """What `to_json` wrote."""
        return cls(**{**found, "group": group_from_json(found["group"])})


def oldest_version(sample: Sample) -> int:
    """Of the weights that any of its tokens was drawn from."""
    return min(sample.weight_versions, default=sample.weight_version)


def extend(sample: Sample, drawn: Drawn) -> None:
    """Add what was drawn (in place; the caller owns the sample), tokens with their log-probs and versions."""
    versions = [*sample.token_versions(), *[drawn.weight_version] * len(drawn.ids)]
    sample.response_ids += drawn.ids
    sample.rollout_logprobs += drawn.logprobs
    sample.finish_reason = drawn.finish_reason
    sample.weight_version = versions[-1] if versions else drawn.weight_version
    sample.weight_versions = versions if len(set(versions)) > 1 else []
