"""Data types shared by all packages: a `Problem` goes in, a `Group` of `Sample`s comes back.

Plain Python on purpose: these objects cross process boundaries (ranks, graders, servers) and are written to disk. Per-token
fields are `array`s, which take less than a fifth of a list's memory: every rank holds a whole step's samples.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]
RewardStatus = Literal["ok", "timeout", "error", "out_of_range"]

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "tekken.json", "spiece.model")
"""A model directory with a tokenizer has at least one of these."""

MOST_REPLAYED = 256
"""Maximum number of experts in `Sample.routing`, which stores one byte per choice to save memory."""


@dataclass(slots=True)
class Problem:
    """One prompt with its verifiable answer.

    id: stable name of the row in its source (`<file>:<row>` unless the data has an id column).
    prompt: the user's text, before the chat template; the last message if there are several.
    answer: the reference answer as the verifier expects it.
    prompt_ids: token ids of the templated prompt, the engine's input.
    extra: further columns by name, plain JSON values, for a custom reward function.
    """

    id: str
    prompt: str
    answer: str
    prompt_ids: list[int] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Sample:
    """One response to a prompt.

    index: position in its group; together with the group, it seeds the sampling.
    response_ids: generated token ids, the end-of-sequence token included when `finish_reason` is "stop".
    rollout_logprobs: natural-log probability of each response token under the engine's *tempered* distribution (before
        top-p/top-k), same length as `response_ids`.
    finish_reason: "abort" marks an unfinished response; no such response is in a group that is trained on.
    weight_version: version of the weights that its last token was drawn from.
    weight_versions: the version of each token if the response was continued after a weight sync; else empty.
    routing: with routing replay, the experts that the engine chose, flattened from [token, MoE layer, expert of the token].
        Covers the prompt and the response without its last token; shorter or empty if the engine did not report them all.
        Rank 0 has it; other ranks may not have that of samples they did not draw themselves.
    reward_parts: further numbers of the user's reward function, by name.

    response_ids, rollout_logprobs and weight_versions may be any sequences; they are stored as arrays of type "i", "d" and "i".
    """

    index: int
    response_ids: array[int]
    rollout_logprobs: array[float]
    finish_reason: FinishReason
    weight_version: int
    text: str = ""
    reward: float | None = None
    reward_status: RewardStatus | None = None
    weight_versions: array[int] = field(default_factory=lambda: array("i"))
    routing: array[int] = field(default_factory=lambda: array("B"))
    reward_parts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.response_ids = array("i", self.response_ids)
        self.rollout_logprobs = array("d", self.rollout_logprobs)
        self.weight_versions = array("i", self.weight_versions)

    def known_reward(self) -> float:
        """The reward, of a sample that has been graded."""
        assert self.reward is not None
        return self.reward

    def token_versions(self) -> array[int]:
        """Version of the weights that each response token was drawn from."""
        return self.weight_versions or array("i", [self.weight_version]) * len(self.response_ids)


@dataclass(slots=True)
class Group:
    """All responses to one prompt; group statistics (mean, deviation, variance) are taken over them.

    id: unique within a run, `<problem id>@<step>`: the same problem in a later step is another group.
    """

    id: str
    problem: Problem
    samples: list[Sample]
