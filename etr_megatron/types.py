"""The only currency between rooms: a `Problem` is asked, a `Group` of `Sample`s comes back.

Plain Python on purpose: these objects cross process boundaries (ranks, graders, servers) and are written to disk. What a
sample has of every token is an `array`, less than a fifth of a list's memory: every rank holds those of a whole step.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]
RewardStatus = Literal["ok", "timeout", "error", "out_of_range"]

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "tekken.json", "spiece.model")
"""Of which the directory of a model with its tokenizer has one at least."""

MOST_REPLAYED = 256
"""Experts that `Sample.routing` can tell apart: there are so many numbers that each is a byte."""


@dataclass(slots=True)
class Problem:
    """One prompt with its verifiable answer.

    id: stable name of the row in its source (`<file>:<row>` unless the data has an id column).
    prompt: the user's text, before the chat template; of several messages the last.
    answer: the reference answer as the verifier wants it.
    prompt_ids: token ids of the templated prompt, what the engine is given.
    extra: further columns by name, plain values of JSON, for a reward of the user's own.
    """

    id: str
    prompt: str
    answer: str
    prompt_ids: list[int] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Sample:
    """One response to a prompt.

    index: position in its group; together with the group it seeds the sampling.
    response_ids: generated token ids, the end-of-sequence token included when `finish_reason` is "stop".
    rollout_logprobs: natural-log probability of each response token under the engine's *tempered* distribution (before
        top-p/top-k), same length as `response_ids`.
    finish_reason: "abort" is a response that is not finished; it is in no group that is trained on.
    weight_version: version of the weights that its last token was drawn from.
    weight_versions: of each token, where the response was continued after a weight sync; else empty.
    routing: with routing replay, the experts that the engine chose: for each token that it computed (prompt and response, the
        last one not), layer with experts and expert of a token one number; empty, or of fewer tokens, where it did not say.
        Rank 0 has it; ranks that have not drawn it themselves may not.

    Any sequence will do for the three that are per token; they are kept as arrays of type "i", "d" and "i".
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
    """All responses to one prompt: what group statistics (mean, deviation, variance) are taken over.

    id: unique within a run, `<problem id>@<step>`: the same problem met again later is another group.
    """

    id: str
    problem: Problem
    samples: list[Sample]
