"""Requests to graders and their results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from etr_megatron.types import Message, RewardStatus


@dataclass(frozen=True, slots=True)
class GradeRequest:
    """One response to grade. prompt: the user's message. answer: the reference answer as in the data. extra: values of
    `reward.columns`. messages: with an environment, all chat messages of prompt and response; else empty."""

    prompt: str
    response: str
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Grade:
    """The grade of one response.

    reward: within `reward.range_min` and `reward.range_max`; the minimum if the status is not "ok".
    status: "ok" (graded, right or wrong), "timeout" (the call was cancelled, or the grader killed, at `reward.timeout_s`),
        "error" (the reward function failed, or crashed its process twice), or "out_of_range" (its reward was outside the
        configured range).
    detail: what was compared, or what went wrong; for people to read.
    parts: further numbers that the user's function returned, by name.
    """

    reward: float
    status: RewardStatus
    detail: str
    parts: dict[str, float] = field(default_factory=dict)
