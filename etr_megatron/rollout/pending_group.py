"""A pending group: appending tokens to its samples, redrawing old samples, and checkpointing."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etr_megatron.rollout.engine import GenerationOutput, Place
from etr_megatron.rollout.record import group_from_json, group_to_json
from etr_megatron.types import Group, Problem, Sample

_COLUMNS = {
    "response_ids": np.int32,
    "rollout_logprobs": np.float64,
    "weight_versions": np.int32,
    "routing": np.uint8,
    "text": np.uint8,
    "loss_mask": np.uint8,
}
"""Sample fields that a checkpoint stores as columns: one tensor per field, for all samples. Log-probs are exact; texts are
UTF-8."""


@dataclass
class PendingGroup:
    """A pending group. Its samples with finish reason "abort" or "turn" are unfinished.

    step: the step it was requested for, which seeds the sampling. is_left_out: excluded, because all its rewards are equal.
    is_redone: some of its samples were emptied, because their tokens had become too old. places: index of a sample -> where
    its last turn was generated since the last weight sync, and is cached.
    """

    group: Group
    step: int
    is_left_out: bool = False
    is_redone: bool = False
    places: dict[int, Place | None] = field(default_factory=dict)

    @classmethod
    def new(cls, problem: Problem, *, step: int, samples: int, weight_version: int) -> PendingGroup:
        """A group with nothing generated yet."""
        empty = [_nothing_drawn(index, weight_version) for index in range(samples)]
        return cls(Group(f"{problem.id}@{step}", problem, empty), step)

    @property
    def missing(self) -> list[Sample]:
        """Samples that are not finished."""
        return [sample for sample in self.group.samples if not sample.has_ended]

    @property
    def is_ready(self) -> bool:
        """Whether it can be trained on: complete, rewarded, not left out."""
        return not self.is_left_out and self.is_rewarded

    @property
    def is_rewarded(self) -> bool:
        """Whether it is complete and rewarded."""
        return all(sample.reward is not None for sample in self.group.samples)

    @property
    def oldest_version(self) -> int:
        """Oldest weight version of all its tokens."""
        return min(oldest_version(sample) for sample in self.group.samples)

    def redo_older_than(self, version: int) -> bool:
        """Empty the samples with a token from weights before `version`; return whether there were any."""
        old = [sample for sample in self.group.samples if sample.response_ids and oldest_version(sample) < version]
        for sample in old:
            self.group.samples[sample.index] = _nothing_drawn(sample.index, version)
        if old:
            self.is_redone, self.is_left_out = True, False
        return bool(old)


def _nothing_drawn(index: int, weight_version: int) -> Sample:
    return Sample(index, array("i"), array("d"), "abort", weight_version)


def oldest_version(sample: Sample) -> int:
    """Oldest weight version that any of its tokens was generated from."""
    return min(sample.weight_versions, default=sample.weight_version)


def summed_ages(sample: Sample, version: int) -> int:
    """Sum of the ages of its generated tokens, in weight syncs up to weights `version`."""
    if not sample.weight_versions:
        return sample.num_generated * (version - sample.weight_version)
    ages = version - np.frombuffer(sample.weight_versions, np.int32)
    return int(ages.sum(where=np.frombuffer(sample.loss_mask, np.bool_)) if sample.loss_mask else ages.sum())


def extend(sample: Sample, output: GenerationOutput) -> None:
    """Append the generated tokens with their log-probs and versions (in place; the caller owns the sample)."""
    versions = sample.token_versions() + array("i", [output.weight_version]) * len(output.ids)
    if sample.loss_mask:
        sample.loss_mask.extend([1] * len(output.ids))
    sample.response_ids.extend(output.ids)
    sample.rollout_logprobs.extend(output.logprobs)
    sample.finish_reason = output.finish_reason
    sample.weight_version = versions[-1] if versions else output.weight_version
    sample.weight_versions = versions if len(set(versions)) > 1 else array("i")
    if output.routing:  # covers the earlier tokens too, because their KV cache was recomputed
        sample.routing = output.routing


def pack(groups: Sequence[PendingGroup]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Groups for a checkpoint: JSON for each group, and one column per field of `_COLUMNS` with all samples in order.

    A column is one flat tensor; `<name>.lengths`, int64 [samples], holds the length of each sample's part.
    """
    samples = [sample for held in groups for sample in held.group.samples]
    columns = {}
    for name, dtype in _COLUMNS.items():
        parts = [getattr(sample, name) for sample in samples]
        if name == "text":
            parts = [text.encode() for text in parts]
        columns[name] = torch.from_numpy(np.concatenate([np.empty(0, dtype), *(np.frombuffer(part, dtype) for part in parts)]))
        columns[f"{name}.lengths"] = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    return [_without_columns(held) for held in groups], columns


def _without_columns(held: PendingGroup) -> dict[str, Any]:
    group = group_to_json(held.group, without=_COLUMNS)
    return {"group": group, "step": held.step, "is_left_out": held.is_left_out, "is_redone": held.is_redone}


def unpack(found: Sequence[Mapping[str, Any]], columns: Mapping[str, Tensor]) -> list[PendingGroup]:
    """Inverse of `pack`."""
    parts = {name: _parts(name, columns) for name in _COLUMNS if name in columns}
    groups = []
    for one in found:
        samples = [sample | {name: next(part) for name, part in parts.items()} for sample in one["group"]["samples"]]
        groups.append(PendingGroup(**{**one, "group": group_from_json({**one["group"], "samples": samples})}))
    return groups


def _parts(name: str, columns: Mapping[str, Tensor]) -> Iterator[list[Any] | str | array[int]]:
    for part in columns[name].split(columns[f"{name}.lengths"].tolist()):
        if name == "text":
            yield part.numpy().tobytes().decode()
        else:
            yield array("B", part.numpy().tobytes()) if name == "routing" else part.tolist()
